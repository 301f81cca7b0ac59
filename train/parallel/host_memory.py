"""How much memory this host has, and when glibc gives freed memory back to it; other C libraries are left alone."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGE_BYTES = 2**20
GLIBC_BYTES = 2**25  # where its own rule ends, once it has seen blocks so large


def host_bytes() -> float:
    """Memory of this host, or what a container is given of it."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        return min(memory, float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no such limit
        return memory


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Has every large block be pages of its own meanwhile, which are gone when it is freed.

    By its own rule glibc soon puts blocks of up to 32 MB side by side. Where a matrix is freed before its partition is,
    as often as there are layers, small partitions then settle in each hole, and no matrix fits into one again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 1)
    mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, GLIBC_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2 * GLIBC_BYTES)
