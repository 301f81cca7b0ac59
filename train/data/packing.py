"""Documents packed into rows without waste.

The documents of an epoch, in its order, form one stream of tokens, cut every S tokens into rows; only the last row of
an epoch is padded. A document that crosses a cut goes on in the next row, its positions starting anew. Every token
of a document but the first is predicted exactly once per epoch, the one after a cut included; nothing is predicted
across the border of two documents. The rows of an epoch are then shuffled: neighbours are too much alike to
make a good batch.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from mixtral.ops.cross_entropy import IGNORE_INDEX


class Batch(NamedTuple):
    """Rows of tokens, each tensor (B, S).

    Attributes:
        input_ids: token ids.
        position_ids: position in the document's part; 0 begins a part, which sees no other.
        shifted_labels: the id to predict at each position, or -100.
        token_mask: false for padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    shifted_labels: Tensor
    token_mask: Tensor

    @property
    def trained(self) -> Tensor:
        """Number of tokens that are predicted."""
        return (self.shifted_labels != IGNORE_INDEX).sum()

    def to(self, device: torch.device) -> "Batch":
        """Moves the batch."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def flattened(self) -> "Batch":
        """Lays all rows into one; documents stay apart, since every row begins one."""
        return Batch(*(tensor.reshape(1, -1) for tensor in self))


Row = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Piece = tuple[np.ndarray, np.ndarray]  # ids of a part of a document, and the ids that follow each


def stack(rows: list[Row]) -> Batch:
    """Stacks rows into a batch."""
    return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def make_row(pieces: list[Piece], sequence_length: int) -> Row:
    """Lays parts of documents end to end and pads the rest, as ids, positions, labels and mask of length S."""
    ids, positions = np.zeros(sequence_length, np.int64), np.zeros(sequence_length, np.int64)
    labels, mask = np.full(sequence_length, IGNORE_INDEX, np.int64), np.zeros(sequence_length, bool)
    start = 0
    for piece, following in pieces:
        stop = start + len(piece)
        ids[start:stop], positions[start:stop], mask[start:stop] = piece, np.arange(len(piece)), True
        labels[start : start + len(following)] = following
        start = stop
    positions[start:] = np.arange(sequence_length - start)
    return ids, positions, labels, mask


class TokenTable:
    """The ids of tokenized documents, read where they lie: a part of a long one costs no more than of a short one.

    Args:
        documents: a dataset, memory-mapped or not.
        name: of its column of ids, or of whatever there is one of per token.
    """

    def __init__(self, documents: Dataset, name: str = "input_ids") -> None:
        if documents._indices is not None:
            documents = documents.flatten_indices()
        chunks = documents.data.column(name).chunks
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._first = np.cumsum([0] + [len(chunk) for chunk in chunks])
        self.lengths = np.concatenate([np.diff(offsets).astype(np.int64) for offsets in self._offsets])

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Returns ids `start` to `stop` of a document, fewer where it ends before."""
        chunk = int(np.searchsorted(self._first, document, side="right")) - 1
        begin, end = self._offsets[chunk][document - self._first[chunk] :][:2].tolist()
        return self._values[chunk][begin + start : min(begin + stop, end)]

    def values(self) -> Iterator[np.ndarray]:
        """Yields what there is of all documents, part by part."""
        return (values[offsets[0] : offsets[-1]] for values, offsets in zip(self._values, self._offsets, strict=True))


