"""Trains as `python -m train` does, but a process hangs or is slow: `... RANK KIND STEP WORDS...`.

Kinds: `data`, in the thread that prepares batches; `step`, in that which trains; `held`, there with the interpreter;
`stop`, as a whole; and `slow`, which hangs nowhere, but takes long for all
batches that it evaluates, and all parts of a file.
"""

import ctypes
import os
import signal
import sys
import time

import train.checkpoint.checkpoints
import train.evaluate.evaluations
import train.evaluate.held_out
import train.loop
from train.cli import main
from train.data.loader import Data

SECONDS = 1.5
taken = [0]
steps, train_step, predict = Data.steps, train.loop.train_step, train.evaluate.held_out.predict
write_slices = train.checkpoint.checkpoints.write_slices


def sleeps_for_ever():
    while True:
        time.sleep(1)


def hang(kind):
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "held":
        ctypes.PyDLL(None).sleep(1000)  # keeps the interpreter's lock, up to a signal
    else:
        sleeps_for_ever()


def hanging_steps(data, share, first=0):
    for step, batches in enumerate(steps(data, share, first), first + 1):
        if step == at:
            hang(kind)
        yield batches


def hanging_step(*inputs):
    taken[0] += 1
    if taken[0] == at:
        hang(kind)
    return train_step(*inputs)


def slow_pass(*inputs, **options):
    time.sleep(SECONDS)
    return predict(*inputs, **options)


def slow_write(path, slices, beat):
    def slow_beat():
        time.sleep(SECONDS / 2)
        beat()

    return write_slices(path, slices, slow_beat)


def timed(function):
    def run(*inputs, **options):
        started = time.monotonic()
        result = function(*inputs, **options)
        print(f"took {time.monotonic() - started}", flush=True)
        return result

    return run


if __name__ == "__main__":
    rank, kind, at = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if int(os.environ.get("RANK", "0")) == rank:
        if kind == "slow":
            train.evaluate.held_out.predict = slow_pass
            train.evaluate.evaluations.evaluate = timed(train.evaluate.evaluations.evaluate)
            train.checkpoint.checkpoints.write_slices = timed(slow_write)
        elif kind == "data":
            Data.steps = hanging_steps
        else:
            train.loop.train_step = hanging_step
    sys.exit(main(["train", *sys.argv[4:]]))
