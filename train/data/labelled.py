"""Labelled texts: which labels there are, what of them a model learns, and batches of rows that are as long.

A row is one text, as the tokenizer's own call writes it, so that a classifier sees in training what it sees in use. The
rows of a few steps in a row are sorted by length before they are divided into steps, and those of a step before they
are divided among processes and micro-steps: rows that are padded to one length have nearly the same.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixtral.ops.cross_entropy import IGNORE_INDEX
from train.config import PROBLEMS, DataConfig
from train.data.columns import column
from train.data.formats import RowError
from train.data.packing import Batch, TokenTable
from train.data.samples import SampleRows
from train.data.share import Share, evenly
from train.data.templates import Sample
from train.errors import ConfigError, DataError

WINDOW = 8  # steps whose rows are sorted by length together
LONGEST_NUMBER = 19  # digits of what may be a label's index; Python does not even read thousands of them
SEEN = 1000  # rows of a stream, whose labels are named where none are given


@dataclass(frozen=True)
class Labels:
    """What a classifier is to tell apart.

    Attributes:
        problem: a `problem_type` of transformers.
        names: of the labels, by their indices; of a regression, of its one number.
    """

    problem: str
    names: tuple[str, ...]

    def target(self, label: Any) -> list[float]:
        """Gives the index of a row's label, those of its several labels, or its number.

        Raises:
            RowError: for a label that there is not.
        """
        if self.problem == "regression":
            return [label]
        if self.problem == "single_label_classification":
            return [self._index(label)]
        return sorted({self._index(one) for one in label})

    def _index(self, label: str | int) -> int:
        """Finds a label among the names; a whole number may be an index instead, where no name is a number itself."""
        for name in (label, str(int(label)) if _is_number(label) else label):
            if name in self.names:
                return self.names.index(name)
        if not _is_number(label) or any(map(_is_numeric, self.names)):
            raise RowError(
                "unknown label", f"{label!r} is none of {', '.join(self.names)}: mend it, or name it in data.labels"
            )
        if not 0 <= int(label) < len(self.names):
            raise RowError(
                "label out of range",
                f"{label}, but the {len(self.names)} labels from 0 on are {', '.join(self.names)}: mend it, or name "
                "more in data.labels",
            )
        return int(label)


def labels_of(documents: Dataset, data: DataConfig) -> Labels:
    """Gives the labels that `data.labels` names, or else those that the training documents have.

    Raises:
        DataError: where those are no classes.
    """
    problem, given = PROBLEMS[data.format], _given_labels(data)
    if given is not None:
        return given
    names = _names(column(documents, "label").unique().to_pylist(), data)
    if len(names) < (2 if problem == "single_label_classification" else 1):
        alike = f"the label {names[0]}" if names else "no label, or is a bad row"
        raise DataError(f"data.path={data.names}: every row has {alike}, which teaches nothing")
    return Labels(problem, names)


def _names(labels: Iterable[str | None], data: DataConfig) -> tuple[str, ...]:
    """Lists the labels that rows have, in the order of their indices.

    Raises:
        DataError: where these would not be sure.
    """
    found = {one for label in labels if label is not None for one in _several(json.loads(label))}
    numbers = sorted({int(label) for label in found if _is_number(label)})
    named = sorted(label for label in found if not _is_number(label))
    if numbers and named:
        raise DataError(
            f"data.path={data.names}: some labels are names ({named[0]!r}) and some numbers ({numbers[0]}): write them "
            "alike, or list the names in data.labels"
        )
    if numbers != list(range(len(numbers))):
        few = ", ".join(map(str, numbers[:10]))
        raise DataError(
            f"data.path={data.names}: the labels {few}, ... are not the numbers from 0 on: list the names of all in "
            "data.labels"
        )
    return tuple(map(str, numbers or named))


def labels_of_stream(documents: IterableDataset, data: DataConfig) -> Labels:
    """Gives the labels that `data.labels` names, as it must for a stream, whose labels are not all seen before its end.

    Raises:
        ConfigError: where it names none, with those of the first documents.
    """
    given = _given_labels(data)
    if given is None:
        names = _names((row["label"] for row in documents.take(SEEN)), data)
        written = [name if re.fullmatch(r"[\w -]+", name, re.ASCII) else json.dumps(name) for name in names]
        word = shlex.quote(f"data.labels=[{','.join(written)}]") if names else "data.labels"
        raise ConfigError(
            f"data.path={data.names}: with data.streaming=true it is read while a run trains, so all labels must be "
            f"named before: set {word}" + (", which its first rows have, and add those that they miss" if names else "")
        )
    return given


def _given_labels(data: DataConfig) -> Labels | None:
    """Gives the labels that need no data to be known."""
    problem = PROBLEMS[data.format]
    if problem == "regression":
        return Labels(problem, ("value",))
    return Labels(problem, tuple(data.labels)) if data.labels else None


def _several(label: Any) -> list[Any]:
    return label if isinstance(label, list) else [label]


def _is_number(label: str | int) -> bool:
    """Says whether a label is a number, as the text of a CSV may be."""
    return isinstance(label, int) or (len(label) < LONGEST_NUMBER and label.strip().isdecimal())


def _is_numeric(name: str) -> bool:
    """Says whether the name of a label is a number of any kind."""
    return re.fullmatch(r"\s*[+-]?[\d.]*\d[\d.]*\s*", name) is not None


class LabelledEncoder:
    """Turns labelled texts into samples.

    Args:
        tokenizer: whose own call writes the texts, its special tokens included; a mark in a text is text.
        data: says how long a text may be.
        labels: what there is to tell apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, labels: Labels) -> None:
        self.tokenizer, self.data, self._labels = tokenizer, data, labels

    def described(self) -> list[str]:
        """Lists what its samples depend on besides documents and tokenizer."""
        return [self._labels.problem, *self._labels.names, self.data.too_long, str(self.data.sequence_length)]

    def encode(self, documents: Sequence[Mapping[str, Any]]) -> list[Sample | RowError]:
        """Encodes documents; a `RowError` takes the place of one that cannot be trained on."""
        if not documents:
            return []
        options = {"split_special_tokens": True, "return_attention_mask": False, "verbose": False}
        all_ids = self.tokenizer([document["text"] for document in documents], **options)["input_ids"]
        result: list[Sample | RowError] = []
        for document, ids in zip(documents, all_ids, strict=True):
            try:
                result.append(self._sample(document, ids))
            except RowError as bad:
                result.append(bad)
        return result

    def _sample(self, document: Mapping[str, Any], ids: list[int]) -> Sample:
        target = self._labels.target(json.loads(document["label"]))
        length = self.data.sequence_length
        is_cut = len(ids) > length
        if is_cut and self.data.too_long != "cut":
            fix = "raise it, or set data.too_long=cut or skip"
            raise RowError("too long", f"{len(ids)} tokens, but data.sequence_length={length}: {fix}")
        kept = np.asarray(ids[:length], np.int32)
        return Sample(kept, np.zeros(len(kept), bool), is_cut, tuple(target))


