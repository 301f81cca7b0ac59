"""Tensors that come and go in a step, and what glibc's malloc makes of them on a processor.

Blocks of `MAPPED` bytes or more are pages of their own, gone when they are freed, but where a hole of the heap takes
them: mostly up to `KEPT`, since malloc leaves so much at the heap's end. The heap stays as large as it once was.
"""

from collections.abc import Iterable
from dataclasses import dataclass

MAPPED = 32 * 2**20
"""malloc's M_MMAP_THRESHOLD at its highest, which train/parallel/host_memory.py sets."""
KEPT = 2 * MAPPED
"""malloc's M_TRIM_THRESHOLD then."""


@dataclass(frozen=True)
class Blocks:
    """What several tensors take.

    Attributes:
        total: bytes.
        small: bytes of those that come and go and never lie outside the heap.
        fitting: bytes of these, and of those that may lie in it.
    """

    total: float = 0.0
    small: float = 0.0
    fitting: float = 0.0

    @staticmethod
    def of(sizes: Iterable[float]) -> "Blocks":
        """Adds up tensors of so many bytes each, all of which come and go."""
        sizes = list(sizes)
        small, fitting = (sum(size for size in sizes if size < limit) for limit in (MAPPED, KEPT))
        return Blocks(sum(sizes), small, fitting)

    def __add__(self, other: "Blocks") -> "Blocks":
        """Both at once."""
        return Blocks(self.total + other.total, self.small + other.small, self.fitting + other.fitting)

    def __mul__(self, times: float) -> "Blocks":
        """The same so many times."""
        return Blocks(self.total * times, self.small * times, self.fitting * times)
