"""What a start frees is the system's again, in a fresh process each."""

import subprocess
import sys

import pytest

PARTITION = """
import contextlib, sys
import numpy
from train.parallel.host_memory import freed_at_once

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

partitions, before = [], resident()
with freed_at_once() if sys.argv[1] == "freed" else contextlib.nullcontext():
    for _ in range(20):  # layers: a matrix, its partition, then a smaller matrix and its partition
        for mib in (24, 3):
            whole = numpy.ones(mib * 2**17)
            partitions.append(whole.copy())
            del whole
print((resident() - before) / (20 * 27))
"""


@pytest.mark.parametrize(("way", "least", "most"), [("freed", 1.0, 1.02), ("as glibc does", 1.05, 2.0)])
def test_no_hole_is_left_where_a_matrix_was(way, least, most):
    done = subprocess.run([sys.executable, "-c", PARTITION, way], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert least <= float(done.stdout) <= most