class LabelledBatch(NamedTuple):
    """Rows of one text each, padded on the right.

    Attributes:
        input_ids: (B, S) token ids.
        position_ids: (B, S), from 0 on.
        labels: (B,) class indices, -100 where a row is none; else (B, labels), NaN where it is none.
        token_mask: (B, S), false for padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    token_mask: Tensor

    @property
    def trained(self) -> Tensor:
        """Number of labelled rows."""
        return self.is_row.sum()

    @property
    def is_row(self) -> Tensor:
        """(B,): which rows are no padding."""
        return self.token_mask[:, 0]

    def to(self, device: torch.device) -> "LabelledBatch":
        """Moves the batch."""
        return LabelledBatch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def flattened(self) -> "LabelledBatch":
        """Stays as it is: a row is one document."""
        return self


AnyBatch = Batch | LabelledBatch


Read = Callable[[int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Batches:
    """Pads labelled texts into batches.

    Attributes:
        labels: what there is to tell apart.
        padding: id of the token that fills rows up.
    """

    labels: Labels
    padding: int

    def divided(self, lengths: np.ndarray, read: Read, share: Share) -> list[LabelledBatch]:
        """Returns a process's micro-batches of a step; those of a micro-step have one length everywhere.

        Args:
            lengths: tokens of the step's texts; where they are fewer than its rows, the last rows are padding.
            read: gives the ids and the target of the text of a row; of this process's alone it is asked.
            share: of the process.
        """
        width = share.world_size * share.micro_batch_size
        batches = []
        for rows in share.rows(0):
            longest = int(lengths[rows.start // width * width :][:width].max(initial=1))
            texts = [read(row) for row in rows if row < len(lengths)]
            batches.append(self._batch(texts, share.micro_batch_size, longest))
        return batches

    def _batch(self, texts: list[tuple[np.ndarray, np.ndarray]], size: int, longest: int) -> LabelledBatch:
        ids, mask = np.full((size, longest), self.padding, np.int64), np.zeros((size, longest), bool)
        is_class = self.labels.problem == "single_label_classification"
        labels = (
            torch.full((size,), IGNORE_INDEX) if is_class else torch.full((size, len(self.labels.names)), torch.nan)
        )
        for row, (text, label) in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = text, True
            target = torch.from_numpy(label.copy())
            if is_class:
                labels[row] = int(target[0])
            elif self.labels.problem == "regression":
                labels[row] = target
            else:
                labels[row] = 0.0
                labels[row, target.long()] = 1.0
        positions = torch.arange(longest).expand(size, -1)
        return LabelledBatch(torch.from_numpy(ids), positions, labels, torch.from_numpy(mask))


def arranged(lengths: np.ndarray, size: int, random: np.random.Generator | None) -> np.ndarray:
    """Orders the texts of a window: each step is sorted by length, and so are they before they are divided into steps.

    Args:
        lengths: tokens of the texts.
        size: rows of a step.
        random: shuffles the window's steps, but for one that is not full; None leaves the texts in their steps.

    Returns:
        Indices into `lengths`, step after step.
    """
    order = np.arange(len(lengths)) if random is None else np.argsort(lengths, kind="stable")
    steps = [order[start : start + size] for start in range(0, len(order), size)]
    if random is not None:
        whole = len(order) // size
        steps = [*(steps[number] for number in random.permutation(whole)), *steps[whole:]]
    return np.concatenate([step[np.argsort(lengths[step], kind="stable")] for step in steps] or [order])


class LabelledRows(SampleRows):
    """Labelled texts that are at hand: the rows of any step.

    Args:
        samples: see `train.data.tokenized.ENCODED`; the empty ones are left out.
        sequence_length: bound on a text.
        labels: what there is to tell apart.
        padding: id of the token that fills rows up.
        options: as of `SampleRows`.
    """

    def __init__(self, samples: Dataset, sequence_length: int, labels: Labels, padding: int, **options: Any) -> None:
        super().__init__(samples, sequence_length, window=1, **options)
        self.labels, self._batches = labels, Batches(labels, padding)
        self._targets = TokenTable(samples, "target")
        self._window = lru_cache(maxsize=2)(self._window_of)

    def target(self, sample: int) -> np.ndarray:
        """Returns a sample's label: its index, those of its several labels, or its number."""
        return self._targets.read(sample, 0, int(self._targets.lengths[sample]))

    def histogram(self) -> dict[str, int]:
        """Counts the samples of each label; of a regression, none."""
        if self.labels.problem == "regression":
            return {}
        counts = np.zeros(len(self.labels.names), np.int64)
        for targets in self._targets.values():
            counts += np.bincount(targets.astype(np.int64), minlength=len(counts))
        return dict(zip(self.labels.names, counts.tolist(), strict=True))

    def step(self, step: int, share: Share) -> list[LabelledBatch]:
        """Returns a process's micro-batches of a step, counted from 0; past the end their rows are padding."""
        return self._divided(self._of_step(step, share.rows_per_step), share)

    def samples(self, step: int, share: Share) -> list[list[int]]:
        """Lists the samples of those micro-batches."""
        samples = self._of_step(step, share.rows_per_step)
        return [samples[rows.start : rows.stop].tolist() for rows in share.rows(0)]

    def _of_step(self, step: int, size: int) -> np.ndarray:
        window, within = divmod(step, WINDOW)
        return self._window(window, size)[within * size : (within + 1) * size]

    def evaluation(self, share: Share, most: int | None = None) -> Iterator[LabelledBatch]:
        """Yields a process's batches: each sample once, the shortest first, and as many batches on every process.

        Args:
            share: of the process.
            most: bound on the samples, which are evenly spread then.
        """
        samples = np.flatnonzero(self.lengths)
        samples = samples[np.argsort(self.lengths[samples], kind="stable")]
        samples = samples[evenly(len(samples), most)]
        for start in range(0, len(samples), share.rows_per_step):
            yield from self._divided(samples[start : start + share.rows_per_step], share)

    def fullness(self, rows: int) -> float:
        """Gives the share of the first epoch's batches that is no padding, where so many rows are padded alike."""
        end = self.rows_per_epoch if self._end is None else min(self.rows_per_epoch, self._end)
        windows = end // (WINDOW * rows)
        samples = self._between(0, windows * WINDOW * rows)
        lengths = self.lengths[samples].reshape(windows, WINDOW * rows)
        if self.shuffle:  # sorts the texts of a window; the order of its steps is nothing to their lengths
            lengths.sort(axis=1)
        laid, total = rows * int(lengths.reshape(-1, rows).max(axis=1).sum()), int(lengths.sum())
        for step in range(windows * WINDOW, -(-end // rows)):
            lengths = self.lengths[self._of_step(step, rows)]
            laid += rows * int(lengths.max(initial=0))
            total += int(lengths.sum())
        return total / max(1, laid)

    def _window_of(self, window: int, size: int) -> np.ndarray:
        """Returns the samples of the steps of a window, each step sorted by length; fewer where the samples end."""
        first, stop = window * WINDOW * size, (window + 1) * WINDOW * size
        samples = self._between(first, stop if self._end is None else min(stop, self._end))
        random = np.random.default_rng((self.seed, window, size)) if self.shuffle else None
        return samples[arranged(self.lengths[samples], size, random)]

    def _between(self, first: int, stop: int) -> np.ndarray:
        """Returns the samples of rows `first` to `stop`, counted through all epochs."""
        epoch, parts = 0, [np.zeros(0, np.int64)]
        while first < stop:
            while first >= self._end_of(epoch):
                epoch += 1
            begin = self._end_of(epoch - 1) if epoch else 0
            last = min(stop, self._end_of(epoch))
            parts.append(self._unit_sample[self._plan(epoch).units[first - begin : last - begin]])
            first = last
        return np.concatenate(parts)

    def _divided(self, samples: np.ndarray, share: Share) -> list[LabelledBatch]:
        """Returns this process's micro-batches of some samples."""
        lengths = self.lengths[samples]

        def read(row: int) -> tuple[np.ndarray, np.ndarray]:
            sample = int(samples[row])
            return self._ids.read(sample, 0, int(lengths[row])), self.target(sample)

        return self._batches.divided(lengths, read, share)
