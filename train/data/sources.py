"""Documents: where text comes from, and which of it is held out.

A document is a text file, a row of a JSONL file or of a dataset, or a source file of the interpreter.
"""

import hashlib
import json
import pydoc_data.topics
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from train.config import DataConfig
from train.data.hub import require_hub
from train.errors import DataError, MachineError

FEATURES = Features({"text": Value("large_string"), "source": Value("string")})
SUFFIXES = (".txt", ".jsonl")


def load_documents(config: DataConfig) -> Dataset | IterableDataset:
    """Opens the documents that `data.path` names.

    Returns:
        A dataset of `text` and `source` columns; an `IterableDataset` with `data.streaming`.

    Raises:
        DataError: for text that cannot be read, naming file and line, or when there is none.
        MachineError: when a hub dataset cannot be reached.
    """
    path = Path(config.path).expanduser()
    if config.path == "python_stdlib":
        documents = _generate(_read_stdlib, {"root": sysconfig.get_paths()["stdlib"]}, config.streaming)
    elif path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        documents = _open_saved(path, config)
    elif path.exists():
        files = _find_files(path)
        stamps = [f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        arguments = {"files": [str(file) for file in files], "text_field": config.text_field, "stamps": stamps}
        documents = _generate(_read_files, arguments, config.streaming)
    elif path.is_absolute() or path.suffix in SUFFIXES or config.path.count("/") > 1 or config.path.startswith("."):
        raise DataError(f"data.path={config.path}: no such file or folder")
    else:
        documents = _open_hub(config)
    if isinstance(documents, Dataset):
        documents = documents.filter(_has_text, input_columns="text")
        if not len(documents):
            raise DataError(f"data.path={config.path}: no text in it")
    return documents


def split_documents(documents: Dataset, fraction: float, most: int) -> tuple[Dataset, Dataset]:
    """Divides documents into those to train on and those held out.

    The held-out ones are those whose text has the lowest hash: a choice that depends on nothing else, and
    that keeps equal texts on one side. Of a single document the end is held out.

    Args:
        documents: all of them.
        fraction: share of the documents to hold out; at least one is.
        most: bound on their number.

    Returns:
        The training documents and the held-out ones.

    Raises:
        DataError: when all texts are the same.
    """
    if len(documents) == 1:
        return _split_text(documents[0], fraction)
    hashes = np.asarray([_hash(text) for text in documents["text"]], dtype=np.uint64)
    count = min(max(1, round(fraction * len(hashes))), most)
    held_out = hashes <= np.partition(hashes, count - 1)[count - 1]
    if held_out.all():
        raise DataError("data.path: every document has the same text, so none can be held out")
    return documents.select(np.flatnonzero(~held_out)), documents.select(np.flatnonzero(held_out))


def split_stream(documents: IterableDataset, fraction: float, count: int) -> tuple[IterableDataset, Dataset]:
    """Divides a stream likewise: a text is held out when its hash falls under the share.

    Only the first `count` held-out documents are kept for evaluation; the others are not trained on either.

    Raises:
        DataError: when no document is held out, or none is left to train on.
    """
    limit = int(fraction * 2**64)
    held_out = list(documents.filter(lambda row: _has_text(row["text"]) and _hash(row["text"]) < limit).take(count))
    training = documents.filter(lambda row: _has_text(row["text"]) and _hash(row["text"]) >= limit)
    if not held_out:
        raise DataError(f"data.held_out_fraction={fraction} holds out no document of the stream: raise it")
    if not list(training.take(1)):
        raise DataError("data.path: no text to train on")
    return training, Dataset.from_list(held_out, features=FEATURES)


def _has_text(text: str) -> bool:
    return bool(text.strip())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _split_text(row: dict[str, Any], fraction: float) -> tuple[Dataset, Dataset]:
    text = row["text"]
    cut = min(max(1, round(len(text) * (1 - fraction))), len(text) - 1)
    if not (cut > 0 and _has_text(text[:cut]) and _has_text(text[cut:])):
        raise DataError(f"{row['source']}: too short to hold out any of it")
    parts = ({"text": part, "source": row["source"]} for part in (text[:cut], text[cut:]))
    training, held_out = (Dataset.from_list([part], features=FEATURES) for part in parts)
    return training, held_out


def _generate(read: Any, arguments: dict[str, Any], streaming: bool) -> Dataset | IterableDataset:
    if streaming:
        return IterableDataset.from_generator(read, features=FEATURES, gen_kwargs=arguments)
    if next(read(**arguments), None) is None:  # which `datasets` cannot store
        return Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES)
    recipe = json.dumps([Path(__file__).read_text(encoding="utf-8"), sys.version, read.__name__, arguments])
    fingerprint = hashlib.blake2b(recipe.encode(), digest_size=8).hexdigest()  # cached until files or reader change
    try:
        return Dataset.from_generator(read, features=FEATURES, gen_kwargs=arguments, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def _find_files(path: Path) -> list[Path]:
    """Lists a file, or the .txt and .jsonl files below a folder in sorted order."""
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"data.path={path}: expected a .txt or .jsonl file")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"data.path={path}: no .txt or .jsonl file in this folder")
    return files


