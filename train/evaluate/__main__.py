"""`python -m train.evaluate`."""

import sys

from train.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
