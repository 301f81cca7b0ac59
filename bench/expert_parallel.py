"""One training step on two processes: our expert parallelism, DeepSpeed's AutoEP, and ZeRO-3 with whole experts.

Beside them, a process of ours that trains alone on the rows of one of the two, with all experts and without DeepSpeed.

usage: python -m bench.expert_parallel [--rounds N] [--steps N] [--precision bf16|fp32] [--json FILE]

Peers train transformers' Mixtral from the same weights on the same tokens. Every round starts the processes of each
side afresh, in turns. Speed is the median of the timed steps; memory is a process's peak resident set in them, above
what it was before the model; bytes are what a rank hands to the collectives of one step, those of a layer where a
layer has them. DeepSpeed 0.19.8 needs a patch, here, to replace the layers of transformers 5.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.instruments import resident

PROCESSES, ROWS, LENGTH, LAYERS = 2, 2, 1024, 4
MODEL = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "max_position_embeddings": LENGTH,
}
ALONE = "ours, one process"
SIDES = {
    "ours, experts over 2, ZeRO-1": ("ours", "parallel.expert=2", "parallel.zero=1"),
    "DeepSpeed AutoEP over 2, ZeRO-1": ("peer", "1", "2"),
    "transformers, ZeRO-3": ("peer", "3", "1"),
    ALONE: ("ours", "parallel.expert=1", "parallel.zero=0"),
}
LR, WARM_UP = 1e-4, 1
COLLECTIVES = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast")


def deepspeed_settings(stage: int, experts: int, precision: str) -> dict[str, Any]:
    """What a user of DeepSpeed would write for the peers."""
    adam = {"lr": LR, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": precision == "bf16"},
        "optimizer": {"type": "AdamW", "params": adam},
        "steps_per_print": 2**31,
    }
    if experts > 1:
        settings["expert_parallel"] = {"enabled": True, "autoep_size": experts, "preset_model": "mixtral"}
    return settings


def count_bytes() -> Counter[str]:
    """Counts what is handed to torch's collectives from now on, by collective; integers are counted as metadata."""
    import torch.distributed as dist

    counted: Counter[str] = Counter()

    def watch(name: str) -> None:
        original = getattr(dist, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            sent = arguments[1] if name.endswith(("single", "tensor")) and len(arguments) > 1 else None
            sent = sent if sent is not None else named.get("input", named.get("input_tensor"))
            tensor = sent if sent is not None else (arguments[0] if arguments else named["tensor"])
            counted[name if tensor.is_floating_point() else "metadata"] += tensor.numel() * tensor.element_size()
            return original(*arguments, **named)

        setattr(dist, name, counting)

    for name in COLLECTIVES:
        watch(name)
    return counted


def configuration(precision: str, *words: str) -> Any:
    """Composes the run that is measured."""
    from train.compose import compose

    sizes = [f"model.{name}={value}" for name, value in MODEL.items()]
    words += ("recipe=pretrain_tiny", f"data.sequence_length={LENGTH}", f"train.micro_batch_size={ROWS}")
    words += (f"train.precision={precision}", "model.attn_implementation=tiled", "evaluate.sample_tokens=0")
    words += ("optim.eps=1e-8", "optim.weight_decay=0.1")
    return compose([*words, *sizes]).config


def our_step(precision: str, *words: str) -> Callable[[Any], float]:
    """Builds our engine and model; returns what trains on a rank's rows and gives the cross-entropy."""
    import numpy as np
    import torch

    from train.data.packing import make_row, stack
    from train.guard import Guard
    from train.loop import train_step
    from train.model import empty_model, model_config, starting_weights
    from train.objective import Coefficients, uniform_load
    from train.parallel.layout import open_engine

    config = configuration(precision, *words)
    engine = open_engine(config)
    model = empty_model(model_config(config.model, None))
    load_LE = uniform_load(model.config, engine.device)
    engine.prepare(model, starting_weights(config, model.config))

    def step(ids: torch.Tensor) -> float:
        rows = [make_row([(row[:-1], row[1:])], LENGTH) for row in np.asarray(ids)]
        result = train_step(engine, [stack(rows)], LR, Coefficients.of(config), load_LE, Guard(config.train))
        return float(result.parts.cross_entropy)

    return step


def peer_step(precision: str, stage: str, experts: str) -> Callable[[Any], float]:
    """Builds DeepSpeed's engine on transformers' Mixtral with our starting weights; returns what trains on rows."""
    import deepspeed
    import torch
    import transformers

    from train.model import initial_weights, model_config

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built for minutes, of use to inference
    deepspeed.init_distributed("gloo")
    let_autoep_replace_layers()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    config = transformers.MixtralConfig(**MODEL, use_cache=False, attn_implementation="sdpa")
    model = transformers.MixtralForCausalLM(config).to(dtype)
    values = initial_weights(model_config(configuration(precision).model, None), 0, range(MODEL["num_local_experts"]))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values:
            parameters[name].copy_(value)
    del parameters
    engine, *_ = deepspeed.initialize(model=model, config=deepspeed_settings(int(stage), int(experts), precision))

    def step(ids: torch.Tensor) -> float:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().double()
        torch.distributed.all_reduce(total)
        return float(total) / PROCESSES

    return step


def let_autoep_replace_layers() -> None:
    """Lets transformers' registry of recorded outputs be read as the dictionary that DeepSpeed takes it for."""
    from transformers.utils import output_capturing

    kind: Any = type(output_capturing._CAN_RECORD_REGISTRY)

    def name_of(model: Any) -> str:
        return model if isinstance(model, str) else str(model.__class__)

    def get(self: Any, model: Any, default: Any = None) -> Any:
        found = dict.get(self, name_of(model), default)
        return {} if found is None and not isinstance(model, str) else found

    kind.get = get
    kind.__setitem__ = lambda self, model, outputs: dict.__setitem__(self, name_of(model), outputs)


def measure(kind: str, words: list[str], steps: int, precision: str) -> dict[str, Any]:
    """Trains on this rank; returns seconds and losses of the timed steps, memory, and bytes of the last one."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    for library in ("deepspeed", "transformers"):
        importlib.import_module(library)  # their memory is no side's
    before = resident("VmRSS")
    counted = count_bytes()
    build: Callable[..., Callable[[Any], float]] = our_step if kind == "ours" else peer_step
    step = build(precision, *words)
    generator = torch.Generator().manual_seed(1)
    rank = int(os.environ["RANK"])
    extra = 1 if kind == "ours" else 0  # the label after the last token; a peer shifts inside the row
    seconds, losses = [], []
    meet = torch.distributed.barrier if torch.distributed.is_initialized() else lambda: None
    for number in range(WARM_UP + steps):
        ids = torch.randint(0, MODEL["vocab_size"], (PROCESSES * ROWS, LENGTH + 1), generator=generator)
        mine = ids[rank * ROWS : (rank + 1) * ROWS, : LENGTH + extra]
        meet()
        counted.clear()
        started = time.perf_counter()
        losses.append(step(mine))
        meet()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - started)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: loading is another bench
    return {"seconds": seconds, "losses": losses, "memory": resident("VmHWM") - before, "bytes": dict(counted)}


def processes(side: str) -> int:
    """Says how many processes a side has."""
    return 1 if side == ALONE else PROCESSES


def launch(side: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs one side's processes; returns what each measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes(side))]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "bench.expert_parallel"]
    command += ["--side", side, "--steps", str(options.steps), "--precision", options.precision]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = [json.JSONDecoder().raw_decode(said)[0] for said in done.stdout.split("measured ")[1:]]
    if done.returncode != 0 or len(found) != processes(side):
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return found


def summary(ranks: list[dict[str, Any]], count: int) -> dict[str, float]:
    """Puts the rounds of a side of `count` processes together: speed of the median step, the worst memory, bytes."""
    step = statistics.median(second for rank in ranks for second in rank["seconds"])
    sent = ranks[0]["bytes"]
    rows = sum(rank["bytes"].get("all_to_all_single", 0) for rank in ranks[:count]) / count
    others = sum(sent.get(name, 0) for name in COLLECTIVES[1:])
    return {
        "tokens_per_second": count * ROWS * LENGTH / step,
        "spread": (max(s for r in ranks for s in r["seconds"]) - min(s for r in ranks for s in r["seconds"])) / step,
        "memory": max(rank["memory"] for rank in ranks),
        "rows_per_layer": rows / LAYERS,
        "metadata_per_layer": sent.get("metadata", 0) / LAYERS,
        "others": others,
        "first_loss": ranks[0]["losses"][0],
        "last_loss": ranks[0]["losses"][-1],
    }


def main() -> None:
    """Measures the sides in turns and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.expert_parallel")
    parser.add_argument("--rounds", type=int, default=3, help="times that each side is started")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each start")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="with fp32 masters in both")
    parser.add_argument("--json", type=Path, help="file to write the figures into")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        kind, *words = SIDES[options.side]
        print("measured " + json.dumps(measure(kind, words, options.steps, options.precision)), flush=True)
        return
    print(f"{PROCESSES} processes of one thread, {ROWS} x {LENGTH} tokens for each, {options.precision}, AdamW")
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for turn in range(options.rounds):
        for side in sorted(SIDES, reverse=bool(turn % 2)):
            found[side] += launch(side, options)
    rows = {side: summary(ranks, processes(side)) for side, ranks in found.items()}
    first = next(iter(rows.values()))
    titles = ("tokens/s", "ours is", "spread", "memory", "rows/layer", "metadata", "the rest", "loss, first", "last")
    print(f"{'':34}" + "".join(f"{title:>13}" for title in titles))
    for side, row in rows.items():
        cells = [f"{row['tokens_per_second']:.0f}", f"{first['tokens_per_second'] / row['tokens_per_second']:.2f} x"]
        cells += [f"{row['spread']:.0%}", f"{row['memory'] / 1e9:.2f} GB", f"{row['rows_per_layer'] / 1e6:.2f} MB"]
        cells += [f"{row['metadata_per_layer'] / 1e3:.2f} kB", f"{row['others'] / 1e6:.0f} MB"]
        cells += [f"{row['first_loss']:.4f}", f"{row['last_loss']:.4f}"]
        print(f"{side:34}" + "".join(f"{cell:>13}" for cell in cells))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
