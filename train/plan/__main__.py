"""`python -m train.plan recipe=...`: the same as `cierzo plan ...`."""

import sys

from train.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
