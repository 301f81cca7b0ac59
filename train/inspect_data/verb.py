"""`cierzo inspect_data`: what a recipe's data comes to, row by row checked, without a model and without training."""

import io
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from train.compose import Composed, compose
from train.config import PROBLEMS, Config
from train.ending import Ending
from train.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from train.data.loader import Data
    from train.folder import RunFolder

LISTED = 20  # bad rows
SHOWN, SHOWN_TOKENS = 3, 400  # samples, and tokens of each
BINS = 12
STREAMED = 10_000  # documents of a stream
GREEN, PLAIN = "\033[32m", "\033[0m"


def inspect_data(words: Sequence[str]) -> int:
    """Runs the verb.

    Args:
        words: `recipe=...` and `KEY=VALUE`, as for training.

    Returns:
        The exit code: 0 the data can be trained on, 2 config, 3 data, 6 environment, 128 + n for signal n.
    """
    with Ending() as ending:
        composed = compose(words)
        from train.setup import quiet_libraries, signals_as_errors

        with signals_as_errors():
            quiet_libraries()
            if isinstance(sys.stdout, io.TextIOWrapper):  # of a terminal that cannot show every character
                sys.stdout.reconfigure(errors="replace")
            ending.folder = _open_folder(composed)
            ending.message = _inspect(composed.config, ending.folder)
    return ending.code


def _open_folder(composed: Composed) -> "RunFolder":
    from train.folder import RunFolder, folder_name

    folder = RunFolder(Path(folder_name(composed)).expanduser().resolve())
    composed.config.run.dir = str(folder.path)
    folder.describe(composed, processes=1, device="cpu")
    return folder


def _inspect(config: Config, folder: "RunFolder") -> str:
    """Prints all there is to say of the data.

    Raises:
        DataError: for bad rows, once they are listed, unless they are to be left out.
    """
    from train.data.build import pack
    from train.data.problems import refused_kinds
    from train.data.tokenizer import open_tokenizer
    from train.observe.plots import draw_lengths

    too_long = "skip" if config.data.too_long == "error" else config.data.too_long
    lenient = replace(config, data=replace(config.data, bad_rows="skip", too_long=too_long))
    training, held_out = _open(lenient)
    tokenizer = open_tokenizer(config.data.tokenizer, config.model.vocab_size, training, config.data.chat_template)
    data = pack(training, held_out, tokenizer, lenient)
    refused = refused_kinds(data.problems, config.data)
    _print_problems(data.problems.of(refused))
    figures = _figures(config, data, len(training) + len(held_out))
    print("\n".join(f"{name:>14}  {text}" for name, text in figures.items()))
    lengths, bound = data.lengths, config.data.sequence_length
    print("\n" + _histogram(lengths))
    _print_samples(data, tokenizer)
    target = folder.path / "plots" / "lengths.png"
    target.parent.mkdir(exist_ok=True)
    draw_lengths(lengths, bound, target)
    folder.write_json("data.json", figures)
    print(f"the lengths: {target}")
    if refused:
        raise DataError(f"{refused.total():,} bad rows, listed above: mend them, or set {_remedy(refused)}")
    return "the data can be trained on"


def _open(config: Config) -> "tuple[Dataset, Dataset]":
    """Opens all documents, or the first ones of a stream."""
    from datasets import Dataset

    from train.data.build import open_documents
    from train.data.labelled import labels_of_stream
    from train.data.sources import as_dataset

    training, held_out = open_documents(config.data)
    if isinstance(training, Dataset):
        return training, held_out
    if config.data.format in PROBLEMS:
        labels_of_stream(training, config.data)
    first = as_dataset(list(training.take(STREAMED)))
    print(f"data.streaming=true: of the stream, the first {len(first):,} documents are inspected")
    return first, held_out


def _remedy(kinds: Collection[str]) -> str:
    are_long = [kind.startswith("too long") for kind in kinds]
    keys = ["data.bad_rows=skip"] * (not all(are_long)) + ["data.too_long=cut or skip"] * any(are_long)
    return " and ".join(keys)


def _print_problems(refused: Iterator[tuple[str, str]]) -> None:
    for place, problem in islice(refused, LISTED):
        print(f"bad row  {place}: {problem}")
    if kinds := Counter(problem.partition(":")[0] for _, problem in refused):
        print(f"         and {', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common())} more")


