#!/usr/bin/env bash
# Lint, types and every test; arguments go to pytest: launch/test.sh -m "not slow" -k router
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ruff check .
ruff format --check .
mypy
export OMP_NUM_THREADS=1 # two files of tests at a time, a thread each
python -m pytest --numprocesses 2 --dist loadfile "$@"
