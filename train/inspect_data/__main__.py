"""`python -m train.inspect_data recipe=...`: the same as `cierzo inspect_data ...`."""

import sys

from train.cli import main

if __name__ == "__main__":
    sys.exit(main(["inspect_data", *sys.argv[1:]]))
