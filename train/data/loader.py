"""The data of a run: which rows each process takes at each step."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from train.data.labelled import LabelledBatch, LabelledRows, Labels
from train.data.labelled_stream import LabelledStream
from train.data.packing import Batch, PackedRows, Row, make_row, stack
from train.data.problems import Problems
from train.data.samples import SampleRows
from train.data.share import Share, evenly

LISTED_LABELS = 8
FINGERPRINTED = 256  # documents of which all is looked at


@dataclass
class Counts:
    """What became of the documents.

    Attributes:
        documents: that are trained on.
        tokens: of theirs, an epoch.
        trained_tokens: of those, the ones that are predicted.
        cut: samples whose end was cut off.
        left_out: documents with a problem, by its kind.
        fullness: share of the rows of an epoch that is no padding.
        labels: documents of each label.
    """

    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    cut: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    fullness: float = 1.0
    labels: dict[str, int] | None = None

    @classmethod
    def of(cls, rows: PackedRows | SampleRows, left_out: Counter[str], cut: int = 0) -> "Counts":
        """Counts what is at hand."""
        return cls(
            documents=int((rows.lengths > 0).sum()),
            tokens=rows.tokens_per_epoch,
            trained_tokens=rows.trained_tokens_per_epoch,
            cut=cut,
            left_out=left_out.copy(),
            fullness=rows.tokens_per_epoch / (rows.rows_per_epoch * rows.sequence_length),
        )

    def __str__(self) -> str:
        untrained = self.labels is None and self.tokens - self.documents != self.trained_tokens  # beyond the first
        trained = f", {self.trained_tokens:,} of them trained," if untrained else ""
        left_out = [f"{count:,} {kind}" for kind, count in self.left_out.most_common()]
        parts = [f"{self.tokens:,} tokens{trained} in {self.documents:,} documents", f"rows {self.fullness:.1%} full"]
        parts += [f"{count:,} {name}" for name, count in (self.labels or {}).items()][:LISTED_LABELS]
        parts += [f"{self.cut:,} cut"] if self.cut else []
        return ", ".join([*parts, *([f"left out: {', '.join(left_out)}"] if left_out else [])])


@dataclass(frozen=True)
class Data:
    """What a run trains on and is evaluated on.

    Attributes:
        rows: training rows, at hand; None with streaming.
        stream: opens the training rows of a stream from its beginning; None without streaming.
        held_out: rows of the held-out documents, in their order.
        held_out_documents: those documents, see `load_documents`.
        sequence_length: S.
        counts: of the documents; with streaming, as far as they were read.
        problems: of the documents left out; with streaming, of the held-out ones.
        labels: what there is to tell apart, for a classifier.
        sources: rows of the held-out documents of each source, where there are several.
        places: where each training document at hand comes from, as `source`; see `load_documents`.
        streamed: documents of a stream, in their order; None without streaming.
    """

    rows: PackedRows | SampleRows | None
    stream: Callable[[], Iterator[Row]] | LabelledStream | None
    held_out: PackedRows | SampleRows
    held_out_documents: Dataset
    sequence_length: int
    counts: Counts = field(default_factory=Counts)
    problems: Problems = field(default_factory=Problems)
    labels: Labels | None = None
    sources: dict[str, PackedRows | SampleRows] = field(default_factory=dict)
    places: Dataset | None = None
    streamed: IterableDataset | None = None

    def __str__(self) -> str:
        held_out = f"{len(self.held_out_documents)} held out"
        return f"{'a stream of documents' if self.rows is None else self.counts}, {held_out}"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each training document at hand."""
        assert self.rows is not None
        return self.rows.lengths[self.rows.lengths > 0]

    @property
    def passes(self) -> list[float] | None:
        """How often an epoch holds each source, where they have weights."""
        return self.rows.passes() if isinstance(self.rows, SampleRows) else None

    def first(self, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the first training documents at hand: token ids, and which of them are trained."""
        assert self.rows is not None
        for document in np.flatnonzero(self.rows.lengths)[:count]:
            yield self.rows.document(int(document))

    def label_of(self, index: int) -> str:
        """Writes the label of the so-manieth training document at hand, after an arrow, if it has one."""
        if not isinstance(self.rows, LabelledRows):
            return ""
        target = self.rows.target(int(np.flatnonzero(self.rows.lengths)[index])).tolist()
        if self.rows.labels.problem == "regression":
            return f" -> {target[0]:g}"
        return f" -> {', '.join(self.rows.labels.names[int(label)] for label in target) or 'none'}"

    def steps(self, share: Share, first: int = 0) -> Iterator[list[Batch] | list[LabelledBatch]]:
        """Yields a process's micro-batches, step after step, without end.

        Args:
            share: of the process.
            first: step to begin with, counted from 0; a stream is read again up to there.
        """
        if self.rows is not None:
            return _steps_at_hand(self.rows, share, first)
        assert self.stream is not None
        if isinstance(self.stream, LabelledStream):
            return self.stream.steps(share, first)
        return _steps_of_stream(self.stream(), share, first)

    def documents(self, share: Share, step: int) -> list[list[str]] | None:
        """Says where the documents come from that a process's micro-batches of a step hold; None of a stream.

        Args:
            share: of the process.
            step: counted from 0.
        """
        rows = self.rows
        if rows is None or self.places is None:
            return None
        if isinstance(rows, LabelledRows):
            found = rows.samples(step, share)
        else:
            found = [[one for row in indices for one in rows.documents_in(row)] for indices in share.rows(step)]
        return [list(self.places.select(list(dict.fromkeys(documents)))["source"]) for documents in found]

    def fingerprint(self) -> dict[str, Any]:
        """Describes the training documents as far as telling them from others needs; of a stream, the first of them."""
        if self.rows is None:
            assert self.streamed is not None
            first = [[row[name] for name in ("text", "label", "format")] for row in self.streamed.take(FINGERPRINTED)]
            return {"streamed": len(first), "sha256": hashlib.sha256(json.dumps(first).encode()).hexdigest()}
        lengths = self.rows.lengths
        digest = hashlib.sha256(lengths.astype("<i8").tobytes())
        filled = np.flatnonzero(lengths)
        for document in filled[:: -(-len(filled) // FINGERPRINTED)]:
            digest.update(self.rows.document(int(document))[0].astype("<i8").tobytes())
        return {"documents": len(filled), "tokens": int(lengths.sum()), "sha256": digest.hexdigest()}

    @property
    def held_out_sources(self) -> dict[str, PackedRows | SampleRows]:
        """The held-out rows, of each source apart where there are several."""
        return self.sources or {"all": self.held_out}

    def evaluation(
        self, share: Share, held_out: PackedRows | SampleRows | None = None, most: int | None = None
    ) -> Iterator[Batch | LabelledBatch]:
        """Yields a process's held-out batches: each row once, and as many batches on every process.

        Args:
            share: of the process.
            held_out: some of the held-out rows; by default all.
            most: bound on the rows, which are evenly spread then, and the same whoever takes them.
        """
        held_out = held_out or self.held_out
        if isinstance(held_out, LabelledRows):
            yield from held_out.evaluation(share, most)
            return
        empty = make_row([], self.sequence_length)
        for rows in share.batches(evenly(len(held_out), most)):
            yield stack([*(held_out[row] for row in rows), *[empty] * (share.micro_batch_size - len(rows))])


def _steps_at_hand(
    rows: PackedRows | SampleRows, share: Share, step: int
) -> Iterator[list[Batch] | list[LabelledBatch]]:
    while True:
        yield (
            rows.step(step, share)
            if isinstance(rows, LabelledRows)
            else [stack([rows[row] for row in indices]) for indices in share.rows(step)]
        )
        step += 1


def _steps_of_stream(stream: Iterator[Row], share: Share, first: int = 0) -> Iterator[list[Batch]]:
    """Reads every row of the stream and keeps this process's, from a step on."""
    for _ in _take(stream, first * share.rows_per_step):
        pass
    mine = {row for indices in share.rows(0) for row in indices}
    while True:
        kept = [row for index, row in enumerate(_take(stream, share.rows_per_step)) if index in mine]
        size = share.micro_batch_size
        yield [stack(kept[start : start + size]) for start in range(0, len(kept), size)]


def _take(stream: Iterator[Row], count: int) -> Iterable[Row]:
    for _ in range(count):
        yield next(stream)