def _read_files(files: list[str], text_field: str, stamps: list[str]) -> Iterator[dict[str, str]]:
    """Yields the documents of files; `stamps`, their sizes and times, tell `datasets` when to read anew."""
    for file in files:
        if file.lower().endswith(".jsonl"):
            yield from _read_jsonl(Path(file), text_field)
        else:
            raw = Path(file).read_bytes()
            yield {"text": _decode(raw, f"{file}:{_line_of_bad_byte(raw)}"), "source": file}


def _read_jsonl(file: Path, text_field: str) -> Iterator[dict[str, str]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}:{number}"
            text = _decode(line, where)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not readable JSON ({error})") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected an object with a field {text_field!r}, found {type(row).__name__}")
            if text_field not in row:
                raise DataError(
                    f"{where}: no field {text_field!r}; it has {', '.join(sorted(row)) or 'none'}; set data.text_field"
                )
            if not isinstance(row[text_field], str):
                raise DataError(f"{where}: field {text_field!r} holds {type(row[text_field]).__name__}, not text")
            if not row[text_field].isascii() and any("\ud800" <= letter <= "\udfff" for letter in row[text_field]):
                raise DataError(f"{where}: field {text_field!r} holds half a character (a lone surrogate escape)")
            yield {"text": row[text_field], "source": where}


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _line_of_bad_byte(raw: bytes) -> int:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return raw.count(b"\n", 0, error.start) + 1
    return 1


def _read_stdlib(root: str) -> Iterator[dict[str, str]]:
    """Yields the interpreter's help topics and its source files, without tests and installed packages."""
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield {"text": text, "source": f"topic {topic}"}
    skip = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
    for file in sorted(Path(root).rglob("*.py")):
        name = file.relative_to(root)
        if skip.isdisjoint(name.parts):
            with tokenize.open(file) as lines:  # honours a file's own encoding
                yield {"text": lines.read(), "source": name.as_posix()}


def _open_saved(path: Path, config: DataConfig) -> Dataset | IterableDataset:
    saved = load_from_disk(str(path))
    if isinstance(saved, DatasetDict):
        if config.split not in saved:
            raise DataError(f"data.split={config.split}: {path} has {' | '.join(saved)}")
        saved = saved[config.split]
    return _text_column(saved.to_iterable_dataset() if config.streaming else saved, config)


def _open_hub(config: DataConfig) -> Dataset | IterableDataset:
    require_hub(f"data.path={config.path}")
    try:
        loaded = load_dataset(config.path, config.subset, split=config.split, streaming=config.streaming)
    except DatasetNotFoundError as error:
        raise DataError(
            f"data.path={config.path}: no such file or folder, and no such dataset on the hub ({error})"
        ) from None
    except ValueError as error:  # an unknown subset or split
        raise DataError(f"data.path={config.path}: {error}") from None
    except OSError as error:
        raise MachineError(
            f"data.path={config.path}: no such file or folder, and the hub cannot be reached ({error})"
        ) from None
    return _text_column(loaded, config)


def _text_column(documents: Dataset | IterableDataset, config: DataConfig) -> Dataset | IterableDataset:
    columns = documents.column_names
    if columns is not None and config.text_field not in columns:
        raise DataError(f"data.text_field={config.text_field}: {config.path} has the columns {', '.join(columns)}")

    def take(row: dict[str, Any], index: int) -> dict[str, str]:
        return {"text": row[config.text_field] or "", "source": f"{config.path}:{index}"}

    return documents.map(take, with_indices=True, remove_columns=columns, features=FEATURES)
