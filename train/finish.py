"""The end of a run: summary, export, and a sample of what the model writes."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from train.config import Config
from train.data.loader import Data
from train.evaluate.best import Best
from train.export import export
from train.folder import RunFolder
from train.generate.writing import Sampling, write
from train.observe.observer import Observer
from train.observe.progress import shown
from train.parallel.engine import Engine

BEST = "best"  # folder of the run
DRIFT = ("router_agreement", "router_kl", "router_drift_tokens")


def finish(
    folder: RunFolder | None,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    config: Config,
    observer: Observer,
    best: Best,
) -> None:
    """Writes `summary.json` and `export/`, then prints a sample. Every process takes part; the main one writes."""
    observer.end_of_training()
    engine.watchdog.enter("the export")
    summary = summarise(observer, data)
    if folder:
        described = {"metric": best.metric, "step": best.step, "value": best.value}
        folder.write_json("summary.json", summary | {"best": described, "stopped_early": best.is_over})
    target = Path(config.run.dir or "") / "export"
    chosen = config.evaluate.export_best and engine.on_main(lambda: _use_best(target, best))
    if not chosen:
        export(target, engine, tokenizer, data.held_out_documents, config, summary)
    if folder:
        if best.is_over or config.evaluate.export_best:
            exported = "; it is exported" if chosen else "; of the last step is the export"
            print(f"{'no better for so many evaluations: ' if best.is_over else ''}{best}{exported}")
        figures = shown(observer.last) if data.labels else ""
        change = f"held-out loss {summary['first_eval_loss']:.4f} -> {summary['eval_loss']:.4f}"
        print(f"{change}{figures}; exported to {target}")
    if config.evaluate.sample_tokens and data.labels is None:
        text = sample(engine, tokenizer, config.evaluate.sample_prompt, config.evaluate.sample_tokens, config.run.seed)
        if folder:
            of_last = " of the last step" if chosen and best.step != summary["steps"] else ""
            print(f"--- sample{of_last} ---\n{text}\n--------------")


def keeper_of_best(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, data: Data, config: Config, observer: Observer
) -> Callable[[], None] | None:
    """Gives, where the best model is to be exported, what every process does once it is a new one.

    It exports the model beside the run's export-to-be, and removes the best one before.

    Raises:
        MachineError: on every process, when it cannot be written.
    """
    if not config.evaluate.export_best:
        return None
    folder = Path(config.run.dir or "") / BEST

    def keep() -> None:
        step = f"step-{observer.last['step']}"
        engine.on_main(lambda: shutil.rmtree(folder / step, ignore_errors=True))  # of a run that died after it
        export(folder / step / "export", engine, tokenizer, data.held_out_documents, config, summarise(observer, data))
        engine.on_main(lambda: _remove_others(folder, step))

    return keep


def _remove_others(folder: Path, kept: str) -> None:
    for other in list(folder.iterdir()):
        if other.name != kept:
            shutil.rmtree(other)


def _use_best(target: Path, best: Best) -> bool:
    """Gives the best model a second name as the run's export; says whether it is there.

    It is gone where a run went on from before the step that replaced it, and then found none better.
    """
    kept = target.parent / BEST / f"step-{best.step}" / "export"
    if kept.is_dir():
        shutil.copytree(kept, target, copy_function=_link)
    return kept.is_dir()


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has links
        shutil.copy2(source, target)


def summarise(observer: Observer, data: Data) -> dict[str, Any]:
    """Gathers the figures a run is remembered by."""
    last = observer.last
    evaluated = [name for name in last if name.startswith("eval_")]
    names = ("loss", *evaluated, "router_loss", *DRIFT, "tokens_per_second", "peak_memory_bytes", "skipped_steps")
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "first_eval_loss": observer.evaluations[0],
        **{name: last[name] for name in names if name in last},  # not a loss, where every step was skipped
        "left_out": dict(data.counts.left_out),
        "cut": data.counts.cut,
    }


def sample(engine: Engine, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int, seed: int) -> str:
    """Writes `tokens` tokens after a prompt, drawn from the 20 likeliest at each step, the same for a seed.

    Every process does so, since each may hold but a part of the model.
    """
    end = tokenizer.eos_token_id
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    ids = ids or [end]
    processors = Sampling(temperature=0.7, top_k=20, seed=seed).processors([0])
    (written,) = write(engine, [ids], ends=[end], max_new_tokens=tokens, processors=processors)
    text: str = tokenizer.decode([*ids, *written], skip_special_tokens=True)
    return text
