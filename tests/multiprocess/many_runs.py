"""Runs many runs in one process group: `python -m tests.multiprocess.many_runs JOBS.json`.

A job is the words of a run and, where asked for, that it dies by an error when a step begins (`dies_at`; each of its
steps awaits what is being written beside it, so that what it leaves is no matter of time), saves once more what it
restored before it goes on (`resaves`), or that a rank signals itself in a step (`signals`). The main process writes the
exit codes of all into JOBS.codes.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch.distributed as dist
from accelerate.state import AcceleratorState

import train.loop
import train.parallel.engine
import train.run
from tests.train.helpers import SMALL
from train.compose import compose
from train.parallel.engine import Engine


class Died(Exception):
    """What ends a run in the middle."""


def stay_together() -> None:
    """Lets engine after engine use the first one's process group."""
    meet = train.parallel.engine.meet
    train.parallel.engine.meet = lambda *words: None if dist.is_initialized() else meet(*words)
    Engine.close = lambda engine, *, wait: engine.accelerator.wait_for_everyone()


def run(
    words: list[str], dies_at: int | None = None, resaves: bool = False, signals: tuple[int, int, str] | None = None
) -> int:
    """Runs once; 99 is the code of a run that died as it was told to. Steps are counted from where the run goes on."""
    AcceleratorState._reset_state(reset_partial_state=True)
    taken = [0]
    train_step, train_all = train.loop.train_step, train.run.train

    def step_or_die(*inputs):
        taken[0] += 1
        for thread in threading.enumerate() if dies_at else ():
            if thread.name == "checkpoint":
                thread.join()
        if taken[0] == dies_at:
            raise Died
        if signals and (int(os.environ.get("RANK", "0")), taken[0]) == tuple(signals[:2]):
            os.kill(os.getpid(), signal.Signals[signals[2]])
        return train_step(*inputs)

    def save_and_train(engine, config, data, max_steps, observer, checkpoints, evaluations):
        assert checkpoints.step > 0
        checkpoints.save(checkpoints.step)
        train_all(engine, config, data, max_steps, observer, checkpoints, evaluations)

    train.loop.train_step = step_or_die
    train.run.train = save_and_train if resaves else train_all
    try:
        return train.run.run(compose([*SMALL, "evaluate.sample_tokens=0", *words]))
    except Died:
        return 99
    finally:
        train.loop.train_step, train.run.train = train_step, train_all


if __name__ == "__main__":
    path = Path(sys.argv[1])
    stay_together()
    codes = [run(**job) for job in json.loads(path.read_text())]
    if os.environ.get("RANK", "0") == "0":
        path.with_suffix(".codes").write_text(json.dumps(codes))
