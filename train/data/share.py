"""Which rows of a step are whose."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from train.config import TrainConfig


def evenly(count: int, most: int | None) -> list[int]:
    """Lists the indices of `count` items, or of at most so many of them, evenly spread."""
    chosen = count if most is None else min(count, most)
    return [index * count // chosen for index in range(chosen)]


@dataclass(frozen=True)
class Share:
    """Which rows of an optimizer step are a process's.

    A step takes the next A*P*B rows: accumulation, processes, micro-batch. They depend on the step alone; its
    micro-step a takes P*B in a row, of which process r takes the r-th B.
    """

    rank: int
    world_size: int
    micro_batch_size: int
    accumulation: int = 1

    @classmethod
    def of(cls, config: TrainConfig, rank: int, world_size: int) -> "Share":
        """Gives a process's, as a run divides its steps."""
        return cls(rank, world_size, config.micro_batch_size, config.gradient_accumulation_steps)

    @property
    def rows_per_step(self) -> int:
        """Rows of all processes and micro-steps."""
        return self.accumulation * self.world_size * self.micro_batch_size

    def rows(self, step: int) -> list[range]:
        """Returns the indices of this process's rows at a step counted from 0, a range per micro-step."""
        starts = (
            step * self.rows_per_step + (micro_step * self.world_size + self.rank) * self.micro_batch_size
            for micro_step in range(self.accumulation)
        )
        return [range(start, start + self.micro_batch_size) for start in starts]

    def batches(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Yields a process's part of some items, a micro-batch at a time.

        Every process gets as many batches; the last ones may be smaller, or hold nothing.
        """
        for step in range(-(-len(items) // self.rows_per_step)):
            for rows in self.rows(step):
                yield items[rows.start : rows.stop]
