"""Documents made into what a run trains on: divided, tokenized and packed."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from transformers import PreTrainedTokenizerBase

from train.config import PROBLEMS, Config, DataConfig
from train.data.columns import column, select
from train.data.formats import RowError
from train.data.labelled import Batches, LabelledEncoder, LabelledRows, labels_of, labels_of_stream
from train.data.labelled_stream import LabelledStream
from train.data.loader import Counts, Data
from train.data.packing import PackedRows, Row, pack_stream
from train.data.problems import Problems, is_tolerated, refuse
from train.data.samples import SampleRows, pack_sample_stream
from train.data.sources import (
    load_documents,
    load_sources,
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
    training: Dataset | IterableDataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    *,
    weighted: bool = True,
) -> Data:
    """Tokenizes documents and packs them into rows; a second process finds the first's work in the cache.

    Args:
        training: documents to train on.
        held_out: documents to evaluate on.
        tokenizer: of the run.
        config: of the run.
        weighted: whether the training rows are mixed by the sources' weights, if they have any.

    Raises:
        DataError: for documents that cannot be trained on, and are not to be left out.
        ConfigError: for chats without a template.
    """
    weights = weights_of(config.data) if weighted else None
    if config.data.format in PROBLEMS:
        if isinstance(training, IterableDataset):
            return _pack_labelled_stream(training, held_out, tokenizer, config)
        return _pack_labelled(training, held_out, tokenizer, config, weights)
    are_texts = all(_are_texts(documents, config.data) for documents in (training, held_out))
    are_texts = are_texts and weights_of(config.data) is None
    if are_texts:
        data = _pack_texts(training, held_out, tokenizer, config)
    else:
        data = _pack_samples(training, held_out, tokenizer, config, weights)
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
        documents = select(held_out, np.flatnonzero(parts == part))
        name = data.sources[part].path
        name = f"{name}#{part}" if name in found else name
        if are_texts:
            found[name] = PackedRows(tokenize(documents, tokenizer, data.workers), data.sequence_length, epochs=1)
        else:
            encoded = encode(documents, Encoder(tokenizer, data, config.model.vocab_size))
            found[name] = SampleRows(encoded, data.sequence_length, window=window, epochs=1)
    return found


def _are_texts(documents: Dataset | IterableDataset, data: DataConfig) -> bool:
    """Says whether all documents are texts; of a stream by each source's first usable row, since its format is one."""
    if isinstance(documents, Dataset):
        return set(column(documents, "format").unique().to_pylist()) == {"text"}
    opened = load_sources(data) if len(data.sources) > 1 else [documents]
    firsts = (next((row["format"] for row in source if row["problem"] is None), "text") for source in opened)
    return all(form == "text" for form in firsts)


def _pack_texts(
    training: Dataset | IterableDataset, held_out: Dataset, tokenizer: PreTrainedTokenizerBase, config: Config
) -> Data:
    """Packs documents by cutting the stream of them."""
    data, length, seed = config.data, config.data.sequence_length, config.run.seed
    problems, held_out = Problems((held_out,)), usable(held_out)
    kept = PackedRows(tokenize(held_out, tokenizer, data.workers), length, epochs=1)
    if isinstance(training, Dataset):
        problems += Problems((training,))
        training = usable(training)
        tokens = tokenize(training, tokenizer, data.workers)
        rows = PackedRows(tokens, length, seed=seed, shuffle=data.shuffle, epochs=config.train.epochs)
        return Data(rows, None, kept, held_out, length, Counts.of(rows, problems.kinds), problems, places=training)
    counts = Counts()

    def stream() -> Iterator[Row]:
        def ids(documents: Documents) -> Iterator[list[int]]:
            return (document_ids(tokenizer, [_text_of(row)])[0] for row in documents)

        return pack_stream(
            _epochs(training, data, seed, counts, ids),
            length,
            seed=seed,
            shuffle_buffer=data.shuffle_buffer if data.shuffle else 1,
        )

    return Data(None, stream, kept, held_out, length, counts, problems, streamed=training)


