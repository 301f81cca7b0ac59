"""The trained model as a folder that the ecosystem reads: the hub's layout."""

import json
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from mixtral import MixtralForCausalLM
from train.config import Config

CARD = """\
---
library_name: transformers
tags: [mixtral, moe, cierzo]
---

# {name}

A Mixtral of {total:,} parameters ({active:,} active per token), trained with Cierzo.

| | |
|---|---|
| data | `{data}`, {tokens:,} tokens seen |
| tokenizer | `{tokenizer}` |
| steps | {steps} |
| precision | {precision} |
| held-out loss | {first:.4f} before training, {last:.4f} after (nats per token) |

`held_out.jsonl` holds the documents of the held-out loss.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""


def export(
    target: Path,
    model: MixtralForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Dataset,
    config: Config,
    summary: dict[str, Any],
) -> None:
    """Writes weights, config, tokenizer, generation config, model card and `held_out.jsonl`.

    The folder appears whole or not at all.

    Args:
        target: the folder to make.
        model: the trained model.
        tokenizer: its tokenizer.
        held_out: the held-out documents, with a `text` column.
        config: of the run, for the card.
        summary: of the run, for the card.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    logging.disable_progress_bar()
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    with (partial / "held_out.jsonl").open("w", encoding="utf-8") as file:
        for row in held_out:
            file.write(json.dumps({"text": row["text"], "source": row["source"]}, ensure_ascii=False) + "\n")
    count = model.config.count_parameters()
    card = CARD.format(
        name=target.parent.name,
        total=count.total,
        active=count.active,
        data=config.data.path,
        tokens=summary["tokens"],
        tokenizer=config.data.tokenizer,
        steps=summary["steps"],
        precision=config.train.precision,
        first=summary["first_eval_loss"],
        last=summary["eval_loss"],
        folder=target.name,
    )
    (partial / "README.md").write_text(card, encoding="utf-8")
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors makes its own for the owner alone
    partial.rename(target)
