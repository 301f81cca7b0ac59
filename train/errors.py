"""Errors that are the user's to mend: one message, one exit code."""

import contextlib
import os
import sys
import time
from pathlib import Path

LINGER_SECONDS = 12.0
CODE_FILE = "CIERZO_CODE_FILE"
"""Variable with the path of a file for the exit code of what went wrong: a launcher has its own, and before there is a
run folder there is no `exit.json`. It is for launch/supervise.sh and slurm.sbatch."""


class UserError(Exception):
    """Something outside the program is wrong; the message says what, where, and the fix.

    Attributes:
        code: the process's exit code.
        reason: the word for it in `exit.json`.
    """

    code = 1
    reason = "error"


class ConfigError(UserError):
    """A key, value or combination of values cannot be used."""

    code = 2
    reason = "config"


class DataError(UserError):
    """The data cannot be read, or holds what cannot be trained on."""

    code = 3
    reason = "data"


class CheckpointError(UserError):
    """Weights on disk are damaged, or not what they are said to be."""

    code = 4
    reason = "checkpoint"


class NumericsError(UserError):
    """A loss or a gradient is not finite."""

    code = 5
    reason = "numerics"

    @classmethod
    def of_gradient(cls, norm: float) -> "NumericsError":
        """The error of a gradient norm that is not finite."""
        return cls(f"the gradient norm is {norm}: no update was made; lower optim.lr or look at the data")


class MachineError(UserError):
    """The machine, the network or the run folder does not allow the run."""

    code = 6
    reason = "environment"


class RewoundError(UserError):
    """The run is to be started again, and goes on from an earlier step."""

    code = 75
    reason = "rewound"


class StopSignal(BaseException):
    """A signal asked the run to stop."""

    reason = "interrupted"

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.message = message
        self.code = 128 + signal_number

    def __str__(self) -> str:
        return self.message


class Preempted(StopSignal):
    """A signal asked the run to stop, and all that it did is saved."""

    reason = "preempted"

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.code = 75


def report(error: UserError | StopSignal, *, met: bool) -> None:
    """Says an error once: one process prints it, the others give it time to, but for a signal, which all get.

    A launcher ends all processes as soon as one has failed, Slurm those of all hosts. Were another the first, the main
    process would be ended before its message, its code file and its `exit.json`. One that nobody ends has an error of
    its own, and says it.

    Args:
        error: what to say.
        met: whether the processes have met, and raise the same; before, the first of each host speaks for its host.
    """
    rank, code_file = os.environ.get("RANK", "0"), os.environ.get(CODE_FILE)
    if rank == "0" and code_file:
        with contextlib.suppress(OSError):
            Path(code_file).write_text(f"{error.code}\n", encoding="utf-8")
    says = rank == "0" or (not met and os.environ.get("LOCAL_RANK", rank) == "0")
    if says:
        print(f"error: {error}", file=sys.stderr, flush=True)
    several_hosts = os.environ.get("LOCAL_WORLD_SIZE", world := os.environ.get("WORLD_SIZE")) != world
    if isinstance(error, UserError) and rank != "0" and (several_hosts or not says):
        with contextlib.suppress(StopSignal):  # which is how the launcher ends it
            time.sleep(LINGER_SECONDS)
            if met:
                print(f"error: process {rank}: {error}", file=sys.stderr, flush=True)