class PackedRows:
    """Rows of documents that are at hand: any row of any epoch, by arithmetic alone.

    Args:
        documents: a dataset with an `input_ids` column, no document empty.
        sequence_length: S.
        seed: of the order of documents and rows.
        shuffle: whether each epoch has its own order; otherwise documents and rows keep theirs.
        epochs: after so many, rows are padding; None never ends.
    """

    def __init__(
        self,
        documents: Dataset,
        sequence_length: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        epochs: float | None = None,
    ) -> None:
        self.documents = TokenTable(documents)
        self.sequence_length = sequence_length
        self.seed, self.shuffle = seed, shuffle
        self.lengths = self.documents.lengths
        self.tokens_per_epoch = int(self.lengths.sum())
        self.trained_tokens_per_epoch = self.tokens_per_epoch - len(self.lengths)
        self.rows_per_epoch = -(-self.tokens_per_epoch // sequence_length)
        self._end = None if epochs is None else max(1, round(epochs * self.rows_per_epoch))
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        """Number of rows until the end, or of one epoch where there is none."""
        return self.rows_per_epoch if self._end is None else self._end

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a document's ids, and which of them are trained: all."""
        ids = self.documents.read(index, 0, int(self.lengths[index]))
        return ids, np.ones(len(ids), bool)

    def __getitem__(self, index: int) -> Row:
        """Returns row `index`, counted through all epochs."""
        pieces: list[Piece] = []
        for document, begin, take in self._parts(index):
            ids = self.documents.read(document, begin, begin + take + 1)
            pieces.append((ids[:take], ids[1:]))
        return make_row(pieces, self.sequence_length)

    def documents_in(self, index: int) -> list[int]:
        """Lists the documents that row `index` holds a part of."""
        return [document for document, _, _ in self._parts(index)]

    def _parts(self, index: int) -> Iterator[tuple[int, int, int]]:
        """Yields the parts of row `index`: the document, where in it the part begins, and how long it is."""
        if self._end is not None and index >= self._end:
            return
        epoch, row = divmod(index, self.rows_per_epoch)
        documents, starts, rows = self._order(epoch)
        at = int(rows[row]) * self.sequence_length
        stop = min(at + self.sequence_length, self.tokens_per_epoch)
        place = int(np.searchsorted(starts, at, side="right")) - 1
        while at < stop:
            document, begin = int(documents[place]), at - int(starts[place])
            take = min(int(self.lengths[document]) - begin, stop - at)
            yield document, begin, take
            at, place = at + take, place + 1

    def _order_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns an epoch's order of documents, where each begins in its stream, and its order of rows."""
        documents, rows = np.arange(len(self.lengths)), np.arange(self.rows_per_epoch)
        if self.shuffle:
            random = np.random.default_rng((self.seed, epoch))
            documents, rows = random.permutation(documents), random.permutation(rows)
        lengths = self.lengths[documents]
        return documents, np.cumsum(lengths) - lengths, rows


def pack_stream(
    documents: Iterable[list[int]], sequence_length: int, *, seed: int = 0, shuffle_buffer: int = 1
) -> Iterator[Row]:
    """Packs documents that arrive one by one into the same rows.

    Args:
        documents: token ids of each. Where they end, so do the rows; the last is padded.
        sequence_length: S.
        seed: of the order of rows.
        shuffle_buffer: rows held to draw the next from; 1 keeps their order.
    """
    random = np.random.default_rng(seed)
    held: list[list[Piece]] = []
    for pieces in _cut_stream(documents, sequence_length):
        held.append(pieces)
        if len(held) == shuffle_buffer:
            yield make_row(held.pop(int(random.integers(len(held)))), sequence_length)
    for place in random.permutation(len(held)) if shuffle_buffer > 1 else range(len(held)):
        yield make_row(held[place], sequence_length)


def _cut_stream(documents: Iterable[list[int]], sequence_length: int) -> Iterator[list[Piece]]:
    """Yields the parts of documents that fill each row."""
    pieces: list[Piece] = []
    filled = 0
    for document in documents:
        ids = np.asarray(document, dtype=np.int64)
        begin = 0
        while begin < len(ids):
            take = min(len(ids) - begin, sequence_length - filled)
            pieces.append((ids[begin : begin + take], ids[begin + 1 : begin + take + 1]))
            begin, filled = begin + take, filled + take
            if filled == sequence_length:
                yield pieces
                pieces, filled = [], 0
    if pieces:
        yield pieces
