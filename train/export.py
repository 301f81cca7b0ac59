"""The trained model as a folder that the ecosystem reads: the hub's layout; run as a module, `cierzo export`."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mixtral import MixtralConfig
from mixtral.weights.adapters import AdapterWriter
from mixtral.weights.names import hub_shapes
from mixtral.weights.write import HubWriter, Planned, new_folder
from train.config import Config
from train.data.formats import as_row
from train.generate.writing import end_marks
from train.lora import adapter_of
from train.merge import main
from train.model import head_of, write_config
from train.parallel.engine import Engine, Piece
from train.unread import quiet_once_unread

CARD = """\
---
library_name: {library}
tags: [mixtral, moe, cierzo{tags}]
---

# {name}

{what}, trained with Cierzo.

| | |
|---|---|
| data | `{data}`, {tokens:,} tokens seen |
| tokenizer | `{tokenizer}` |
| steps | {steps} |
| precision | {precision} |
| held-out loss | {first:.4f} before training, {last:.4f} after ({unit}) |{figures}

`held_out.jsonl` holds the documents of the held-out loss.

```python
{usage}
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""
USAGE = """\
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{folder}")"""
ADAPTER_USAGE = """\
from peft import PeftModel
from transformers import AutoConfig, {auto}, AutoTokenizer

model = {auto}.from_pretrained("{base}", config=AutoConfig.from_pretrained("{config}"))
model = PeftModel.from_pretrained(model, "{folder}")"""


def export(
    target: Path,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Dataset,
    config: Config,
    summary: dict[str, Any],
) -> None:
    """Writes weights or adapters, their config, tokenizer, generation config, model card and `held_out.jsonl`.

    Every process takes part, and sends the main one what it alone holds, an expert at a time. The folder appears
    whole or not at all.

    Args:
        target: the folder to make.
        engine: holds the trained model.
        tokenizer: its tokenizer.
        held_out: the held-out documents.
        config: of the run, for the card.
        summary: of the run, for the card.

    Raises:
        MachineError: on every process, when it cannot be written.
        CheckpointError: likewise, when what the base's folder says of generation can no longer be read.
    """
    pieces = exported_pieces(engine, config)

    def write() -> None:
        try:
            _write(target, engine, pieces, tokenizer, held_out, config, summary)
        finally:
            for _ in pieces:  # what the others still send when the disk is full
                pass

    if not engine.is_main:
        for _ in pieces:
            pass
    engine.on_main(write)


def _write(
    target: Path,
    engine: Engine,
    pieces: Iterable[Piece],
    tokenizer: PreTrainedTokenizerBase,
    held_out: Dataset,
    config: Config,
    summary: dict[str, Any],
) -> None:
    with new_folder(target) as folder:
        write_pieces(folder, config, engine.module.config, pieces, engine.dtype)
        if head_of(engine.module.config) == "lm_head":
            ends = end_marks(tokenizer, config.model.init_from)
            GenerationConfig(
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=ends[0] if len(ends) == 1 else ends or None,
                pad_token_id=tokenizer.pad_token_id,
            ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with (folder / "held_out.jsonl").open("w", encoding="utf-8") as file:
            for row in held_out:
                file.write(json.dumps(as_row(row), ensure_ascii=False) + "\n")
        card = _card(target, engine.module.config, config, summary)
        (folder / "README.md").write_text(card, encoding="utf-8")


def exported_pieces(engine: Engine, config: Config) -> Iterator[Piece]:
    """Yields what an export consists of: the adapters where there are any, else the model."""
    return engine.pieces("weights" if adapter_of(config.lora) is None else "trained")


def write_pieces(
    folder: Path, config: Config, model: MixtralConfig, pieces: Iterable[Piece], dtype: torch.dtype
) -> None:
    """Writes a model that comes in pieces, or its adapters in PEFT's layout.

    Args:
        folder: an existing one.
        config: of the run.
        model: its architecture.
        pieces: see `exported_pieces`.
        dtype: to write.
    """
    adapter = adapter_of(config.lora)
    if adapter is None:
        write_weights(folder, model, pieces, dtype)
        return
    if head_of(model) == "score":
        write_config(folder, model, dtype)  # which knows the labels
    fused = config.lora.format == "fused"
    with AdapterWriter(folder, model, adapter, dtype, config.model.init_from, fused=fused) as writer:
        for name, expert, tensor in pieces:
            assert tensor is not None
            writer.add_piece(name, expert, tensor)


def write_weights(folder: Path, config: MixtralConfig, pieces: Iterable[Piece], dtype: torch.dtype) -> None:
    """Writes a model that comes in pieces, and its `config.json`, in the hub's layout.

    Args:
        folder: an existing one.
        config: of the model.
        pieces: all of it, in any order.
        dtype: to write.
    """
    write_config(folder, config, dtype)
    planned = {name: Planned(dtype, shape) for name, shape in hub_shapes(config, head_of(config)).items()}
    with HubWriter(folder, planned) as writer:
        for name, expert, tensor in pieces:
            assert tensor is not None
            if expert is None:
                writer.add_parameter(name, tensor, [])
            else:
                writer.add_parameter(name, tensor[None], [expert])


def _card(target: Path, model: MixtralConfig, config: Config, summary: dict[str, Any]) -> str:
    count, adapter = model.count_parameters(), adapter_of(config.lora)
    is_classifier = head_of(model) == "score"
    auto = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
    usage = (USAGE if adapter is None else ADAPTER_USAGE).format(
        auto=auto,
        folder=target.name,
        base=config.model.init_from,
        config=target.name if is_classifier else config.model.init_from,
    )
    figures = [
        name
        for name in summary
        if name.startswith("eval_") and "/" not in name and name not in ("eval_loss", "eval_perplexity")
    ]
    what = f"A Mixtral of {count.total:,} parameters ({count.active:,} active per token)"
    if adapter is not None:
        targets = [*adapter.targets, *(["the experts"] if adapter.experts else [])]
        what = f"A LoRA adapter of rank {adapter.rank} on {', '.join(targets)} of `{config.model.init_from}`"
    return CARD.format(
        library="transformers" if adapter is None else "peft",
        tags="" if adapter is None else ", lora",
        name=Path(config.run.dir or target.parent).name,
        what=what,
        usage=usage,
        unit="a row" if is_classifier else "nats per token",
        figures="".join(f"\n| held-out {name.removeprefix('eval_')} | {summary[name]:.4f} |" for name in figures),
        data=config.data.names,
        tokens=summary["tokens"],
        tokenizer=config.data.tokenizer,
        steps=summary["steps"],
        precision=_precision(config),
        first=summary["first_eval_loss"],
        last=summary["eval_loss"],
        folder=target.name,
    )


def _precision(config: Config) -> str:
    if config.lora.quantize == "none":
        return config.train.precision
    return (
        f"{config.train.precision}; attention and experts of the base were held in 4 bits ({config.lora.quantize}), by "
        "which the losses were taken"
    )


if __name__ == "__main__":
    with quiet_once_unread():
        sys.exit(main(sys.argv[1:]))
