"""Documents: where they come from, and which of them are held out.

A document is a text file, a source file of the interpreter, or a row of a file or dataset, in the form of
`train.data.formats`.
"""

import hashlib
import inspect
import json
import math
import os
import pydoc_data.topics
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError
from datasets.utils import tqdm

from train.config import DataConfig, SourceConfig
from train.data import files, formats, reading
from train.data.columns import column, select
from train.data.files import is_whole
from train.data.formats import BLANK, Schema
from train.data.hub import require_hub, split_revision
from train.data.problems import Problems, refuse
from train.data.reading import documents_of, hash_of, rows_of
from train.errors import DataError, MachineError

FEATURES = Features(
    {
        "text": Value("large_string"),
        "label": Value("string"),
        "format": Value("string"),
        "source": Value("string"),
        "problem": Value("string"),
        "part": Value("int32"),
        "hash": Value("uint64"),
    }
)


def sources_of(config: DataConfig) -> list[SourceConfig]:
    """Lists the sources, with everything that they leave to `data`."""
    given = config.sources or [SourceConfig(path=config.path or "")]
    common = {"text": config.text_field} | config.columns
    return [
        SourceConfig(
            path=source.path,
            weight=source.weight,
            format=source.format or config.format,
            columns=common | source.columns,
            subset=source.subset or config.subset,
            split=source.split or config.split,
        )
        for source in given
    ]


def load_documents(config: DataConfig) -> Dataset | IterableDataset:
    """Opens the documents that `data.path` or `data.sources` names.

    Returns:
        A dataset of `FEATURES`: a document, the number of its source as `part`, the `hash` of its text, and its
        `problem` if it has one that is to be counted; an `IterableDataset` with `data.streaming`.

    Raises:
        DataError: for rows that cannot be read, naming file and line, or when there is none.
        MachineError: when a hub dataset cannot be reached.
    """
    opened = load_sources(config)
    return opened[0] if len(opened) == 1 else concatenate_datasets(opened)


def load_sources(config: DataConfig) -> list[Any]:
    """Opens each source; see `load_documents`."""
    opened = [_open(source, part, config) for part, source in enumerate(sources_of(config))]
    if not config.streaming:
        for source, documents in zip(sources_of(config), opened, strict=True):
            problems = Problems((documents,))
            refuse(problems, config)
            if problems.kinds.total() == len(documents):
                what = "no text" if problems.kinds.keys() <= {BLANK} else "no usable row"
                raise DataError(f"data.path={source.path}: {what} in it")
    return opened


def as_dataset(documents: list[dict[str, Any]]) -> Dataset:
    """Makes a dataset of documents; `Dataset.from_list` would take their hashes for signed numbers."""
    return Dataset(pa.Table.from_pylist(documents, schema=FEATURES.arrow_schema))


def usable(documents: Dataset) -> Dataset:
    """Returns the documents that have no problem."""
    is_usable = column(documents, "problem").is_null().to_numpy()
    return documents if is_usable.all() else select(documents, np.flatnonzero(is_usable))


def split_documents(documents: Dataset, fraction: float, most: int) -> tuple[Dataset, Dataset]:
    """Divides documents into those to train on and those held out.

    The held-out ones are those whose text has the lowest hash: a choice that depends on nothing else, and
    that keeps equal texts on one side. The texts themselves are not read, since a start of every process comes by here.
    Of a single text the end is held out. Those with a problem are not held out.

    Args:
        documents: all of them.
        fraction: share of the documents to hold out; at least one is.
        most: bound on their number.

    Returns:
        The training documents and the held-out ones.

    Raises:
        DataError: when all texts are the same.
    """
    usable = np.flatnonzero(column(documents, "problem").is_null().to_numpy())
    if len(usable) == 1:
        return _split_text(documents[int(usable[0])], fraction)
    hashes = column(documents, "hash").to_numpy()[usable]
    count = min(max(1, round(fraction * len(hashes))), most)
    held_out = hashes <= np.partition(hashes, count - 1)[count - 1]
    if held_out.all():
        raise DataError("data.path: every document has the same text, so none can be held out")
    is_training = np.ones(len(documents), dtype=bool)
    is_training[usable[held_out]] = False
    return select(documents, np.flatnonzero(is_training)), select(documents, usable[held_out])


def split_stream(documents: IterableDataset, fraction: float, count: int) -> tuple[IterableDataset, Dataset]:
    """Divides a stream likewise: a text is held out when its hash falls under the share.

    Only the first `count` held-out documents are kept for evaluation; the others are not trained on either.

    Raises:
        DataError: when no document is held out, or none is left to train on.
    """
    limit = int(fraction * 2**64)
    held_out = list(documents.filter(lambda row: row["problem"] is None and row["hash"] < limit).take(count))
    training = documents.filter(lambda row: row["problem"] is not None or row["hash"] >= limit)
    if not held_out:
        raise DataError(f"data.held_out_fraction={fraction} holds out no document of the stream: raise it")
    if all(row["problem"] is not None for row in training.take(1000)):
        raise DataError("data.path: nothing to train on")
    return training, as_dataset(held_out)


