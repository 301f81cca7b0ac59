"""Runs runs as `many_runs` does, with faults in them: `python -m tests.multiprocess.faulty_steps JOBS.json`.

A job also has `faults`: for a step, the rank that it hits, null for all, and what is done there. What each process held
before and after every step is compared, bit by bit: which changed nothing goes into JOBS.RANK.unchanged, job after job.
"""

import json
import os
import sys
from pathlib import Path

import torch

import train.loop
from mixtral.weights.names import unwrapped
from tests.multiprocess.many_runs import run, stay_together
from train.guard import Guard, Skip

HIT = {
    "gradient": "model.norm.weight",
    "expert": "model.layers.1.mlp.experts.down_proj",
    "unseen": "model.layers.0.self_attn.q_proj.weight",
}
RANK = int(os.environ.get("RANK", "0"))
train_step, learning_rate, objective_parts = train.loop.train_step, train.loop.learning_rate, train.loop.objective_parts
step_now = [0]
faults: dict[int, tuple[int | None, str]] = {}
unchanged: list[int] = []


def fault_now():
    rank, kind = faults.get(step_now[0], (None, ""))
    return kind if rank in (RANK, None) else ""


def remember_step(step, *inputs):
    step_now[0] = step
    return learning_rate(step, *inputs)


def parts_with_faults(output, *inputs):
    parts = objective_parts(output, *inputs)
    if fault_now() == "loss":
        parts.cross_entropy = parts.cross_entropy * torch.nan
    return parts


def faults_of_another_sum(engine):
    engine._gradients()[0].view(-1)[3] = torch.nan
    return type(engine).faults(engine)


def faults_beside_a_flipped_bit(engine, name):
    flat = dict(engine.replicas())[name].detach().view(-1)
    flat.view({2: torch.int16, 4: torch.int32}[flat.element_size()])[7] ^= 1 << 3
    return type(engine).faults(engine)


def held(engine):
    """Copies of all that a step may change, on this process."""
    tensors = [tensor for _, tensor in engine.local("weights")] + [item.values for item in engine.state.slices()]
    return [tensor.detach().clone() for tensor in tensors]


def watched_step(engine, *inputs):
    before, kind = held(engine), fault_now()
    hooks = []
    if kind in HIT:
        named = {unwrapped(name): parameter for name, parameter in engine.module.named_parameters()}
        hooks.append(named[HIT[kind]].register_hook(lambda gradient: gradient * torch.inf))
    if kind == "unseen":  # by all but the reductions of the engine
        engine.faults = lambda: torch.zeros(2, dtype=torch.bool)
    if kind == "reduced":  # what should be the same on all processes is not
        engine.faults = lambda: faults_of_another_sum(engine)
    if kind.startswith("flip "):
        engine.faults = lambda: faults_beside_a_flipped_bit(engine, kind.removeprefix("flip "))
    (guard,) = (one for one in inputs if isinstance(one, Guard))
    if kind == "spike":  # a gradient like any other
        guard.judge = lambda *_: Skip("the loss is a spike", (0, 1))
        guard.alarm = "the loss is a spike"
    result = train_step(engine, *inputs)
    guard.__dict__.pop("judge", None)
    for hook in hooks:
        hook.remove()
    engine.__dict__.pop("faults", None)
    if all(torch.equal(mine, other) for mine, other in zip(before, held(engine), strict=True)):
        unchanged.append(step_now[0])
    return result


if __name__ == "__main__":
    path = Path(sys.argv[1])
    stay_together()
    train.loop.train_step, train.loop.learning_rate = watched_step, remember_step
    train.loop.objective_parts = parts_with_faults
    codes, found = [], []
    for job in json.loads(path.read_text()):
        faults.clear()
        unchanged.clear()
        faults.update({int(step): fault for step, fault in job.pop("faults", {}).items()})
        codes.append(run(**job))
        found.append(list(unchanged))
    path.with_suffix(f".{RANK}.unchanged").write_text(json.dumps(found))
    if RANK == 0:
        path.with_suffix(".codes").write_text(json.dumps(codes))
