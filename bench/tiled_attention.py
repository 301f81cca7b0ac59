"""Tiled attention against SDPA: forward and backward of a layer's attention on a CPU, in turns in one process.

The process first frees blocks of 32 MB, so that the C library keeps such for the next tensors, as a training process
comes to do.

usage: python -m bench.tiled_attention [--rounds 8] [--threads 2] [--json FILE]
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.instruments import timed
from mixtral.ops.tiled import spans, tiled_attention
from mixtral.ops.windowed import visible


class Case(NamedTuple):
    """Rows of tokens, and their heads."""

    rows: int
    length: int
    heads: int = 8
    groups: int = 2
    dim: int = 64
    document: int | None = None
    dtype: torch.dtype = torch.bfloat16


CASES = (
    Case(2, 1024),
    Case(4, 2048),
    Case(8, 256),
    Case(2, 1024, document=300),
    Case(2, 1024, document=20),
    Case(2, 1024, dtype=torch.float32),
    Case(8, 256, dtype=torch.float32),
    Case(1, 2048, groups=8, dim=128),
)


def compare(case: Case, rounds: int) -> dict[str, float]:
    """Times both in turns; returns the medians of all but the first, in seconds."""
    torch.manual_seed(0)

    def heads_of(count: int) -> Tensor:
        return torch.randn(case.rows, case.length, count, case.dim, dtype=case.dtype).transpose(1, 2)

    query, key, value = inputs = [heads_of(count).requires_grad_() for count in (case.heads, case.groups, case.groups)]
    upstream = heads_of(case.heads)
    documents = (torch.arange(case.length) // (case.document or case.length)).expand(case.rows, -1)
    mask = None if case.document is None else visible(documents, case.length).unsqueeze(1)
    borders = spans(documents)

    def tiled() -> None:
        torch.autograd.grad(tiled_attention(query, key, value, borders, None), inputs, upstream)

    def sdpa() -> None:
        out = scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=True)
        torch.autograd.grad(out, inputs, upstream)

    seconds: dict[str, list[float]] = {"tiled": [], "sdpa": []}
    for _ in range(rounds + 1):
        seconds["tiled"].append(timed(tiled))
        seconds["sdpa"].append(timed(sdpa))
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def main() -> None:
    """Prints a table, and writes what is in it as JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.tiled_attention")
    parser.add_argument("--rounds", type=int, default=8, help="passes of each, after one that is not counted")
    parser.add_argument("--threads", type=int, help="of PyTorch; by default as many as it takes")
    parser.add_argument("--json", type=Path, help="file to write the figures into")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for millions in (8, 7):
        blocks = [torch.empty(millions << 20) for _ in range(3)]
        del blocks
    print(f"forward and backward, {torch.get_num_threads()} CPU threads, medians of {options.rounds}")
    rows = []
    for case in CASES:
        found = compare(case, options.rounds)
        name = f"{case.rows} x {case.length}, {case.heads} heads of {case.dim} over {case.groups}"
        name += "" if case.document is None else f", documents of {case.document}"
        name += f", {str(case.dtype).removeprefix('torch.')}"
        rows.append({"case": name, **found})
        print(
            f"{name:<58}{found['tiled'] * 1e3:>8.1f} ms{found['sdpa'] * 1e3:>8.1f} ms SDPA"
            f"{found['sdpa'] / found['tiled']:>8.2f} x",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
