"""Trains on a disk that becomes too small for one process.

`python -m tests.train.small_disk RANK STEP LARGEST_BYTES WORDS...`
"""

import os
import resource
import sys

import train.loop
from train.cli import main


def shrink_at(step: int, largest_bytes: int) -> None:
    """Limits the size of files once a step begins."""
    train_step, taken = train.loop.train_step, [0]

    def step_on_a_smaller_disk(*inputs):
        taken[0] += 1
        if taken[0] == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, largest_bytes))
        return train_step(*inputs)

    train.loop.train_step = step_on_a_smaller_disk


if __name__ == "__main__":
    if sys.argv[1] == os.environ.get("RANK", "0"):
        shrink_at(int(sys.argv[2]), int(sys.argv[3]))
    sys.exit(main(["train", *sys.argv[4:]]))