def _split_text(row: dict[str, Any], fraction: float) -> tuple[Dataset, Dataset]:
    if row["format"] != "text":
        raise DataError(f"{row['source']}: this sample is the only one: name others in data.held_out_path")
    text = row["text"]
    cut = min(max(1, round(len(text) * (1 - fraction))), len(text) - 1)
    if not (cut > 0 and text[:cut].strip() and text[cut:].strip()):
        raise DataError(
            f"{row['source']}: too short for data.held_out_fraction={fraction} to divide: {_ways_out(text)}"
        )
    training, held_out = (
        as_dataset([row | {"text": part, "hash": hash_of(part)}]) for part in (text[:cut], text[cut:])
    )
    return training, held_out


def _ways_out(text: str) -> str:
    """Says by what fractions a text is divided into two that hold something, and what else there is to do."""
    filled = [index for index, character in enumerate(text) if not character.isspace()]
    least = math.ceil(100 * (1 - filled[-1] / len(text))) / 100
    most = min(0.5, math.floor(100 * (1 - (filled[0] + 1) / len(text))) / 100)
    between = f"set it between {least:g} and {most:g}, or " if 0 < least <= most else ""
    return f"{between}name other documents in data.held_out_path"


def _open(source: SourceConfig, part: int, config: DataConfig) -> Dataset | IterableDataset:
    path = Path(source.path).expanduser()
    strict = config.streaming and config.bad_rows == "error"
    if source.path == "python_stdlib":
        return _open_stdlib(part, streaming=config.streaming)
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        return _from_dataset(_open_saved(path, source, config.streaming), source, part, strict, config.workers)
    if path.exists():
        found = _find_files(path)
        schema = _schema(asdict(source))
        if not config.streaming:
            return _open_files(found, schema, part, config.workers)
        settled = asdict(reading.recognised(found, schema))  # by all files, of which a stream sees one at a time
        arguments = {"files": [str(file) for file in found], "source": settled, "part": part, "strict": strict}
        return IterableDataset.from_generator(_read_files, features=FEATURES, gen_kwargs=arguments)
    repository = source.path.partition("@")[0]
    if path.is_absolute() or path.suffix in files.READERS or repository.count("/") > 1 or repository.startswith("."):
        raise DataError(f"data.path={source.path}: no such file or folder")
    return _from_dataset(_open_hub(source, config.streaming), source, part, strict, config.workers)


def _open_stdlib(part: int, *, streaming: bool) -> Dataset | IterableDataset:
    root = sysconfig.get_paths()["stdlib"]
    if streaming:
        return IterableDataset.from_generator(_read_stdlib, features=FEATURES, gen_kwargs={"root": root, "part": part})
    target = _cache(root, part)
    if not _is_cached(target):
        with tqdm(unit=" documents", desc="reading") as bar:
            reading.write(target, _read_stdlib(root, part), FEATURES.arrow_schema, bar.update, os.getpid())
    return _open_cached([target])


def _open_files(found: list[Path], schema: Schema, part: int, workers: int) -> Dataset:
    """Reads files as they are needed first, in groups, each of which serves until its files or the reader change.

    Where a format is to be recognised by the first row, a group depends on the files before it too.
    """
    groups: list[reading.Group] = []
    for group in reading.grouped(found):
        stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in group]
        before = groups[-1].target.name if groups and schema.format == "auto" else None
        groups.append(reading.Group(_cache(stamps, asdict(schema), part, before), group, schema, part))
    if not all(_is_cached(group.target) for group in groups):
        missing = [group for group in reading.settled(groups) if not _is_cached(group.target)]
        with tqdm(unit=" documents", desc="reading") as bar:
            reading.read(missing, FEATURES.arrow_schema, workers, bar.update)
    return _open_cached([group.target for group in groups])


def _cache(*arguments: Any) -> Path:
    """Names the Arrow file of what is read by the code that there is."""
    recipe = json.dumps([_reader(), sys.version, arguments])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "cierzo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.blake2b(recipe.encode(), digest_size=8).hexdigest()}.arrow"


@cache
def _reader() -> str:
    code = [Path(inspect.getfile(module)).read_text(encoding="utf-8") for module in (files, formats, reading)]
    code.append(Path(__file__).read_text(encoding="utf-8"))
    return hashlib.blake2b("\0".join(code).encode()).hexdigest()


def _is_cached(target: Path) -> bool:
    return target.exists() and is_whole(target)


def _open_cached(targets: list[Path]) -> Dataset:
    documents = concatenate_datasets([Dataset.from_file(str(target)) for target in targets])
    names = "".join(target.name for target in targets)
    documents._fingerprint = hashlib.blake2b(names.encode(), digest_size=8).hexdigest()
    return documents


