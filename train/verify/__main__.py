"""`python -m train.verify`."""

import sys

from train.cli import main

sys.exit(main(["verify", *sys.argv[1:]]))
