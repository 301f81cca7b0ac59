"""What the planner says of a run's memory and time, beside what runs on this machine need.

usage: python -m bench.plan [--steps N] [--only WORD] [--json FILE]

Every run trains in processes of its own, on random tokens, two documents a row, in fp32. Memory is the highest resident
set of the process that has the most, from its start on, less that of an interpreter with the same libraries: a run of a
tiny model in the same layout, less what the planner says of that. Time is the processor's, of the process that needs
most: the median of the steps after the first, beside what a calibration at the start predicts. So other work on the
machine is not counted, and neither is waiting for messages.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.instruments import resident

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "max_position_embeddings": 2048,
}
TINY = {"vocab_size": 256, "hidden_size": 48, "intermediate_size": 32}
LORA = ("lora.rank=16", "lora.dropout=0.05")
MEAN_MEMORY, WORST_MEMORY, MEAN_TIME = 0.05, 0.12, 0.15


class Case(NamedTuple):
    """One configuration.

    Attributes:
        processes: that train.
        length: tokens of a row, of which a process has two.
        words: the layout.
        skewed: whether every token goes to the same two experts.
    """

    processes: int
    length: int
    words: tuple[str, ...] = ()
    skewed: bool = False

    def __str__(self) -> str:
        words = [
            word.replace("parallel.", "").replace("train.gradient_accumulation_steps", "accumulated")
            for word in self.words
        ]
        return (
            f"{self.processes} x, {self.length}: {' '.join(words) or 'replicated'}{', skewed' if self.skewed else ''}"
        )


def split(zero: int, expert: int = 2) -> tuple[str, ...]:
    """The words of a layout."""
    return (f"parallel.zero={zero}", f"parallel.expert={expert}")


CASES = (
    Case(1, 256),
    Case(1, 1024),
    Case(1, 1024, ("train.recompute=layers",)),
    Case(1, 256, LORA),
    Case(1, 256, split(2, 1)),
    Case(2, 256),
    Case(2, 256, split(1, 1)),
    Case(2, 256, split(1), skewed=True),
    Case(2, 256, split(2)),
    Case(2, 1024, split(2), skewed=True),
    Case(2, 256, (*split(2), "train.gradient_accumulation_steps=2")),
    Case(2, 1024, (*split(1), "train.recompute=layers")),
    Case(2, 256, split(3, 1)),
    Case(2, 1024, split(3), skewed=True),
    Case(2, 256, (*split(2), *LORA)),
    Case(4, 256, split(1, 1)),
    Case(4, 256, split(2)),
    Case(4, 256, split(3)),
)


def words_of(case: Case, sizes: dict[str, int]) -> list[str]:
    """Gives what composes a case's run."""
    words = [f"model.{name}={value}" for name, value in sizes.items()]
    words += ["recipe=pretrain_tiny", "train.precision=fp32", "evaluate.sample_tokens=0", "optim.eps=1e-8"]
    return [*words, f"data.sequence_length={case.length}", "train.micro_batch_size=2", *case.words]


def measure(case: Case, sizes: dict[str, int], steps: int) -> dict[str, Any]:
    """Trains on this rank; returns its peak, the seconds of each step and the rows of each expert per token."""
    import torch

    from train.compose import compose
    from train.data.packing import make_row, stack
    from train.guard import Guard
    from train.loop import train_step
    from train.lora import trainable_model, with_adapters
    from train.model import model_config, starting_weights
    from train.objective import Coefficients, uniform_load
    from train.parallel.layout import open_engine

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    config = compose(words_of(case, sizes)).config
    engine = open_engine(config)
    model = trainable_model(config, model_config(config.model, None))
    engine.prepare(model, with_adapters(starting_weights(config, model.config), config, model.config))
    if case.skewed:
        bias = torch.zeros(config.model.num_local_experts)
        bias[:2] = 2.0
        for layer in engine.module.model.layers:
            layer.mlp.gate.bias_E = bias
    generator, seconds, half = torch.Generator().manual_seed(engine.rank), [], case.length // 2
    load_LE, coefficients = uniform_load(model.config, engine.device), Coefficients.of(config)
    guard = Guard(config.train)
    for _ in range(1 + steps):
        ids = torch.randint(0, config.model.vocab_size, (2, case.length + 1), generator=generator).numpy()
        documents = [((row[:half], row[1 : half + 1]), (row[half:-1], row[half + 1 :])) for row in ids]
        batches = [stack([make_row(list(both), case.length) for both in documents])]
        engine.gather(None)  # all begin together
        started = time.process_time()
        result = train_step(
            engine, batches * config.train.gradient_accumulation_steps, 1e-4, coefficients, load_LE, guard
        )
        seconds.append(time.process_time() - started)
    assert result.load is not None, "the step was skipped"
    measured = {"peak": resident("VmHWM"), "seconds": seconds[1:], "load": result.load.tolist()}
    engine.close(wait=True)
    return measured


