"""Labelled texts that come one by one: batches that are sorted by length within a few steps, as those at hand."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from train.data.labelled import WINDOW, Batches, LabelledBatch, arranged
from train.data.share import Share
from train.data.templates import Sample


@dataclass(frozen=True)
class LabelledStream:
    """Batches of a stream of labelled texts, which every process reads whole.

    Attributes:
        samples: opens the stream from its beginning; it has no end.
        batches: pads them.
        seed: of the order of steps.
        shuffle: whether texts are sorted by length before they are divided into steps, and steps are shuffled; without,
            they stay in the steps that they come in.
    """

    samples: Callable[[], Iterator[Sample]]
    batches: Batches
    seed: int
    shuffle: bool

    def steps(self, share: Share, first: int = 0) -> Iterator[list[LabelledBatch]]:
        """Yields a process's micro-batches, step after step, without end.

        Args:
            share: of the process.
            first: step to begin with, counted from 0; the stream is read again up to there.
        """
        stream = (sample for sample in self.samples() if len(sample.ids))
        size, step = share.rows_per_step, 0
        while held := list(islice(stream, WINDOW * size)):
            random = np.random.default_rng((self.seed, step // WINDOW, size)) if self.shuffle else None
            order = arranged(np.asarray([len(sample.ids) for sample in held]), size, random)
            for start in range(0, len(order), size):
                if step >= first:
                    yield self._batches_of([held[index] for index in order[start : start + size]], share)
                step += 1

    def _batches_of(self, samples: list[Sample], share: Share) -> list[LabelledBatch]:
        lengths = np.asarray([len(sample.ids) for sample in samples])

        def read(row: int) -> tuple[np.ndarray, np.ndarray]:
            return samples[row].ids, np.asarray(samples[row].target, np.float32)

        return self.batches.divided(lengths, read, share)
