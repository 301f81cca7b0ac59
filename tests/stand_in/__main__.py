"""Runs a module where the stand-in is in place; see `tests.stand_in`."""

import os
import runpy
import sys

from tests.stand_in.device import install

if __name__ == "__main__":
    install(os.environ["STAND_IN_LIBRARY"])
    module, *words = sys.argv[1:]
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
