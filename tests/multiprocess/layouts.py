"""Layouts in which runs take up each other's checkpoints, and which transitions between them are tried."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from tests.train.helpers import metrics, read_json
from tests.warm import launch_ranks

STEP_3 = "checkpoints/step-00000003"
JOBS = 24  # in one launch
TOLERANCES = {"fp32": 2e-5, "bf16": 3e-2}  # of later figures


class Layout(NamedTuple):
    """How many processes train, over how many of them experts are split, and what DeepSpeed partitions."""

    processes: int
    expert: int
    zero: int

    def words(self) -> list[str]:
        """Words of a run; a step has 8 rows in each layout."""
        accumulation = 2 if self.processes < 4 and self.zero < 2 else 1
        return [
            f"parallel.expert={self.expert}",
            f"parallel.zero={self.zero}",
            f"train.gradient_accumulation_steps={accumulation}",
            f"train.micro_batch_size={8 // self.processes // accumulation}",
            *(["parallel.persistent_elements=500"] if self.zero == 3 else []),
        ]


Transition = tuple[Layout, Layout]
LAYOUTS = [
    Layout(processes, expert, zero)
    for processes, expert, zero in product((1, 2, 4), (1, 2), (0, 1, 2, 3))
    if processes % expert == 0 and (expert == 1 or zero > 0)
]
CHOSEN = {  # a covering set, see `pairs`, and what has more than two expert ranks
    "fp32": {
        (1, 1, 1): [(4, 1, 0), (2, 2, 1)],
        (1, 1, 2): [(4, 1, 2), (4, 2, 3)],
        (1, 1, 3): [(1, 1, 0), (2, 1, 3)],
        (2, 2, 2): [(4, 2, 3), (2, 1, 0), (4, 4, 2)],
        (4, 1, 0): [(1, 1, 3), (1, 1, 0)],
        (4, 2, 3): [(1, 1, 2), (1, 1, 3)],
        (4, 4, 2): [(2, 2, 2), (1, 1, 0)],
    },
    "bf16": {
        (1, 1, 0): [(2, 2, 1), (1, 1, 1)],
        (2, 1, 0): [(2, 2, 2), (4, 1, 2)],
        (2, 2, 1): [(4, 2, 1), (1, 1, 2)],
        (2, 1, 3): [(2, 1, 0), (4, 2, 1)],
        (4, 2, 1): [(2, 1, 3), (2, 2, 2)],
        (4, 1, 2): [(1, 1, 1), (4, 1, 0)],
    },
}
ADAPTERS = ["lora.rank=4", "lora.targets=q_proj,o_proj,lm_head,gate", "optim.lr=1e-2", "schedule.warmup_steps=0"]
ADAPTED = [
    (Layout(1, 1, 0), Layout(2, 2, 3)),
    (Layout(2, 2, 2), Layout(1, 1, 0)),
    (Layout(2, 2, 2), Layout(4, 1, 0)),
    (Layout(4, 2, 3), Layout(1, 1, 1)),
]
TRANSITIONS: dict[str, list[Transition]] = {
    precision: [(Layout(*one), Layout(*other)) for one, others in chosen.items() for other in others]
    for precision, chosen in CHOSEN.items()
}


def pairs(precision: str, transition: Transition) -> set[tuple[tuple[int, int | str], ...]]:
    """Lists the pairs of factors and their values that a transition has; factors are of both layouts, and precision."""
    return set(combinations(enumerate((precision, *transition[0], *transition[1])), 2))


def launch_jobs(folder, processes, jobs, timeout=280):
    """Runs jobs one after the other and returns their exit codes; 99 is a death that was asked for."""
    path = folder / f"{processes}.json"
    path.write_text(json.dumps(jobs))
    done = launch_ranks(processes, "tests.multiprocess.many_runs", str(path), timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return read_json(path.with_suffix(".codes")), done.stdout


def whole(checkpoint: Path) -> dict[str, np.ndarray]:
    """Puts the slices of a checkpoint together: `KIND/NAME` to a flat array. Each element must come exactly once."""
    sizes = {name: int(np.prod(shape)) for name, shape in read_json(checkpoint / "state.json")["parameters"].items()}
    found, seen = {}, {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        for key, values in load_file(path).items():
            name, start, stop = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", key).groups()
            size = sizes[name.partition("/")[2]]
            found.setdefault(name, np.full(size, np.nan, values.dtype))[int(start) : int(stop)] = values
            seen.setdefault(name, np.zeros(size, int))[int(start) : int(stop)] += 1
    assert all((count == 1).all() for count in seen.values())
    return found


def cross(
    folder: Path, corpus: Path, precision: str, transitions: Iterable[Transition], *words: str
) -> Iterator[list[str]]:
    """Goes from layout to layout, and yields for each transition what is not as it should be.

    A run saves after step 3 and goes on to step 6. One in another layout begins with that checkpoint and saves what it
    has restored, which must be it bit by bit; then rows and figures must be those of the first run, to rounding.
    """
    transitions = list(transitions)
    common = [f"data.path={corpus}", "checkpoint.every=3", "train.max_steps=6", f"train.precision={precision}"]
    common += ["checkpoint.keep_last=3", "optim.eps=1e-6", "train.router_loss_scope=previous_step", *words]
    first = {layout: folder / "-".join(map(str, layout)) for layout in dict.fromkeys(pair[0] for pair in transitions)}
    then = {pair: folder / " to ".join("-".join(map(str, layout)) for layout in pair) for pair in transitions}
    jobs = [(layout, {"words": [f"run.dir={path}"]}) for layout, path in first.items()]
    launch_layouts(folder, common, jobs)
    jobs = [
        (layout, {"words": [f"run.dir={path}", f"checkpoint.resume={first[before] / STEP_3}"], "resaves": True})
        for (before, layout), path in then.items()
    ]
    launch_layouts(folder, common, jobs)
    for pair, path in then.items():
        yield compare(first[pair[0]], path, TOLERANCES[precision])


def launch_layouts(folder: Path, common: list[str], jobs: list[tuple[Layout, dict]]) -> None:
    """Runs jobs, those of as many processes together; all must end well."""
    for processes in (1, 2, 4):
        mine = [
            job | {"words": [*common, *layout.words(), *job["words"]]}
            for layout, job in jobs
            if layout.processes == processes
        ]
        for start in range(0, len(mine), JOBS):
            some = mine[start : start + JOBS]
            codes, said = launch_jobs(folder, processes, some, timeout=200 + 40 * len(some))
            assert not any(codes), said[-3000:]


def compare(first: Path, then: Path, tolerance: float) -> list[str]:
    """Compares a run that goes on in another layout with the one that it goes on from; lists what differs."""
    wanted, found = whole(first / STEP_3), whole(then / STEP_3)
    problems = [f"{name} is not there in both" for name in wanted.keys() ^ found.keys()]
    for name in wanted.keys() & found.keys():
        if wanted[name].tobytes() != found[name].tobytes():
            problems.append(f"{name} differs")
    rows, expected = metrics(then), metrics(first)[4:]
    if [(row["step"], row["tokens"]) for row in rows] != [(row["step"], row["tokens"]) for row in expected]:
        return [*problems, f"steps {[row['step'] for row in rows]}, or their tokens, are others"]
    for row, other in zip(rows, expected, strict=True):
        for figure in ("loss", "grad_norm", "router_loss"):
            if not abs(row[figure] - other[figure]) <= tolerance * abs(other[figure]):
                problems.append(f"{figure} of step {row['step']} is {row[figure]}, not {other[figure]}")
    return [f"{then.name}: {problem}" for problem in problems]
