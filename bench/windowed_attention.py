"""Windowed attention against SDPA with an S x S mask: time and peak memory of forward and backward at S = 4k, 8k, 16k.

Both compute the same, on the same inputs, packed documents included; on the GPU where there is one. Every measurement
is a process of its own, and the two ops take turns, so that neither a warm allocator nor a busy minute favours one.

usage: python -m bench.windowed_attention [--rounds 3] [--repeats 2] [--dtype float32] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mixtral.ops.windowed import reference, windowed_attention

WINDOW, HEADS, GROUPS, DIM = 1024, 8, 2, 64
LENGTHS = (4096, 8192, 16384)
OPS: dict[str, Callable[..., Tensor]] = {"windowed": windowed_attention, "masked": reference}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class PeakMemory:
    """The most memory held inside the block, above what was held before it: `.bytes`.

    On the CPU that is the resident memory of the process, read every millisecond.
    """

    def __enter__(self) -> "PeakMemory":
        """Begins to watch."""
        self.done = threading.Event()
        self.highest = self.before = self._now()
        self.watcher = threading.Thread(target=self._watch)
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops watching."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            self.highest = torch.cuda.max_memory_allocated()
        else:
            self.done.set()
            self.watcher.join()
        self.bytes = self.highest - self.before

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.highest = max(self.highest, self._now())

    @staticmethod
    def _now() -> int:
        if DEVICE == "cuda":
            return torch.cuda.memory_allocated()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(name: str, length: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Times one op in this fresh process: seconds of each pass, and peak bytes above the inputs."""
    torch.manual_seed(0)
    documents = (torch.arange(length, device=DEVICE) >= length // 3).long().unsqueeze(0)  # two in the row
    inputs = [
        torch.randn(1, heads, length, DIM, device=DEVICE, dtype=dtype, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    upstream = torch.randn_like(inputs[0])

    def run(length: int) -> float:
        parts = [tensor[:, :, :length] for tensor in inputs]
        started = time.perf_counter()
        OPS[name](*parts, documents[:, :length], WINDOW).backward(upstream[:, :, :length])
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    run(64)  # loads kernels, starts threads and makes the gradients' own memory
    with PeakMemory() as memory:
        seconds = [run(length) for _ in range(repeats)]
    return {"seconds": statistics.median(seconds), "bytes": memory.bytes}


def compare(length: int, options: argparse.Namespace) -> dict[str, float]:
    """Runs the two ops in turns; returns the medians over the rounds."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in OPS}
    for turn in range(options.rounds):
        for name in sorted(OPS, reverse=bool(turn % 2)):
            command = [sys.executable, "-m", "bench.windowed_attention", "--measure", name, "--length", str(length)]
            command += ["--dtype", options.dtype, "--repeats", str(options.repeats)]
            found[name].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    row: dict[str, float] = {"length": length}
    for name, runs in found.items():
        for figure in ("seconds", "bytes"):
            row[f"{name}_{figure}"] = statistics.median(run[figure] for run in runs)
    return row | {
        "times_faster": row["masked_seconds"] / row["windowed_seconds"],
        "share_of_memory": row["windowed_bytes"] / row["masked_bytes"],
        "microseconds_per_token": row["windowed_seconds"] / length * 1e6,
    }


def main() -> None:
    """Prints a table, and writes what is in it as JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.windowed_attention")
    parser.add_argument("--rounds", type=int, default=3, help="processes per op and length")
    parser.add_argument("--repeats", type=int, default=2, help="passes per process")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="file to write the figures into")
    parser.add_argument("--measure", choices=OPS, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        dtype = getattr(torch, options.dtype)
        print(json.dumps(measure(options.measure, options.length, dtype, options.repeats)))
        return
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    setting = f"W {WINDOW}, {HEADS} heads, {GROUPS} key/value heads of {DIM}, {options.dtype}, {machine}"
    print(f"{setting}, medians of {options.rounds} x {options.repeats}")
    titles = ("windowed", "masked", "faster", "windowed", "masked", "memory", "us/token")
    print(f"{'S':>6}" + "".join(f"{title:>12}" for title in titles))
    rows = []
    for length in LENGTHS:
        row = compare(length, options)
        rows.append(row)
        cells = [f"{row[f'{name}_seconds']:.3f} s" for name in OPS] + [f"{row['times_faster']:.1f} x"]
        cells += [f"{row[f'{name}_bytes'] / 2**20:.0f} MiB" for name in OPS]
        cells += [f"{row['share_of_memory']:.2f} x", f"{row['microseconds_per_token']:.1f}"]
        print(f"{length:>6}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
    per_token = [row["microseconds_per_token"] for row in rows]
    print(f"time per token from the least to the most: {max(per_token) / min(per_token) - 1:+.0%}")
    if options.json:
        options.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
