"""Samples packed into rows: each is whole, in one row, apart from the others.

The samples of a window are laid into rows by first fit decreasing: the longest first, each into the first row that has
room for it. The order of an epoch says which samples share a window, so an epoch has rows of its own. A text that is
longer than a row is divided into samples, which predict all of its tokens but the first.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from mixtral.ops.cross_entropy import IGNORE_INDEX
from train.data.columns import column
from train.data.packing import Piece, Row, TokenTable, make_row


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Says into which bin each length goes, where the longest are laid first, each into the first bin with room.

    Lengths that are equal are laid at once, so the work grows with the number of different ones.

    Args:
        lengths: from 1 to `capacity`.
        capacity: of a bin.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    bins, room = np.empty(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    opened = laid = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        fits = room[:opened] // size
        before = np.cumsum(fits) - fits
        taken = np.clip(count - before, 0, fits)
        room[:opened] -= taken * size
        placed = np.repeat(np.arange(opened), taken)
        left = np.arange(count - len(placed)) // (capacity // size)
        new = np.bincount(left)
        room[opened : opened + len(new)] = capacity - new * size
        bins[order[laid : laid + count]] = np.concatenate([placed, opened + left])
        opened, laid = opened + len(new), laid + count
    return bins


class Plan(NamedTuple):
    """The rows of an epoch: row i holds units `units[starts[i] : starts[i + 1]]`."""

    units: np.ndarray
    starts: np.ndarray


class SampleRows:
    """Rows of samples that are at hand: any row of any epoch.

    Args:
        samples: see `train.data.tokenized.ENCODED`; the empty ones are left out.
        sequence_length: S; longer samples, which only texts may be, are divided.
        window: samples that are packed together; 1 gives each a row of its own.
        seed: of the order of samples and rows.
        shuffle: whether each epoch has its own order; otherwise samples keep theirs but within a window.
        epochs: after so many, rows are padding; None never ends.
        weights: of the parts, whose share of an epoch they are; without, an epoch holds each sample once.
    """

    def __init__(
        self,
        samples: Dataset,
        sequence_length: int,
        *,
        window: int,
        seed: int = 0,
        shuffle: bool = False,
        epochs: float | None = None,
        weights: list[float] | None = None,
    ) -> None:
        self.sequence_length, self.window = sequence_length, window
        self.seed, self.shuffle, self.weights = seed, shuffle, weights
        self._ids, self._trained = TokenTable(samples, "input_ids"), TokenTable(samples, "trained")
        self._parts, self._trained_tokens = (column(samples, name).to_numpy() for name in ("part", "trained_tokens"))
        self.lengths = self._ids.lengths
        self._pieces = -(-self.lengths // sequence_length)
        self._first = np.cumsum(self._pieces) - self._pieces
        self._unit_sample = np.repeat(np.arange(len(self.lengths)), self._pieces)
        self._unit_start = (np.arange(len(self._unit_sample)) - self._first[self._unit_sample]) * sequence_length
        self._unit_length = np.minimum(self.lengths[self._unit_sample] - self._unit_start, sequence_length)
        self._plan = lru_cache(maxsize=2)(self._plan_of)
        self._ends: list[int] = []  # rows until the end of each epoch
        self._end = None if epochs is None else self._rows_until(epochs)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of the first epoch; with weights, others differ by a few."""
        return int(self._unit_length[self._plan(0).units].sum())

    @property
    def trained_tokens_per_epoch(self) -> int:
        """Of those, the ones that are predicted."""
        units = self._plan(0).units
        return int(self._trained_tokens[self._unit_sample[units[self._unit_start[units] == 0]]].sum())

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch."""
        return len(self._plan(0).starts) - 1

    def __len__(self) -> int:
        """Number of rows until the end, or of the first epoch where there is none."""
        return self.rows_per_epoch if self._end is None else self._end

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a sample's ids, and which of them are trained."""
        length = int(self.lengths[index])
        return self._ids.read(index, 0, length), self._trained.read(index, 0, length)

    def passes(self) -> list[float] | None:
        """Says how often an epoch holds the samples of each part, where parts have weights."""
        if self.weights is None:
            return None
        sizes = np.bincount(self._parts[self.lengths > 0], minlength=len(self.weights))
        return [share / max(1, size) for share, size in zip(self._shares(), sizes.tolist(), strict=True)]

    def _shares(self) -> list[int]:
        """Returns how many samples of an epoch are each part's."""
        assert self.weights is not None
        count = int((self.lengths > 0).sum())
        return [round(count * weight / sum(self.weights)) for weight in self.weights]

    def __getitem__(self, index: int) -> Row:
        """Returns row `index`, counted through all epochs."""
        return make_row([self._piece(unit) for unit in self._units(index)], self.sequence_length)

    def documents_in(self, index: int) -> list[int]:
        """Lists the samples that row `index` holds, or parts of."""
        samples: list[int] = self._unit_sample[self._units(index)].tolist()
        return samples

    def _units(self, index: int) -> np.ndarray:
        """Returns the units of row `index`."""
        if self._end is not None and index >= self._end:
            return np.zeros(0, np.int64)
        epoch = 0
        while index >= self._end_of(epoch):
            epoch += 1
        units, starts = self._plan(epoch)
        row = index - (self._end_of(epoch - 1) if epoch else 0)
        return units[starts[row] : starts[row + 1]]

    def _rows_until(self, epochs: float) -> int:
        whole = int(epochs)
        before = self._end_of(whole - 1) if whole else 0
        return max(1, before + round((epochs - whole) * (self._end_of(whole) - before))) if epochs > whole else before

    def _end_of(self, epoch: int) -> int:
        while len(self._ends) <= epoch:
            rows = len(self._plan(len(self._ends)).starts) - 1
            self._ends.append(rows + (self._ends[-1] if self._ends else 0))
        return self._ends[epoch]

    def _piece(self, unit: int) -> Piece:
        sample, start = int(self._unit_sample[unit]), int(self._unit_start[unit])
        stop = start + int(self._unit_length[unit])
        ids, trained = (table.read(sample, start, stop + 1) for table in (self._ids, self._trained))
        return labelled(ids, trained, stop - start)

    def _plan_of(self, epoch: int) -> Plan:
        random = np.random.default_rng((self.seed, epoch))
        samples = self._samples_of(epoch, random)
        pieces = self._pieces[samples]
        within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        return pack_units(
            np.repeat(self._first[samples], pieces) + within,
            self._unit_length,
            self.sequence_length,
            self.window,
            random if self.shuffle else None,
        )

    def _samples_of(self, epoch: int, random: np.random.Generator) -> np.ndarray:
        """Returns an epoch's samples in their order; with weights, each part goes on where the last epoch ended."""
        samples = np.flatnonzero(self.lengths)
        if self.weights is not None:
            chosen = []
            for part, share in enumerate(self._shares()):
                mine = samples[self._parts[samples] == part]
                if len(mine) and share:
                    first, last = epoch * share, (epoch + 1) * share
                    passes = [self._pass(mine, part, n) for n in range(first // len(mine), -(-last // len(mine)))]
                    chosen.append(np.concatenate(passes)[first % len(mine) :][:share])
            samples = np.concatenate(chosen)
        return random.permutation(samples) if self.shuffle else samples

    def _pass(self, samples: np.ndarray, part: int, number: int) -> np.ndarray:
        """Returns a part's samples in the order of its so-manieth pass."""
        return np.random.default_rng((self.seed, part, number)).permutation(samples) if self.shuffle else samples


def pack_units(
    units: np.ndarray, lengths: np.ndarray, capacity: int, window: int, random: np.random.Generator | None
) -> Plan:
    """Packs units, window by window.

    Args:
        units: indices into `lengths`, in their order.
        lengths: of all units.
        capacity: S.
        window: units packed together.
        random: shuffles the rows; None keeps their order.
    """
    rows = np.arange(len(units))
    opened = len(units) if window == 1 else 0
    for start in range(0, len(units) if window > 1 else 0, window):
        rows[start : start + window] = opened + first_fit_decreasing(lengths[units[start : start + window]], capacity)
        opened = int(rows[start : start + window].max()) + 1
    if random is not None:
        rows = random.permutation(opened)[rows]
    counts = np.bincount(rows, minlength=opened)
    return Plan(units[np.argsort(rows, kind="stable")], np.concatenate([[0], np.cumsum(counts)]))


def labelled(ids: np.ndarray, trained: np.ndarray, length: int) -> Piece:
    """Returns the first `length` ids of a sample, and what to predict at each: the next one, or -100.

    Args:
        ids: of the sample, and the next one where it goes on.
        trained: which of them are.
        length: of the sample.
    """
    return ids[:length], np.where(trained[1:], ids[1:], IGNORE_INDEX)


def pack_sample_stream(
    samples: Iterable[tuple[np.ndarray, np.ndarray]],
    sequence_length: int,
    *,
    window: int,
    seed: int = 0,
    shuffle: bool = False,
) -> Iterator[Row]:
    """Packs samples that arrive one by one, window by window.

    Args:
        samples: token ids of each, and which of them are trained.
        sequence_length: S.
        window: samples that are packed together.
        seed: of the order of rows.
        shuffle: whether the rows of a window are shuffled.
    """
    random = np.random.default_rng(seed)
    pieces = (
        labelled(
            ids[start : start + sequence_length + 1], trained[start : start + sequence_length + 1], sequence_length
        )
        for ids, trained in samples
        for start in range(0, len(ids), sequence_length)
    )
    while held := list(islice(pieces, window)):
        lengths = np.asarray([len(ids) for ids, _ in held])
        units, starts = pack_units(np.arange(len(held)), lengths, sequence_length, window, random if shuffle else None)
        for start, stop in pairwise(starts):
            yield make_row([held[unit] for unit in units[start:stop]], sequence_length)
