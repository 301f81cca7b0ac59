"""Runs a run whose second save is killed at its first sub-step, at its second one, and so on until it ends by itself.

`python -m tests.train.killed_saves RUN_DIR WORDS...`. The save is made by a fork of the run, which kills itself by
SIGKILL before its n-th call that changes the disk; what the run folder then holds is copied to RUN_DIR-killed-N.
"""

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

import train.checkpoint.durable
import train.run
from tests.train.helpers import SMALL
from train.checkpoint.checkpoints import Checkpoints
from train.compose import compose

CALLS = [(os, name) for name in ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir")]
CALLS += [(train.checkpoint.durable, "write_whole")]


def die_before(number: int) -> None:
    """Has this process kill itself before its n-th call that changes the disk."""
    count = [0]

    def counted(function):
        def call(*words, **options):
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*words, **options)

        return call

    for owner, name in CALLS:
        setattr(owner, name, counted(getattr(owner, name)))


def main(folder: Path, words: list[str]) -> int:
    saved, kept = [0], folder.with_name(f"{folder.name}-kept")
    save = Checkpoints.save

    def save_killed(checkpoints, step, **options):
        saved[0] += 1
        if saved[0] == 2:
            shutil.copytree(folder / "checkpoints", kept)
            for number in itertools.count(1):
                child = os.fork()
                if child == 0:
                    die_before(number)
                    save(checkpoints, step, **options)
                    os._exit(0)
                if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
                    break
                shutil.copytree(folder, f"{folder}-killed-{number:03d}")
                shutil.rmtree(folder / "checkpoints")
                shutil.copytree(kept, folder / "checkpoints")
            raise SystemExit(0)
        save(checkpoints, step, **options)

    Checkpoints.save = save_killed
    return train.run.run(compose([*SMALL, f"run.dir={folder}", *words]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
