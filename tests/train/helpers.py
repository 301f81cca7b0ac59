"""Small runs, in this process and in others."""

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from train.cli import main

SMALL = [  # a run of seconds
    "recipe=pretrain_tiny",
    "run.plots=false",
    "model.vocab_size=320",
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "data.sequence_length=32",
    "data.held_out_fraction=0.1",
    "train.max_steps=4",
    "train.micro_batch_size=4",
    "train.log_every=1",
    "schedule.warmup_steps=20",
    "optim.eps=1e-8",
    "evaluate.every=null",
    "evaluate.sample_tokens=4",
    "tracker=none",
]
WORDS = ["wind", "valley", "expert", "router", "token", "row", "carries", "past", "the", "of", "and", "back"]


def write_corpus(path: Path, documents: int = 60) -> Path:
    """Writes a JSONL of short random documents, the same each time."""
    draw = random.Random(0)
    rows = ({"text": " ".join(draw.choices(WORDS, k=draw.randint(5, 40)))} for _ in range(documents))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_small(folder: Path, *words: str) -> int:
    """Runs in this process; returns the exit code."""
    return main(["train", *SMALL, f"run.dir={folder}", *words])


def launch(
    command: list[str], *words: str, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process group of its own, and leaves none of it behind.

    For what is about a launcher or a fresh interpreter; the rest starts much faster by `tests.warm.launch_ranks`.
    """
    process = subprocess.Popen(
        [*command, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        kill_group(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def kill_group(process: "subprocess.Popen[str]") -> None:
    """Kills what is left of a process's group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)


PYTHON = [sys.executable, "-m", "train"]


def torchrun(processes: int) -> list[str]:
    """The words that launch a module with several processes on a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
