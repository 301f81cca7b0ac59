"""How long the trainer takes before it trains: help, a mistake in a key, a plan, and the first step of a tiny run.

usage: python -m bench.start [--rounds 3] [--json FILE]

Each is a process of its own; seconds are the clock's and, beside, the processor's.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TINY = ["model.hidden_size=96", "model.intermediate_size=96", "model.num_hidden_layers=2", "train.max_steps=1"]
COMMANDS = {
    "--help": (["train", "--help"], 0),
    "a key that is not there": (["train", "recipe=demo", "model.layes=2"], 2),
    "a plan of 8x7B": (["train.plan", "recipe=sft_8x7b_lora", "data.path=x"], 0),
    "a run of one step": (["train", "recipe=pretrain_tiny", *TINY], 0),
}


def seconds(words: list[str], code: int) -> tuple[float, float]:
    """Runs a command, which must end with a code; returns the clock's seconds and the processor's."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, f"run.dir={folder}/run"] if "--help" not in words else words
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=os.environ)
        passed, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise SystemExit(f"{words} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return passed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Prints a table, and writes what is in it as JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.start")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is run, after once more")
    parser.add_argument("--json", type=Path, help="file to write the figures into")
    options = parser.parse_args()
    rows = {}
    print(f"{'':28}{'seconds':>10}{'processor':>12}")
    for name, (words, code) in COMMANDS.items():
        seconds(words, code)  # reads the files once
        runs = [seconds(words, code) for _ in range(options.rounds)]
        clock, processor = (statistics.median(times) for times in zip(*runs, strict=True))
        rows[name] = {"seconds": clock, "processor": processor}
        print(f"{name:28}{clock:>10.2f}{processor:>12.2f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
