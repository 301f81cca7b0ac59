"""The data of a run: which rows each process takes at each step, prepared ahead of it."""

import hashlib
import inspect
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from train.config import Config, DataConfig
from train.data.packing import Batch, PackedRows, Row, make_row, pack_stream, stack
from train.data.sources import load_documents, split_documents, split_stream
from train.data.tokenizer import document_ids

T = TypeVar("T")


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


@dataclass(frozen=True)
class Data:
    """What a run trains on and is evaluated on.

    Attributes:
        rows: training rows, at hand; None with streaming.
        stream: opens the training rows of a stream from its beginning; None without streaming.
        held_out: rows of the held-out documents, in their order.
        held_out_documents: those documents, with their `text`.
        sequence_length: S.
    """

    rows: PackedRows | None
    stream: Callable[[], Iterator[Row]] | None
    held_out: PackedRows
    held_out_documents: Dataset
    sequence_length: int

    def __str__(self) -> str:
        held_out = f"{len(self.held_out_documents)} held out"
        if self.rows is None:
            return f"a stream of documents, {held_out}"
        documents = len(self.rows.lengths)
        return f"{self.rows.tokens_per_epoch:,} tokens in {documents:,} documents, {held_out}"

    def steps(self, share: Share) -> Iterator[list[Batch]]:
        """Yields a process's micro-batches, step after step, without end."""
        if self.rows is not None:
            return _steps_at_hand(self.rows, share)
        assert self.stream is not None
        return _steps_of_stream(self.stream(), share)

    def evaluation(self, share: Share) -> Iterator[Batch]:
        """Yields a process's held-out batches: each row once, and as many batches on every process."""
        count = len(self.held_out)
        empty = make_row([], self.sequence_length)
        for step in range(-(-count // share.rows_per_step)):
            for rows in share.rows(step):
                yield stack([self.held_out[row] if row < count else empty for row in rows])


def open_documents(config: DataConfig) -> tuple[Dataset | IterableDataset, Dataset]:
    """Opens the documents and divides them into those to train on and those held out.

    Raises:
        DataError, MachineError: see `load_documents`.
    """
    documents = load_documents(config)
    if isinstance(documents, IterableDataset):
        return split_stream(documents, config.held_out_fraction, config.held_out_documents)
    return split_documents(documents, config.held_out_fraction, config.held_out_documents)


def pack(
    training: Dataset | IterableDataset, held_out: Dataset, tokenizer: PreTrainedTokenizerBase, config: Config
) -> Data:
    """Tokenizes documents and packs them into rows; a second process finds the first's work in the cache."""
    data, length = config.data, config.data.sequence_length
    rows, stream = None, None
    if isinstance(training, Dataset):
        tokens = _tokenize(training, tokenizer)
        rows = PackedRows(tokens, length, seed=config.run.seed, shuffle=data.shuffle, epochs=config.train.epochs)
    else:

        def stream() -> Iterator[Row]:
            seed, buffer = config.run.seed, data.shuffle_buffer if data.shuffle else 1
            return pack_stream(_stream_ids(training, tokenizer, data, seed), length, seed=seed, shuffle_buffer=buffer)

    return Data(
        rows=rows,
        stream=stream,
        held_out=PackedRows(_tokenize(held_out, tokenizer), length, epochs=1),
        held_out_documents=held_out,
        sequence_length=length,
    )


def _tokenize(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Maps `text` to `input_ids`, cached by the content of the documents, the tokenizer and the code."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": document_ids(tokenizer, batch["text"])}

    code = Path(inspect.getfile(document_ids)).read_text(encoding="utf-8")
    described = [code, documents._fingerprint, str(tokenizer.bos_token_id), str(tokenizer.eos_token_id)]
    described.append(tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer))
    return documents.map(
        encode,
        batched=True,
        batch_size=256,
        remove_columns=documents.column_names,
        features=Features({"input_ids": List(Value("int32"))}),
        new_fingerprint=hashlib.blake2b("\0".join(described).encode(), digest_size=8).hexdigest(),
        desc="tokenizing",
    )


def _stream_ids(
    documents: IterableDataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int
) -> Iterator[list[int]]:
    """Yields the ids of a stream's documents, epoch after epoch."""
    if data.shuffle:
        documents = documents.shuffle(seed=seed, buffer_size=data.shuffle_buffer)
    epoch = 0
    while True:
        documents.set_epoch(epoch)
        for row in documents:
            yield document_ids(tokenizer, [row["text"]])[0]
        epoch += 1


def _steps_at_hand(rows: PackedRows, share: Share) -> Iterator[list[Batch]]:
    step = 0
    while True:
        yield [stack([rows[row] for row in indices]) for indices in share.rows(step)]
        step += 1


def _steps_of_stream(stream: Iterator[Row], share: Share) -> Iterator[list[Batch]]:
    """Reads every row of the stream and keeps this process's."""
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
