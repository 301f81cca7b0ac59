"""Windowed attention against SDPA with an S x S mask: time and peak memory of forward and backward at S = 4k, 8k, 16k.

Both compute the same, on the same inputs, packed documents included; on the GPU where there is one. Every measurement
is a process of its own, and the two ops take turns, so that neither a warm allocator nor a busy minute favours one.

usage: python -m bench.windowed_attention [--rounds 3] [--repeats 2] [--dtype float32] [--json FILE]
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.instruments import DEVICE, PeakMemory, in_turns, machine, median, timed
from mixtral.ops.windowed import reference, windowed_attention

WINDOW, HEADS, GROUPS, DIM = 1024, 8, 2, 64
LENGTHS = (4096, 8192, 16384)
OPS: dict[str, Callable[..., Tensor]] = {"windowed": windowed_attention, "masked": reference}


def measure(name: str, length: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Times one op in this fresh process: seconds of each pass, and peak bytes above the inputs."""
    torch.manual_seed(0)
    documents = (torch.arange(length, device=DEVICE) >= length // 3).long().unsqueeze(0)  # two in the row
    inputs = [
        torch.randn(1, heads, length, DIM, device=DEVICE, dtype=dtype, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    upstream = torch.randn_like(inputs[0])

    def run(length: int) -> None:
        parts = [tensor[:, :, :length] for tensor in inputs]
        OPS[name](*parts, documents[:, :length], WINDOW).backward(upstream[:, :, :length])

    run(64)  # loads kernels, starts threads and makes the gradients' own memory
    with PeakMemory() as memory:
        seconds = [timed(lambda: run(length)) for _ in range(repeats)]
    return {"seconds": statistics.median(seconds), "bytes": memory.bytes}


def compare(length: int, options: argparse.Namespace) -> dict[str, float]:
    """Runs the two ops in turns; returns the medians over the rounds."""
    words = ["--length", str(length), "--dtype", options.dtype, "--repeats", str(options.repeats)]
    row: dict[str, float] = {"length": length}
    for name, runs in in_turns("bench.windowed_attention", OPS, options.rounds, words).items():
        row |= {f"{name}_{figure}": median(runs, figure) for figure in ("seconds", "bytes")}
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
    setting = f"W {WINDOW}, {HEADS} heads, {GROUPS} key/value heads of {DIM}, {options.dtype}, {machine()}"
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
