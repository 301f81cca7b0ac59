"""Loads an export with transformers and with Cierzo, and compares their held-out loss document by document.

Documents are read in windows, since a model is not expected to be good at lengths it was not trained on.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from mixtral import MixtralForCausalLM

TOLERANCE = 1e-4  # of the mean loss of a document, in fp32


@torch.no_grad()
def loss(model: PreTrainedModel, ids: torch.Tensor, window: int) -> float:
    """Returns the summed cross-entropy of one document, each token predicted from those before it in its window."""
    total = 0.0
    for start in range(0, len(ids) - 1, window):
        logits = model(ids[None, start : start + window], use_cache=False).logits[0].float()
        targets = ids[start + 1 : start + window + 1]
        total += cross_entropy(logits[: len(targets)], targets, reduction="sum").item()
    return total


def main() -> int:
    """Prints both losses; returns 1 when a document's differ by more than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the export/ of a run")
    parser.add_argument("window", type=int, help="tokens per window: the run's data.sequence_length")
    arguments = parser.parse_args()
    folder, window = arguments.folder, arguments.window
    if not (folder / "held_out.jsonl").is_file():
        parser.error(f"{folder} is no export of a run: it has no held_out.jsonl")
    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    print(f"{type(theirs).__module__}.{type(theirs).__name__} loaded {folder}")
    print(f"{'held-out document':<44}{'tokens':>8}{'transformers':>14}{'ours':>10}{'difference':>12}")
    totals, worst = [0.0, 0.0, 0], 0.0
    for row in rows:
        ids = torch.tensor([*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id])
        count = len(ids) - 1
        their_sum, our_sum = loss(theirs, ids, window), loss(ours, ids, window)
        worst = max(worst, abs(their_sum - our_sum) / count)
        totals = [totals[0] + their_sum, totals[1] + our_sum, totals[2] + count]
        difference = f"{abs(their_sum - our_sum) / count:.1e}"
        print(f"{row['source'][:42]:<44}{count:>8}{their_sum / count:>14.5f}{our_sum / count:>10.5f}{difference:>12}")
    print(f"{'all':<44}{totals[2]:>8}{totals[0] / totals[2]:>14.5f}{totals[1] / totals[2]:>10.5f}{worst:>12.1e}")
    if worst > TOLERANCE:
        print(f"the losses differ by more than {TOLERANCE}", file=sys.stderr)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