def launch(case: Case, sizes: dict[str, int], steps: int) -> list[dict[str, Any]]:
    """Runs a case's processes; returns what each measured."""
    from tests.warm import launch_ranks

    described = json.dumps([list(case), sizes, steps])
    done = launch_ranks(case.processes, "bench.plan", "--measure", described, timeout=900)
    found = [json.JSONDecoder().raw_decode(said)[0] for said in done.stdout.split("measured ")[1:]]
    if done.returncode != 0 or len(found) != case.processes:
        raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
    return found


def predicted(case: Case, sizes: dict[str, int], load_LE: list[list[float]], device: Any) -> tuple[Any, Any]:
    """Gives what the planner says of a case's memory and time, with the load that it had."""
    from train.compose import compose
    from train.plan.layout import Layout
    from train.plan.load import skew_of_step
    from train.plan.memory import memory_of
    from train.plan.seconds import step_of

    layout = Layout(compose(words_of(case, sizes)).config, case.processes, on_gpu=False)
    skew = skew_of_step([[rows / sum(layer) for rows in layer] for layer in load_LE], layout.expert_ranks)
    return memory_of(layout, skew), step_of(layout, dataclasses.replace(device, per_host=case.processes), skew)


def both(case: Case, steps: int) -> dict[str, Any]:
    """Runs a case with a tiny model and with its own; returns what their processes measured."""
    return {"tiny": launch(case, SIZES | TINY, 1), "ranks": launch(case, SIZES, steps)}


def compared(case: Case, measured: dict[str, Any], device: Any) -> dict[str, Any]:
    """Sets what was measured of a case beside what the planner says."""
    tiny, ranks = measured["tiny"], measured["ranks"]
    bare = max(rank["peak"] for rank in tiny) - predicted(case, SIZES | TINY, tiny[0]["load"], device)[0].peak
    memory, step = predicted(case, SIZES, ranks[0]["load"], device)
    return {
        "interpreter": bare,
        "memory": max(rank["peak"] for rank in ranks) - bare,
        "planned memory": memory.peak,
        "moment": memory.moment,
        "seconds": max(statistics.median(rank["seconds"]) for rank in ranks),
        "planned seconds": step.seconds,
        "spread": max(max(rank["seconds"]) / min(rank["seconds"]) - 1 for rank in ranks),
        "parts": step.parts,
    }


def calibrated() -> dict[str, Any]:
    """Measures this machine as plan.calibrate does."""
    from train.parallel.launcher import run_processes

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "calibration.json"
        done = run_processes(2, "train.parallel.calibrate", str(target))
        if not target.is_file():
            raise SystemExit(f"the calibration failed:\n{done.stderr[-3000:]}")
        described: dict[str, Any] = json.loads(target.read_text())
        return described


def device_of(described: dict[str, Any]) -> Any:
    """Builds the planner's device of a calibration."""
    from train.plan.hardware import Device, Efficiency

    return Device(**{**described, "efficiency": Efficiency(**described["efficiency"])})


def main() -> None:
    """Measures every case, or takes what was measured before, and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run")
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--json", type=Path, help="file for what is measured; what it holds is not measured again")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        case, sizes, steps = json.loads(options.measure)
        case[2] = tuple(case[2])
        print("measured " + json.dumps(measure(Case(*case), sizes, steps)), flush=True)
        return
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    kept: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {}
    kept.setdefault("calibration", None)
    kept["calibration"] = kept["calibration"] or calibrated()
    device, rows = device_of(kept["calibration"]), []
    print(
        f"{'':58}{'interpreter':>12}{'memory':>9}{'planned':>9}{'error':>8}{'time':>9}{'planned':>9}{'error':>8}"
        "  peak at"
    )
    for case in CASES:
        if options.only not in str(case):
            continue
        if str(case) not in kept:
            kept[str(case)] = both(case, options.steps)
            if options.json:
                options.json.write_text(json.dumps(kept) + "\n", encoding="utf-8")
        row = compared(case, kept[str(case)], device)
        rows.append(row)
        sizes_of = (row["interpreter"], row["memory"], row["planned memory"])
        cells = "".join(f"{size / 1e6:>{width}.0f} M" for size, width in zip(sizes_of, (10, 7, 7), strict=True))
        times = f"{row['seconds']:>7.2f} s{row['planned seconds']:>7.2f} s"
        errors = [row[f"planned {name}"] / row[name] - 1 for name in ("memory", "seconds")]
        print(f"{case!s:58}{cells}{errors[0]:>+8.1%}{times}{errors[1]:>+8.1%}  {row['moment']}", flush=True)
    for name, bounds in (("memory", (MEAN_MEMORY, WORST_MEMORY)), ("seconds", (MEAN_TIME, math.inf))):
        errors = [abs(row[f"planned {name}"] / row[name] - 1) for row in rows]
        held = (
            "" if statistics.mean(errors) <= bounds[0] and max(errors) <= bounds[1] else ", which is more than allowed"
        )
        print(f"{name}: mean error {statistics.mean(errors):.1%}, worst {max(errors):.1%}{held}")
    print(f"spread of a process's steps: {statistics.median(row['spread'] for row in rows):.0%} at the median")


if __name__ == "__main__":
    main()
