"""`python -m train`: the same as `cierzo train`."""

import sys

from train.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