def _text_of(document: dict[str, Any]) -> str:
    """Gives a document's text.

    Raises:
        DataError: for a sample, whose text is JSON.
    """
    if document["format"] != "text":
        raise DataError(f"{document['source']}: it is of data.format={document['format']}, and the stream holds texts")
    text: str = document["text"]
    return text


def _pack_samples(
    training: Dataset | IterableDataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    weights: list[float] | None,
) -> Data:
    """Packs samples, each of them whole."""
    data, length, seed = config.data, config.data.sequence_length, config.run.seed
    encoder = Encoder(tokenizer, data, config.model.vocab_size)
    window = data.packing_window if data.packing else 1
    kept = encode(held_out, encoder)
    problems = Problems((kept,))
    refuse(problems, data)
    held_out = _usable_samples(held_out, kept, problems)
    held_out_rows = SampleRows(kept, length, window=window, epochs=1)
    if isinstance(training, Dataset):
        encoded = encode(training, encoder)
        problems += Problems((encoded,))
        refuse(problems, data)
        if not column(encoded, "problem").null_count:
            raise DataError(f"no sample can be trained on: the first is {problems.first}")
        rows = SampleRows(
            encoded,
            length,
            window=window,
            seed=seed,
            shuffle=data.shuffle,
            epochs=config.train.epochs,
            weights=weights,
        )
        cut = int(column(encoded, "is_cut").to_numpy().sum())
        counts = Counts.of(rows, problems.kinds, cut)
        return Data(rows, None, held_out_rows, held_out, length, counts, problems, places=encoded)
    counts = Counts(left_out=problems.kinds.copy())

    def stream() -> Iterator[Row]:
        samples = _epochs(training, data, seed, counts, lambda rows: _stream_samples(rows, encoder, data, counts))
        parts = ((sample.ids, sample.trained) for sample in samples)
        return pack_sample_stream(parts, length, window=window, seed=seed, shuffle=data.shuffle)

    return Data(None, stream, held_out_rows, held_out, length, counts, problems, streamed=training)


def _pack_labelled(
    training: Dataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    weights: list[float] | None,
) -> Data:
    """Makes rows of labelled texts, one each."""
    data, length = config.data, config.data.sequence_length
    labels, padding = labels_of(training, data), give_padding(tokenizer)
    encoder = LabelledEncoder(tokenizer, data, labels)
    encoded, kept = (encode(documents, encoder) for documents in (training, held_out))
    problems = Problems((encoded, kept))
    refuse(problems, data)
    held_out = _usable_samples(held_out, kept, problems)
    if not column(encoded, "problem").null_count:
        raise DataError(f"no sample can be used: the first is {problems.first}")
    rows = LabelledRows(
        encoded,
        length,
        labels,
        padding,
        seed=config.run.seed,
        shuffle=data.shuffle,
        epochs=config.train.epochs,
        weights=weights,
    )
    cut = int(column(encoded, "is_cut").to_numpy().sum())
    counts = Counts.of(rows, problems.kinds, cut)
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
    problems = Problems((kept,))
    refuse(problems, data)
    held_out = _usable_samples(held_out, kept, problems)
    counts = Counts(left_out=problems.kinds.copy())

    def samples() -> Iterator[Sample]:
        return _epochs(training, data, seed, counts, lambda rows: _stream_samples(rows, encoder, data, counts))

    stream = LabelledStream(samples, Batches(labels, padding), seed, data.shuffle)
    kept_rows = LabelledRows(kept, length, labels, padding)
    return Data(None, stream, kept_rows, held_out, length, counts, problems, labels, streamed=training)


def _usable_samples(held_out: Dataset, encoded: Dataset, problems: Problems) -> Dataset:
    """Returns the held-out documents that became samples.

    Raises:
        DataError: when none did.
    """
    kept = select(held_out, np.flatnonzero(column(encoded, "problem").is_null().to_numpy()))
    if not len(kept):
        raise DataError(f"no held-out sample can be used: the first is {problems.first}")
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
                if not is_tolerated(str(sample), data):
                    raise DataError(f"{row['source']}: {sample}")
                counts.left_out[str(sample).partition(":")[0]] += 1
            else:
                counts.cut += sample.is_cut
                yield sample
