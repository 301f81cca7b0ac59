"""The data of a run: which rows each process takes at each step, prepared ahead of it."""

import hashlib
import json
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, Generic, TypeVar

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from transformers import PreTrainedTokenizerBase

from train.config import PROBLEMS, Config, DataConfig
from train.data.formats import RowError
from train.data.labelled import (
    Batches,
    LabelledBatch,
    LabelledEncoder,
    LabelledRows,
    Labels,
    labels_of,
    labels_of_stream,
)
from train.data.labelled_stream import LabelledStream
from train.data.packing import Batch, PackedRows, Row, make_row, pack_stream, stack
from train.data.samples import SampleRows, pack_sample_stream
from train.data.share import Share, evenly
from train.data.sources import (
    column,
    load_documents,
    load_sources,
    problems_of,
    refuse,
    split_documents,
    split_stream,
    usable,
)
from train.data.templates import Encoder, Sample
from train.data.tokenized import encode, tokenize
from train.data.tokenizer import document_ids, give_padding
from train.errors import DataError

T = TypeVar("T")
Documents = Iterator[dict[str, Any]]
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
    def of(cls, rows: PackedRows | SampleRows, problems: list[tuple[str, str]], cut: int = 0) -> "Counts":
        """Counts what is at hand."""
        return cls(
            documents=int((rows.lengths > 0).sum()),
            tokens=rows.tokens_per_epoch,
            trained_tokens=rows.trained_tokens_per_epoch,
            cut=cut,
            left_out=kinds_of(problems),
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


def kinds_of(problems: list[tuple[str, str]]) -> Counter[str]:
    """Counts problems by their kind."""
    return Counter(problem.partition(":")[0] for _, problem in problems)


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
        problems: place and problem of the documents left out; with streaming, of the held-out ones.
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
    problems: list[tuple[str, str]] = field(default_factory=list)
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


def open_documents(config: DataConfig) -> tuple[Dataset | IterableDataset, Dataset]:
    """Opens the documents and divides them into those to train on and those held out.

    Raises:
        DataError, MachineError: see `load_documents`.
    """
    if config.held_out_path is not None:
        held_out = load_documents(replace(config, path=config.held_out_path, sources=[], streaming=False))
        return _mixed(load_sources(config), config), held_out
    if config.streaming:
        opened = load_sources(config)
        most = -(-config.held_out_documents // len(opened))
        divided = [split_stream(documents, config.held_out_fraction, most) for documents in opened]
        return _mixed([training for training, _ in divided], config), concatenate_datasets(
            [kept for _, kept in divided]
        )
    return split_documents(load_documents(config), config.held_out_fraction, config.held_out_documents)


def _mixed(opened: list[Any], config: DataConfig) -> Dataset | IterableDataset:
    """Joins sources: one after the other, or a stream with weights by chance, until each has ended once."""
    weights = weights_of(config)
    if len(opened) == 1:
        return opened[0]
    if weights is None or not config.streaming:
        return concatenate_datasets(opened)
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(opened, probabilities=shares, seed=0, stopping_strategy="all_exhausted")


def weights_of(config: DataConfig) -> list[float] | None:
    """Lists the weights of the sources, if they have any."""
    weights = [source.weight for source in config.sources if source.weight is not None]
    return weights or None


def pack(
    training: Dataset | IterableDataset, held_out: Dataset, tokenizer: PreTrainedTokenizerBase, config: Config
) -> Data:
    """Tokenizes documents and packs them into rows; a second process finds the first's work in the cache.

    Raises:
        DataError: for documents that cannot be trained on, and are not to be left out.
        ConfigError: for chats without a template.
    """
    if config.data.format in PROBLEMS:
        if isinstance(training, IterableDataset):
            return _pack_labelled_stream(training, held_out, tokenizer, config)
        return _pack_labelled(training, held_out, tokenizer, config)
    are_texts = all(_are_texts(documents) for documents in (training, held_out)) and weights_of(config.data) is None
    data = (_pack_texts if are_texts else _pack_samples)(training, held_out, tokenizer, config)
    return replace(data, sources=_by_source(data.held_out_documents, tokenizer, config, are_texts=are_texts))


def _by_source(
    held_out: Dataset, tokenizer: PreTrainedTokenizerBase, config: Config, *, are_texts: bool
) -> dict[str, PackedRows | SampleRows]:
    """Packs the held-out documents of each source apart, where there are several; all of them are usable."""
    data, parts = config.data, column(held_out, "part").to_numpy()
    if len(np.unique(parts)) < 2:
        return {}
    window = data.packing_window if data.packing else 1
    found: dict[str, PackedRows | SampleRows] = {}
    for part in np.unique(parts).tolist():
        documents = held_out.select(np.flatnonzero(parts == part))
        name = data.sources[part].path
        name = f"{name}#{part}" if name in found else name
        if are_texts:
            found[name] = PackedRows(tokenize(documents, tokenizer, data.workers), data.sequence_length, epochs=1)
        else:
            encoded = encode(documents, Encoder(tokenizer, data, config.model.vocab_size))
            found[name] = SampleRows(encoded, data.sequence_length, window=window, epochs=1)
    return found


def _are_texts(documents: Dataset | IterableDataset) -> bool:
    if isinstance(documents, Dataset):
        return set(column(documents, "format").unique().to_pylist()) == {"text"}
    return all(row["format"] == "text" for row in documents.take(100))


def _pack_texts(
    training: Dataset | IterableDataset, held_out: Dataset, tokenizer: PreTrainedTokenizerBase, config: Config
) -> Data:
    """Packs documents by cutting the stream of them."""
    data, length, seed = config.data, config.data.sequence_length, config.run.seed
    problems, held_out = problems_of(held_out), usable(held_out)
    kept = PackedRows(tokenize(held_out, tokenizer, data.workers), length, epochs=1)
    if isinstance(training, Dataset):
        problems += problems_of(training)
        training = usable(training)
        tokens = tokenize(training, tokenizer, data.workers)
        rows = PackedRows(tokens, length, seed=seed, shuffle=data.shuffle, epochs=config.train.epochs)
        return Data(rows, None, kept, held_out, length, Counts.of(rows, problems), problems, places=training)
    counts = Counts()

    def stream() -> Iterator[Row]:
        def ids(documents: Documents) -> Iterator[list[int]]:
            return (document_ids(tokenizer, [row["text"]])[0] for row in documents)

        return pack_stream(
            _epochs(training, data, seed, counts, ids),
            length,
            seed=seed,
            shuffle_buffer=data.shuffle_buffer if data.shuffle else 1,
        )

    return Data(None, stream, kept, held_out, length, counts, problems, streamed=training)


def _pack_samples(
    training: Dataset | IterableDataset, held_out: Dataset, tokenizer: PreTrainedTokenizerBase, config: Config
) -> Data:
    """Packs samples, each of them whole."""
    data, length, seed = config.data, config.data.sequence_length, config.run.seed
    encoder = Encoder(tokenizer, data, config.model.vocab_size)
    window = data.packing_window if data.packing else 1
    kept = encode(held_out, encoder)
    problems = problems_of(kept)
    refuse(problems, data)
    held_out = _usable_samples(held_out, kept, problems)
    held_out_rows = SampleRows(kept, length, window=window, epochs=1)
    if isinstance(training, Dataset):
        encoded = encode(training, encoder)
        problems += problems_of(encoded)
        refuse(problems, data)
        if not column(encoded, "problem").null_count:
            raise DataError(f"no sample can be trained on: the first is {problems[0][0]}: {problems[0][1]}")
        rows = SampleRows(
            encoded,
            length,
            window=window,
            seed=seed,
            shuffle=data.shuffle,
            epochs=config.train.epochs,
            weights=weights_of(data),
        )
        cut = int(column(encoded, "is_cut").to_numpy().sum())
        counts = Counts.of(rows, problems, cut)
        return Data(rows, None, held_out_rows, held_out, length, counts, problems, places=encoded)
    counts = Counts(left_out=kinds_of(problems))

    def stream() -> Iterator[Row]:
        samples = _epochs(training, data, seed, counts, lambda rows: _stream_samples(rows, encoder, data, counts))
        parts = ((sample.ids, sample.trained) for sample in samples)
        return pack_sample_stream(parts, length, window=window, seed=seed, shuffle=data.shuffle)

    return Data(None, stream, held_out_rows, held_out, length, counts, problems, streamed=training)


def _pack_labelled(training: Dataset, held_out: Dataset, tokenizer: PreTrainedTokenizerBase, config: Config) -> Data:
    """Makes rows of labelled texts, one each."""
    data, length = config.data, config.data.sequence_length
    labels, padding = labels_of(training, data), give_padding(tokenizer)
    encoder = LabelledEncoder(tokenizer, data, labels)
    encoded, kept = (encode(documents, encoder) for documents in (training, held_out))
    problems = [*problems_of(encoded), *problems_of(kept)]
    refuse(problems, data)
    held_out = _usable_samples(held_out, kept, problems)
    if not column(encoded, "problem").null_count:
        raise DataError(f"no sample can be used: the first is {problems[0][0]}: {problems[0][1]}")
    rows = LabelledRows(
        encoded,
        length,
        labels,
        padding,
        seed=config.run.seed,
        shuffle=data.shuffle,
        epochs=config.train.epochs,
        weights=weights_of(data),
    )
    cut = int(column(encoded, "is_cut").to_numpy().sum())
    counts = Counts.of(rows, problems, cut)
    counts.fullness, counts.labels = rows.fullness(config.train.micro_batch_size), rows.histogram()
    kept_rows = LabelledRows(kept, length, labels, padding)
    return Data(rows, None, kept_rows, held_out, length, counts, problems, labels, places=encoded)


def _pack_labelled_stream(
    training: IterableDataset, held_out: Dataset, tokenizer: PreTrainedTokenizerBase, config: Config
) -> Data:
    """Makes rows of labelled texts, one each, as they come."""
    data, length, seed = config.data, config.data.sequence_length, config.run.seed
    labels, padding = labels_of_stream(training, data), give_padding(tokenizer)
    encoder = LabelledEncoder(tokenizer, data, labels)
    kept = encode(held_out, encoder)
    problems = problems_of(kept)
    refuse(problems, data)
    held_out = _usable_samples(held_out, kept, problems)
    counts = Counts(left_out=kinds_of(problems))

    def samples() -> Iterator[Sample]:
        return _epochs(training, data, seed, counts, lambda rows: _stream_samples(rows, encoder, data, counts))

    stream = LabelledStream(samples, Batches(labels, padding), seed, data.shuffle)
    kept_rows = LabelledRows(kept, length, labels, padding)
    return Data(None, stream, kept_rows, held_out, length, counts, problems, labels, streamed=training)


def _usable_samples(held_out: Dataset, encoded: Dataset, problems: list[tuple[str, str]]) -> Dataset:
    """Returns the held-out documents that became samples.

    Raises:
        DataError: when none did.
    """
    kept = held_out.select(np.flatnonzero(column(encoded, "problem").is_null().to_numpy()))
    if not len(kept):
        raise DataError(f"no held-out sample can be used: the first is {problems[0][0]}: {problems[0][1]}")
    return kept


def _epochs(
    documents: IterableDataset, data: DataConfig, seed: int, counts: Counts, made: Callable[[Documents], Iterator[T]]
) -> Iterator[T]:
    """Yields what is made of a stream's documents, epoch after epoch, and counts those left out.

    Args:
        documents: in their order.
        data: says how they are shuffled.
        seed: of their order.
        counts: of those left out, the held-out ones among them already.
        made: makes of an epoch's documents what is trained on.

    Raises:
        DataError: after an epoch of which nothing came.
    """
    if data.shuffle:
        documents = documents.shuffle(seed=seed, buffer_size=data.shuffle_buffer)

    held_out = counts.left_out.copy()

    def usable_of(epoch: int) -> Documents:
        documents.set_epoch(epoch)
        for row in documents:
            if row["problem"] is None:
                yield row
            else:
                counts.left_out[row["problem"].partition(":")[0]] += 1

    for epoch in count():
        is_empty = True
        for one in made(usable_of(epoch)):
            yield one
            is_empty = False
        if is_empty:
            kinds = ", ".join(f"{number:,} {kind}" for kind, number in (counts.left_out - held_out).most_common())
            raise DataError(f"data.path={data.names}: nothing of the stream can be trained on (left out: {kinds})")


def _stream_samples(
    documents: Documents, encoder: Encoder | LabelledEncoder, data: DataConfig, counts: Counts
) -> Iterator[Sample]:
    """Encodes documents as they come.

    Raises:
        DataError: for one that cannot be trained on, and is not to be left out.
    """
    while batch := list(islice(documents, 64)):
        for row, sample in zip(batch, encoder.encode(batch), strict=True):
            if isinstance(sample, RowError):
                refuse([(row["source"], str(sample))], data)
                counts.left_out[str(sample).partition(":")[0]] += 1
            else:
                counts.cut += sample.is_cut
                yield sample


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


class Prefetch(Generic[T]):
    """Runs an iterator in a thread, a few items ahead of its reader.

    An error of the iterator is raised in the reader, at its place in the order.
    """

    def __init__(self, items: Iterator[T], ahead: int = 2) -> None:
        self._queue: queue.Queue[T | BaseException] = queue.Queue(maxsize=ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), name="prefetch", daemon=True)
        self._thread.start()

    def _fill(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item: T | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Ends the thread; one that is stuck in a read is left behind, and dies with the process."""
        self._stopped.set()
        self._thread.join(timeout=1.0)
