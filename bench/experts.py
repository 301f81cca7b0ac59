"""The expert block alone, forward and backward, against transformers' and against the machine's own matrix products.

usage: python -m bench.experts [--tokens 2048 8192] [--rounds 3] [--repeats 7] [--dtype bfloat16] [--json FILE]

All sides get the same weights, tokens and routing, and give the gradients of all of them. The share is that of the
fastest of the block's products on all rows at once, alone and warm. Kept is what operations save for backward, of the
block without its router.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.instruments import DEVICE, in_turns, kept_for_backward, machine, median, product_rate, spread, timed

HIDDEN, INNER, EXPERTS, TOP_K = 512, 1792, 8, 2
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
}
SIDES = ("ours", "eager", "grouped_mm")
Block = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours() -> tuple[nn.Module, Block]:
    """Builds our experts, and what sends tokens through them by weights and indices."""
    from mixtral import MixtralConfig
    from mixtral.moe import Experts, Routing, dispatch_local

    experts = Experts(MixtralConfig(**SIZES))

    def block(x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        logits_TE = x_TH[:, :EXPERTS]  # only their width is read
        return dispatch_local(x_TH, Routing(logits_TE, weights_TK, experts_TK), experts)

    return experts, block


def theirs(implementation: str) -> tuple[nn.Module, Block]:
    """The same of transformers."""
    import transformers
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts = MixtralExperts(transformers.MixtralConfig(**SIZES, experts_implementation=implementation))
    return experts, lambda x_TH, weights_TK, experts_TK: experts(x_TH, experts_TK, weights_TK)


def measure(side: str, tokens: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Times the side in this fresh process; returns seconds, bytes kept of a token, and the share of the products."""
    experts, block = ours() if side == "ours" else theirs(side)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.02).to(DEVICE, dtype)
    x_TH = torch.randn(tokens, HIDDEN, generator=generator).to(DEVICE, dtype).requires_grad_()
    chosen_TK, experts_TK = torch.randn(tokens, EXPERTS, generator=generator).softmax(dim=-1).topk(TOP_K)
    weights_TK = (chosen_TK / chosen_TK.sum(dim=-1, keepdim=True)).to(DEVICE).requires_grad_()
    experts_TK, upstream_TH = experts_TK.to(DEVICE), torch.randn(tokens, HIDDEN, generator=generator).to(DEVICE, dtype)

    def run() -> None:
        for tensor in (x_TH, weights_TK, *experts.parameters()):
            tensor.grad = None
        block(x_TH, weights_TK, experts_TK).backward(upstream_TH)

    with kept_for_backward(experts) as kept:
        out_TH = block(x_TH, weights_TK, experts_TK)
    del out_TH
    run()
    seconds = [timed(run) for _ in range(repeats)]
    rows = tokens * TOP_K
    inward, outward = (rows, HIDDEN, 2 * INNER), (rows, INNER, HIDDEN)
    gradients = (2 * INNER, rows, HIDDEN), (HIDDEN, rows, INNER), (rows, 2 * INNER, HIDDEN)
    rate = product_rate((inward, outward, *gradients), dtype)
    assert x_TH.grad is not None
    return {
        "seconds": seconds,
        "kept": kept[0] / tokens,
        "rate": rate,
        "share": [3 * 2 * 3 * HIDDEN * INNER * rows / second / rate for second in seconds],
        "gradient": x_TH.grad.float().norm().item(),
    }


def main() -> None:
    """Prints a table, and writes what is in it as JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.experts")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], help="tokens of a pass")
    parser.add_argument("--rounds", type=int, default=3, help="processes per side")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes per process, after the first")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="file to write the figures into")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        (tokens,) = options.tokens
        print(json.dumps(measure(options.measure, tokens, getattr(torch, options.dtype), options.repeats)))
        return
    sizes = f"H {HIDDEN}, I {INNER}, {EXPERTS} experts, top-{TOP_K}"
    print(f"{sizes}, {options.dtype}, {machine()}, {options.rounds} x {options.repeats}")
    rows = []
    for tokens in options.tokens:
        words = ["--tokens", str(tokens), "--repeats", str(options.repeats), "--dtype", options.dtype]
        found = in_turns("bench.experts", SIDES, options.rounds, words)
        print(f"{tokens} tokens; products alone: {max(run['rate'] for run in found['ours']) / 1e9:.0f} GFLOP/s")
        best = min(median(found[side], "seconds") for side in SIDES[1:])
        for side, runs in found.items():
            row: dict[str, Any] = {name: median(runs, name) for name in ("seconds", "share", "kept", "gradient")}
            row |= {"tokens": tokens, "side": side, "times_best_peer": best / row["seconds"]}
            print(
                f"{side:>12}{row['seconds'] * 1e3:>9.1f} ms{row['share']:>7.0%} of the products"
                f"{row['times_best_peer']:>7.2f} x the best peer{row['kept']:>9.0f} bytes kept a token, layer"
                f"   spread {spread(runs, 'seconds'):.0%}, |gradient| {row['gradient']:.4f}",
                flush=True,
            )
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
