"""A refactor changes no figure: the loss curve of a small run, to what another CPU's rounding may move.

When a change is meant to move it, `python -m tests.train.test_golden` writes the new curve; say why in the commit.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from tests.train.helpers import metrics, run_small, write_corpus

GOLDEN = Path(__file__).parents[1] / "golden" / "small_run.json"
FIGURES = ("loss", "router_loss", "router_z_loss", "grad_norm", "eval_loss")


def curve(folder: Path) -> list[dict[str, float]]:
    corpus = write_corpus(folder / "corpus.jsonl")
    words = [f"data.path={corpus}", "train.max_steps=20", "train.gradient_accumulation_steps=2", "optim.lr=0.005"]
    assert run_small(folder / "run", *words) == 0
    return [{name: row[name] for name in FIGURES if name in row} for row in metrics(folder / "run")]


def test_the_curve_is_the_golden_one(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    for step, (got, expected) in enumerate(zip(curve(tmp_path), golden, strict=True)):
        assert got == pytest.approx(expected, rel=2e-4), f"step {step}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        rows = [json.dumps(row) for row in curve(Path(scratch))]
    GOLDEN.write_text("[\n" + ",\n".join(rows) + "\n]\n")
    sys.exit(0)
