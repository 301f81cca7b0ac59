"""Trains as `python -m train` does, but the disk takes SECONDS for a checkpoint: `... SECONDS WORDS...`."""

import sys
import time

from train.checkpoint import durable
from train.cli import main

if __name__ == "__main__":
    write = durable.write_durably

    def write_slowly(path, parts, *, read_back=False):
        if read_back:  # of a process's own file
            time.sleep(float(sys.argv[1]))
        return write(path, parts, read_back=read_back)

    from train.checkpoint import values

    values.write_durably = write_slowly
    sys.exit(main(["train", *sys.argv[2:]]))
