"""`python -m train.generate`."""

import sys

from train.cli import main

sys.exit(main(["generate", *sys.argv[1:]]))