def _find_files(path: Path) -> list[Path]:
    """Lists a file, or the files of known kinds below a folder in sorted order."""
    kinds = ", ".join(files.READERS)
    if path.is_file():
        if path.suffix.lower() not in files.READERS:
            raise DataError(f"data.path={path}: expected a file that ends in one of {kinds}")
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in files.READERS and file.is_file())
    if not found:
        raise DataError(f"data.path={path}: no file in this folder ends in one of {kinds}")
    return found


def _schema(source: dict[str, Any]) -> Schema:
    """Says how a source's rows are read."""
    return Schema(source["format"], source["columns"])


def _read_files(files: list[str], source: dict[str, Any], part: int, strict: bool) -> Iterator[dict[str, Any]]:
    """Yields the documents of files as they come."""
    yield from documents_of(rows_of([Path(file) for file in files]), _schema(source), part, strict)


def _read_stdlib(root: str, part: int) -> Iterator[dict[str, Any]]:
    """Yields the interpreter's help topics and its source files, without tests and installed packages."""
    rows = ((place, {"text": text}) for place, text in _read_library(Path(root)))
    yield from documents_of(rows, Schema("text", {}), part, strict=False)


def _read_library(root: Path) -> Iterator[tuple[str, str]]:
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield f"topic {topic}", text
    skip = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if skip.isdisjoint(name.parts):
            with tokenize.open(file) as lines:  # honours a file's own encoding
                yield name.as_posix(), lines.read()


def _open_saved(path: Path, source: SourceConfig, streaming: bool) -> Dataset | IterableDataset:
    try:
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict):
            if source.split not in saved:
                raise DataError(f"data.split={source.split}: {path} has {' | '.join(saved)}")
            saved = saved[source.split]
        for file in saved.cache_files:
            if not is_whole(Path(file["filename"])):
                raise DataError(f"{file['filename']}: its end is missing: copy it, or save the dataset, again")
        if streaming:
            return saved.to_iterable_dataset()
        _validate(saved)
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"data.path={path}: not a readable dataset ({reason})") from None
    return saved


def _validate(saved: Dataset) -> None:
    """Looks through all of a saved dataset, unless that was done since its files changed."""
    places = [Path(file["filename"]) for file in saved.cache_files]
    stamps = [(str(place), place.stat().st_size, place.stat().st_mtime_ns) for place in places]
    done = _cache(stamps).with_suffix(".valid")
    if not (places and done.exists()):
        saved.data.table.validate(full=True)
        done.touch()


def _open_hub(source: SourceConfig, streaming: bool) -> Dataset | IterableDataset:
    repository, revision = split_revision(source.path)
    require_hub(f"data.path={source.path}")
    try:
        return load_dataset(repository, source.subset, split=source.split, revision=revision, streaming=streaming)
    except DatasetNotFoundError as error:
        raise DataError(
            f"data.path={source.path}: no such file or folder, and no such dataset on the hub ({error})"
        ) from None
    except ValueError as error:  # an unknown subset or split
        raise DataError(f"data.path={source.path}: {error}") from None
    except OSError as error:
        raise MachineError(
            f"data.path={source.path}: no such file or folder, and the hub cannot be reached ({error})"
        ) from None


def _from_dataset(
    rows: Dataset | IterableDataset, source: SourceConfig, part: int, strict: bool, workers: int
) -> Dataset | IterableDataset:
    """Brings the rows of a dataset into the form of documents."""
    first = next(iter(rows), None)
    if first is None:
        raise DataError(f"data.path={source.path}: no text in it")
    schema = _schema(asdict(source)).recognised(first, f"{source.path}:0")

    named = _label_names(rows.features or {}, schema)

    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        columns = [_named(values, named[name]) if name in named else values for name, values in batch.items()]
        rows = (dict(zip(batch, row, strict=True)) for row in zip(*columns, strict=True))
        places = ((f"{source.path}:{index}", row) for index, row in zip(indices, rows, strict=True))
        documents = list(documents_of(places, schema, part, strict))
        made: dict[str, Any] = {name: [document[name] for document in documents] for name in FEATURES}
        return made | {"hash": np.asarray(made["hash"], np.uint64)}  # which `datasets` would take for signed

    options = {"with_indices": True, "batched": True, "remove_columns": list(first), "features": FEATURES}
    if isinstance(rows, Dataset):
        options |= {"num_proc": workers if workers > 1 else None, "desc": "reading"}
    return rows.map(convert, **options)


def _label_names(features: Mapping[str, Any], schema: Schema) -> dict[str, list[str]]:
    """Finds the columns of labels, or of lists of them, whose numbers a dataset has names for."""
    found = {}
    for name in {schema.name("label"), schema.name("labels")} & features.keys():
        feature = features[name]
        feature = getattr(feature, "feature", feature)
        if isinstance(feature, ClassLabel):
            found[name] = feature.names
    return found


def _named(values: list[Any], names: list[str]) -> list[Any]:
    """Gives labels their names; a number that has none stays, and is out of range later."""
    return [
        _named(value, names) if isinstance(value, list) else names[value] if value in range(len(names)) else value
        for value in values
    ]
