"""A whole training step against transformers' Mixtral: speed, memory and losses, from the same weights and rows.

usage: python -m bench.step [--rows 2] [--length 1024] [--masters] [--rounds 3] [--steps 20] [--profile] [--json FILE]

Every side runs forward, backward, clipping at 1 and AdamW: on bf16 parameters, or with --masters on fp32 copies beside
them, by the trainer's own class. Speed is the median of the steps after the first; memory is the most that the steps
took above the weights; kept is what operations save for backward.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.instruments import (
    DEVICE,
    PeakMemory,
    in_turns,
    kept_for_backward,
    machine,
    median,
    product_rate,
    spread,
    timed,
)
from train.optim import MasterWeights, global_norm

SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
}
ATTENTION = "tiled" if DEVICE == "cpu" else "sdpa"  # of ours; the peers' best is sdpa
SIDES = ("ours", "eager", "grouped_mm")
LR = 1e-4
Loss = Callable[[Tensor], Tensor]


def ours(dtype: torch.dtype) -> tuple[nn.Module, Loss]:
    """Builds our model, and what computes its loss as the training loop does."""
    from mixtral import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(MixtralConfig(**SIZES, attn_implementation=ATTENTION)).to(dtype)
    return model, lambda ids: model(ids, labels=ids, skip_logits=True, use_cache=False).loss


def theirs(dtype: torch.dtype, implementation: str) -> tuple[nn.Module, Loss]:
    """The same of transformers."""
    import transformers

    config = transformers.MixtralConfig(**SIZES, experts_implementation=implementation)
    model = transformers.MixtralForCausalLM(config).to(dtype)
    return model, lambda ids: model(ids, labels=ids, use_cache=False).loss


def start_alike(model: nn.Module) -> None:
    """Gives a model of any side the same weights."""
    from mixtral import MixtralConfig
    from train.model import initial_weights

    config = MixtralConfig(**SIZES)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in initial_weights(config, 0, range(config.num_local_experts)):
            parameters[name].copy_(value)


def products_flops(tokens: int) -> float:
    """Multiplications and additions of a step's matrix products, attention's scores left out."""
    hidden, inner, layers = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_hidden_layers"]
    head = hidden // SIZES["num_attention_heads"]
    attention = hidden * head * 2 * (SIZES["num_attention_heads"] + SIZES["num_key_value_heads"])
    weights = layers * (attention + 2 * 3 * hidden * inner) + hidden * SIZES["vocab_size"]
    return 3.0 * 2 * weights * tokens


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains in this fresh process; returns seconds and losses of the steps, and bytes."""
    model, loss_of = ours(torch.bfloat16) if side == "ours" else theirs(torch.bfloat16, side)
    start_alike(model)
    model.to(DEVICE).train()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, SIZES["vocab_size"], (options.steps, options.rows, options.length), generator=generator)
    losses: list[float] = []
    tokens = options.rows * options.length
    with PeakMemory() as memory:
        masters = MasterWeights(model) if options.masters else None
        trained = list(model.parameters() if masters is None else masters.by_name.values())
        optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

        def step(ids: Tensor) -> None:
            loss = loss_of(ids)
            loss.backward()
            if masters is None:
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            else:
                norm = global_norm(masters.gradients())
                for part in masters.parts():
                    torch.nn.utils.clip_grads_with_norm_(part, 1.0, norm)
                    optimizer.step()
                masters.publish()
            losses.append(loss.item())

        seconds = [timed(functools.partial(step, ids.to(DEVICE))) for ids in rows]
    with kept_for_backward(model) as kept:
        loss_of(rows[0].to(DEVICE))
    if options.profile:
        profile(lambda: step(rows[0].to(DEVICE)))
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    rate = product_rate(((2 * tokens, hidden, 2 * inner), (2 * tokens, inner, hidden)), torch.bfloat16)
    return {
        "seconds": seconds[1:],
        "share": [products_flops(tokens) / second / rate for second in seconds[1:]],
        "memory": memory.bytes,
        "kept": kept[0] / tokens,
        "losses": losses[: options.steps],
        "rate": rate,
    }


def profile(step: Callable[[], None]) -> None:
    """Prints where the time of a step goes, to stderr."""
    import sys

    with torch.profiler.profile(acc_events=True) as seen:
        step()
    print(seen.key_averages().table(sort_by=f"self_{DEVICE}_time_total", row_limit=25), file=sys.stderr)


def main() -> None:
    """Prints a table, and writes what is in it as JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.step")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--masters", action="store_true", help="keep fp32 copies of the weights")
    parser.add_argument("--rounds", type=int, default=3, help="processes per side")
    parser.add_argument("--steps", type=int, default=20, help="steps per process")
    parser.add_argument("--profile", action="store_true", help="print where the time of one more step goes")
    parser.add_argument("--json", type=Path, help="file to write the figures into")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    words = ["--rows", str(options.rows), "--length", str(options.length), "--steps", str(options.steps)]
    words += [f"--{name}" for name in ("masters", "profile") if getattr(options, name)]
    kind = "bf16 with fp32 masters" if options.masters else "bf16"
    print(f"H 512, I 1792, 4 layers, 8 experts, vocabulary 32000, {kind}, AdamW, {machine()}")
    print(f"{options.rows} x {options.length} tokens, {options.rounds} x {options.steps} steps")
    found = in_turns("bench.step", SIDES, options.rounds, words)
    best = min(median(found[side], "seconds") for side in SIDES[1:])
    rows = []
    for side, runs in found.items():
        row: dict[str, Any] = {name: median(runs, name) for name in ("seconds", "share", "memory", "kept")}
        apart = [abs(a - b) for a, b in zip(runs[0]["losses"], found["ours"][0]["losses"], strict=True)]
        row |= {"side": side, "times_best_peer": best / row["seconds"], "losses": runs[0]["losses"]}
        rows.append(row)
        print(
            f"{side:>12}{options.rows * options.length / row['seconds']:>8.0f} tokens/s"
            f"{row['times_best_peer']:>7.2f} x the best peer{row['share']:>7.0%} of the products"
            f"{row['memory'] / 2**20:>8.0f} MiB above the weights{row['kept'] / 1024:>8.1f} KiB kept a token"
            f"   spread {spread(runs, 'seconds'):.0%}, last loss {runs[0]['losses'][-1]:.4f},"
            f" at most {max(apart):.4f} from ours"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
