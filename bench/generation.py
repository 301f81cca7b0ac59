"""Greedy generation against transformers' Mixtral: tokens per second, from the same weights on the same prompts.

usage: python -m bench.generation [--batches 1 8] [--new 256] [--dtype float32] [--rounds 3] [--json FILE]

Both go through `generate` with a cache. In fp32 both must write the same tokens.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench.instruments import DEVICE, in_turns, machine, median, spread, timed
from bench.step import SIDES, SIZES, ours, start_alike, theirs

PROMPT, REPEATS = 64, 2


def measure(side: str, batch: int, new: int, dtype: torch.dtype) -> dict[str, Any]:
    """Writes in this fresh process; returns seconds of each time after the first, and the tokens."""
    model: Any = (ours(dtype) if side == "ours" else theirs(dtype, side))[0]
    start_alike(model)
    model.to(DEVICE).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, SIZES["vocab_size"], (batch, PROMPT), generator=generator).to(DEVICE)
    written: list[list[int]] = []

    def write() -> None:
        mask = torch.ones_like(prompts)
        tokens = model.generate(
            prompts, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
        written[:] = tokens[:, PROMPT:].tolist()

    with torch.inference_mode():
        write()
        seconds = [timed(write) for _ in range(REPEATS)]
    return {"seconds": seconds, "tokens": written}


def main() -> None:
    """Prints a table, and writes what is in it as JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.generation")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at a time")
    parser.add_argument("--new", type=int, default=256, help="tokens written after each prompt")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="processes per side")
    parser.add_argument("--json", type=Path, help="file to write the figures into")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        (batch,) = options.batches
        print(json.dumps(measure(options.measure, batch, options.new, getattr(torch, options.dtype))))
        return
    print(f"H 512, I 1792, 4 layers, 8 experts, vocabulary 32000, {options.dtype}, {machine()}")
    print(f"prompts of {PROMPT} tokens, {options.new} new ones, {options.rounds} x {REPEATS} times")
    rows: list[dict[str, Any]] = []
    for batch in options.batches:
        words = ["--batches", str(batch), "--new", str(options.new), "--dtype", options.dtype]
        found = in_turns("bench.generation", SIDES, options.rounds, words)
        best = min(median(found[side], "seconds") for side in SIDES[1:])
        for side, runs in found.items():
            seconds = median(runs, "seconds")
            alike = [a == b for run in runs for a, b in zip(run["tokens"], found["ours"][0]["tokens"], strict=True)]
            row = {"side": side, "batch": batch, "tokens_per_second": batch * options.new / seconds}
            rows.append(row | {"times_best_peer": best / seconds, "alike": sum(alike) / len(alike)})
            print(
                f"batch {batch}{side:>12}{batch * options.new / seconds:>8.1f} tokens/s"
                f"{best / seconds:>7.2f} x the best peer   spread {spread(runs, 'seconds'):.0%},"
                f" {sum(alike)} of {len(alike)} texts as ours",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
