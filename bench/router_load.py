"""How each scope of the router loss balances a Mixtral on real text, and what that costs in held-out loss.

usage: python -m bench.router_load [--steps N] [--out FOLDER]

Trains the tiny model on the interpreter's own source, from the same weights on the same rows, with four micro-batches
to a step: once for every scope and coefficient, once without any balancing, and by the bias alone. The excess is the
load of a layer's fullest expert over an equal share, less one, in the mean over layers: 0 is balance, 3 is a layer
that sends everything to two of eight experts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

COEFFICIENTS = (1e-3, 1e-2, 1e-1)
SCOPES = ("global_batch", "previous_step", "document", "huggingface")
WORDS = (
    *("recipe=pretrain_tiny", "model.hidden_size=128", "model.intermediate_size=256", "model.num_attention_heads=4"),
    *("model.vocab_size=2048", "data.sequence_length=256", "train.micro_batch_size=2", "tracker=none"),
    *("train.gradient_accumulation_steps=4", "train.log_every=1", "evaluate.every=null", "evaluate.sample_tokens=0"),
    *("schedule.warmup_steps=20", "data.held_out_documents=64"),
)
LAST = 0.25  # share of the steps that the figures are taken from


def runs() -> dict[tuple[str, float], list[str]]:
    """What is trained: the words of each run by its name and coefficient."""
    found = {("no balancing", 0.0): ["model.router_aux_loss_coef=0"]}
    found["bias alone", 0.0] = ["model.router_aux_loss_coef=0", "train.router_bias_rate=0.001"]
    for scope in SCOPES:
        for coefficient in COEFFICIENTS:
            words = [f"train.router_loss_scope={scope}", f"model.router_aux_loss_coef={coefficient}"]
            found[scope, coefficient] = words
    return found


def train(words: list[str], steps: int, folder: Path) -> list[dict[str, Any]]:
    """Trains in a process of its own; returns its metrics."""
    command = [sys.executable, "-m", "train", *WORDS, *words, f"train.max_steps={steps}", f"run.dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def excess(rows: list[dict[str, Any]]) -> np.ndarray:
    """Gives each step's excess of the fullest expert, the mean over layers."""
    load_SLE = np.asarray([row["expert_load"] for row in rows if "expert_load" in row])
    return (load_SLE.max(axis=-1) * load_SLE.shape[-1] - 1).mean(axis=-1)


def draw(found: dict[tuple[str, float], list[dict[str, Any]]], target: Path) -> None:
    """Draws the excess over the steps, a panel for each coefficient."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, coefficient in zip(figure.subplots(ncols=3, sharey=True), COEFFICIENTS, strict=True):
        for (name, of), rows in found.items():
            if of in (0.0, coefficient):
                smooth = np.convolve(excess(rows), np.ones(9) / 9, mode="valid")
                panel.plot(np.arange(len(smooth)) + 5, smooth, label=name, ls="-" if of else ":", lw=1.2)
        panel.set_title(f"router_aux_loss_coef {coefficient:g}", fontsize=10)
        panel.set_xlabel("step")
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.supylabel("excess of the fullest expert (0 is balance)", fontsize=10)
    figure.savefig(target, dpi=110)


def main() -> None:
    """Trains every run, prints a table, and keeps the figures and their picture where asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.router_load")
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--out", type=Path, help="folder for router_load.json and router_load.png")
    options = parser.parse_args()
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    print(f"{'scope':16}{'coefficient':>12}{'excess':>10}{'worst layer':>13}{'router loss':>13}{'held-out loss':>15}")
    table = []
    with tempfile.TemporaryDirectory() as name:
        for index, ((scope, coefficient), words) in enumerate(runs().items()):
            rows = found[scope, coefficient] = train(words, options.steps, Path(name, str(index)))
            last = [row for row in rows if "expert_load" in row][-round(LAST * options.steps) :]
            worst = np.asarray([row["expert_load"] for row in last]).mean(axis=0).max() * 8 - 1
            figures = {
                "excess": float(excess(last).mean()),
                "worst_layer": float(worst),
                "router_loss": float(np.mean([row["router_loss"] for row in last])),
                "held_out_loss": rows[-1]["eval_loss"],
            }
            table.append({"scope": scope, "coefficient": coefficient} | figures)
            cells = f"{figures['excess']:>10.3f}{figures['worst_layer']:>13.3f}{figures['router_loss']:>13.4f}"
            print(f"{scope:16}{coefficient:>12g}{cells}{figures['held_out_loss']:>15.4f}", flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "router_load.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        draw(found, options.out / "router_load.png")


if __name__ == "__main__":
    main()
