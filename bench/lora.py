"""One LoRA step, rank 16 on attention and experts, against PEFT's `target_parameters` on transformers' Mixtral.

Both adapt the same layers of a model of the same sizes, and take the same AdamW step on the adapters. Every
measurement is a process of its own, and the two take turns; memory is that of the first step, above the weights.

usage: python -m bench.lora [--rounds 3] [--repeats 3] [--experts eager] [--dtype bfloat16] [--json FILE]
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.instruments import DEVICE, PeakMemory, in_turns, machine, median, timed
from bench.step import ATTENTION, SIZES

ROWS, LENGTH, RANK, SCALE = 2, 1024, 16, 2.0
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
Step = Callable[[Tensor], Tensor]


def ours(dtype: torch.dtype, _: str) -> tuple[nn.Module, Step]:
    """Builds our model with adapters, and what computes its loss."""
    from mixtral import MixtralConfig
    from mixtral.weights.adapters import Adapter
    from train.lora import adapt, initial_adapters
    from train.model import empty_model, initial_weights
    from train.parallel.engine import fill

    config = MixtralConfig(**SIZES, attn_implementation=ATTENTION)
    adapter, experts = Adapter(RANK, SCALE, ADAPTED, experts=True), range(config.num_local_experts)
    model = empty_model(config)
    adapt(model, adapter)

    def values() -> Iterator[tuple[str, Tensor]]:
        yield from initial_weights(config, 0, experts)
        yield from initial_adapters(config, adapter, 0, experts)

    list(fill(model, values(), dtype))
    return model, lambda ids: model(ids, labels=ids, skip_logits=True, use_cache=False).loss


def theirs(dtype: torch.dtype, experts: str) -> tuple[nn.Module, Step]:
    """Builds transformers' model with PEFT's adapters, and what computes its loss."""
    import peft
    import transformers

    config = transformers.MixtralConfig(**SIZES, dtype=dtype)
    if experts != "default":
        config._experts_implementation = experts
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    described = peft.LoraConfig(
        r=RANK,
        lora_alpha=int(SCALE * RANK),
        target_modules=list(ADAPTED),
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    adapted = peft.get_peft_model(model, described, autocast_adapter_dtype=False)
    return adapted, lambda ids: adapted(ids, labels=ids, use_cache=False).loss


SIDES = {"ours": ours, "peft": theirs}


def measure(side: str, dtype: torch.dtype, repeats: int, experts: str) -> dict[str, float]:
    """Takes steps in this fresh process: median seconds of a step, and peak bytes of the first above the weights."""
    torch.manual_seed(0)
    model, loss_of = SIDES[side](dtype, experts)
    model.to(DEVICE).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, SIZES["vocab_size"], (ROWS, LENGTH), device=DEVICE)

    def step() -> None:
        loss_of(ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with PeakMemory() as memory:
        step()
    seconds = statistics.median(timed(step) for _ in range(repeats))
    return {"seconds": seconds, "bytes": memory.bytes, "trained": sum(map(torch.Tensor.numel, trained))}


def compare(options: argparse.Namespace) -> dict[str, float]:
    """Runs the two in turns; returns the medians over the rounds."""
    words = ["--repeats", str(options.repeats), "--experts", options.experts, "--dtype", options.dtype]
    found = in_turns("bench.lora", SIDES, options.rounds, words)
    assert found["ours"][0]["trained"] == found["peft"][0]["trained"], "the two do not train the same"
    figures = {
        f"{side}_{figure}": median(runs, figure) for side, runs in found.items() for figure in ("seconds", "bytes")
    }
    return figures | {
        "times_faster": figures["peft_seconds"] / figures["ours_seconds"],
        "share_of_memory": figures["ours_bytes"] / figures["peft_bytes"],
    }


def main() -> None:
    """Prints a table, and writes what is in it as JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.lora")
    parser.add_argument("--rounds", type=int, default=3, help="processes per side")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps per process, after the first")
    parser.add_argument("--experts", default="default", help="transformers' experts: default, eager, grouped_mm")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="file to write the figures into")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, getattr(torch, options.dtype), options.repeats, options.experts)))
        return
    sizes = "H 512, I 1792, 4 layers, 8 experts, vocabulary 32000"
    setting = f"{sizes}, {options.dtype}, {ROWS} x {LENGTH} tokens, rank {RANK}, experts of transformers: "
    setting += f"{options.experts}, {machine()}"
    print(f"{setting}, medians of {options.rounds} x {options.repeats}")
    row = compare(options)
    for side in SIDES:
        rate = ROWS * LENGTH / row[f"{side}_seconds"]
        print(f"{side:>6}{rate:>12,.0f} tokens/s{row[f'{side}_bytes'] / 2**20:>10,.0f} MiB above the weights")
    print(f"ours: {row['times_faster']:.2f} x the speed, {row['share_of_memory']:.2f} x the memory above the weights")
    if options.json:
        options.json.write_text(json.dumps({"setting": setting, "figures": row}, indent=2) + "\n")


if __name__ == "__main__":
    main()