def _figures(config: Config, data: "Data", read: int) -> dict[str, str]:
    """Sums the data up, under the names that it is printed with."""
    import numpy as np

    from train.data.sources import sources_of

    counts, lengths, rows = data.counts, data.lengths, data.rows
    assert rows is not None
    sources = sources_of(config.data)
    train = config.train
    batch = train.micro_batch_size * train.gradient_accumulation_steps
    lines = {
        "data": config.data.names,
        "rows read": f"{read:,}",
        "left out": ", ".join(f"{count:,} {kind}" for kind, count in counts.left_out.most_common()) or "none",
        "cut": f"{counts.cut:,}",
        "held out": f"{len(data.held_out_documents):,}",
        "trained on": f"{counts.documents:,}",
        "tokens": f"{counts.tokens:,} an epoch",
        "lengths": f"{lengths.min():,} to {lengths.max():,} tokens, mean {lengths.mean():,.1f}, "
        f"median {np.median(lengths):,.0f}",
    } | _usage(config, data)
    lines |= {
        "steps": f"{-(-rows.rows_per_epoch // batch):,} an epoch in one process, of {batch} rows each",
    }
    for source, passes in zip(sources, data.passes or [], strict=False):
        lines[source.path] = f"seen {passes:.2f} times an epoch (weight {source.weight:g})"
    return lines


def _usage(config: Config, data: "Data") -> dict[str, str]:
    """Says what of the tokens is trained and how full rows are, or how many texts have which label."""
    counts, rows = data.counts, data.rows
    assert rows is not None
    if data.labels is None:
        return {
            "of them trained": f"{counts.trained_tokens:,} ({counts.trained_tokens / counts.tokens:.1%})",
            "packed": f"{rows.rows_per_epoch:,} rows of {config.data.sequence_length:,} an epoch, "
            f"{counts.fullness:.2%} full",
        }
    texts = f"{counts.fullness:.2%} full in micro-batches of {config.train.micro_batch_size}, sorted by length"
    shares = (f"{name} {count:,} ({count / counts.documents:.1%})" for name, count in (counts.labels or {}).items())
    return {"labels": ", ".join(shares) or "numbers", "rows": f"{rows.rows_per_epoch:,} texts, {texts}"}


def _histogram(lengths: "np.ndarray") -> str:
    """Draws how many documents are how long, as text."""
    import numpy as np

    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, BINS + 1).astype(int))
    counts = np.histogram(lengths, edges)[0]
    tokens = np.histogram(lengths, edges, weights=lengths)[0]
    width = len(f"{edges[-1]:,}")
    lines = [f"{'tokens':>{2 * width + 3}}  documents   of all tokens"]
    for first, last, count, held in zip(edges[:-1], edges[1:] - 1, counts, tokens, strict=True):
        bar = "#" * round(40 * count / counts.max())
        lines.append(f"{first:>{width},} - {last:>{width},}  {count:>9,}   {held / lengths.sum():>6.1%}  {bar}")
    return "\n".join(lines)


def _print_samples(data: "Data", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Prints the first few documents, what is trained of them in green, or in brackets off a terminal."""
    is_terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    begin, end = (GREEN, PLAIN) if is_terminal else ("[[", "]]")
    if data.labels is None:
        print(f"\nThe first documents; what is trained is {'green' if is_terminal else 'in [[brackets]]'}.")
    for index, (ids, trained) in enumerate(data.first(SHOWN)):
        text = marked(ids[:SHOWN_TOKENS], trained[:SHOWN_TOKENS], tokenizer, begin, end)
        rest = f" ... {len(ids) - SHOWN_TOKENS:,} tokens more" if len(ids) > SHOWN_TOKENS else ""
        print(f"---\n{text}{rest}{data.label_of(index)}")
    print("---")


def marked(ids: "np.ndarray", trained: "np.ndarray", tokenizer: "PreTrainedTokenizerBase", begin: str, end: str) -> str:
    """Decodes a sample, with marks around what is trained of it.

    A part is what its tokens add to the text before them: alone they may decode to something else.

    Args:
        ids: of its tokens.
        trained: which of them are.
        tokenizer: that decodes them.
        begin: mark before.
        end: mark after.
    """
    import numpy as np

    is_predicted = np.concatenate([[False], trained[1:].astype(bool)])
    edges = [0, *(np.flatnonzero(np.diff(is_predicted)) + 1).tolist(), len(ids)]
    texts = [tokenizer.decode(ids[:edge].tolist()) for edge in edges]
    parts = []
    for first, (before, after) in zip(edges, pairwise(texts), strict=False):
        part = after[len(before) :]
        parts.append(f"{begin}{part}{end}" if is_predicted[first] else part)
    return "".join(parts)
