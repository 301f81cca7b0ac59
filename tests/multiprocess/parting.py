"""Trains, and says what owns the process group when it goes: `python -m tests.multiprocess.parting WORDS...`."""

import gc
import sys

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from train.cli import main

if __name__ == "__main__":
    destroy = dist.destroy_process_group
    owners: list[int] = []

    def count_owners(*words) -> None:
        owners.append(sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects()))
        destroy(*words)

    dist.destroy_process_group = count_owners
    code = main(["train", *sys.argv[1:]])
    print(f"owners: {owners}")
    sys.exit(code)
