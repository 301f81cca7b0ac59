"""Windowed attention against SDPA with an S x S mask: time and memory of forward and backward at S = 4k, 8k, 16k.

usage: python -m bench.windowed_attention
"""

import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from mixtral.ops.windowed import reference, windowed_attention

WINDOW, HEADS, GROUPS, DIM, REPEATS = 1024, 8, 2, 64, 3
LENGTHS = (4096, 8192, 16384)


def measure(name: str, length: int) -> dict[str, float]:
    """Times one op in this fresh process; returns seconds per pass and peak bytes above the inputs."""
    attend = {"windowed": windowed_attention, "masked": reference}[name]
    documents = torch.zeros(1, length, dtype=torch.long)
    inputs = [torch.randn(1, heads, length, DIM, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)]
    warm = [tensor[:, :, : WINDOW + 1] for tensor in inputs]
    attend(*warm, documents[:, : WINDOW + 1], WINDOW).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        attend(*inputs, documents, WINDOW).sum().backward()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": statistics.median(seconds), "bytes": peak * 1024}


def main() -> None:
    """Alternates the two ops, each in a process of its own, and prints a table."""
    sizes = f"W {WINDOW}, {HEADS} heads, {GROUPS} key/value heads of {DIM}, fp32"
    print(f"{sizes}, {torch.get_num_threads()} threads, median of {REPEATS}")
    titles = ("windowed", "masked", "faster", "windowed", "masked", "memory", "us/token")
    print(f"{'S':>6}" + "".join(f"{title:>12}" for title in titles))
    for length in LENGTHS:
        found = {}
        for name in ("windowed", "masked"):
            command = [sys.executable, "-m", "bench.windowed_attention", name, str(length)]
            found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ours, theirs = found["windowed"], found["masked"]
        cells = [f"{op['seconds']:.2f} s" for op in (ours, theirs)]
        cells.append(f"{theirs['seconds'] / ours['seconds']:.1f} x")
        cells += [f"{op['bytes'] / 2**20:.0f} MiB" for op in (ours, theirs)]
        cells += [f"{ours['bytes'] / theirs['bytes']:.2f} x", f"{ours['seconds'] / length * 1e6:.0f}"]
        print(f"{length:>6}" + "".join(f"{cell:>12}" for cell in cells))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
