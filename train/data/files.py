"""The rows of files, each with its file and line."""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import parquet

from train.data.formats import RowError, writable
from train.errors import DataError

T = TypeVar("T")
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
Rows = Iterator[tuple[str, Any]]  # where it is, and the row or the `RowError` in its place


@dataclass(frozen=True)
class Unconvertible:
    """Stands for a value of a Parquet file that Python has none for; it matters where the column is used."""

    type: str


def read_rows(file: Path) -> Rows:
    """Yields the rows of a file, whose suffix names its kind; its name may be of bytes that are no UTF-8.

    Raises:
        DataError: where what follows cannot be read either.
    """
    return ((writable(where), row) for where, row in READERS[file.suffix.lower()](file))


def is_whole(file: Path) -> bool:
    """Whether an Arrow file has its end: one that is cut between batches is read as if it had fewer rows."""
    with file.open("rb") as raw:
        raw.seek(-min(len(ARROW_END), file.stat().st_size), os.SEEK_END)
        return raw.read() == ARROW_END


def read_each(name: str, path: str, read: Callable[[Any], T]) -> list[T]:
    """Reads every row of a file, none of which may be bad.

    Args:
        name: of the key that names the file.
        path: of the file.
        read: makes something of a row, or raises a `RowError`.

    Raises:
        DataError: for a file without rows, and for the first bad row, by file and line.
    """
    file, found = Path(path).expanduser(), []
    if file.suffix.lower() not in READERS:
        raise DataError(f"{name}={path}: expected a file that ends in one of {', '.join(READERS)}")
    try:
        for where, row in read_rows(file):
            try:
                if isinstance(row, RowError):
                    raise row
                found.append(read(row))
            except RowError as bad:
                raise DataError(f"{where}: {bad}") from None
    except OSError as error:
        raise DataError(f"{name}={path}: {error.strerror or error}") from None
    if not found:
        raise DataError(f"{name}={path}: no prompt in it")
    return found


def _read_text(file: Path) -> Rows:
    raw = file.read_bytes()
    try:
        yield str(file), {"text": _decode(raw)}
    except RowError as bad:
        yield f"{file}:{_line_of_bad_byte(raw)}", bad


def _read_lines(file: Path) -> Rows:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file}:{number}", _parse(line)


def _parse(line: bytes) -> Any:
    """Parses a line of JSON; returns the `RowError` that it is otherwise."""
    try:
        return json.loads(_decode(line))
    except RowError as bad:
        return bad
    except json.JSONDecodeError as error:
        return RowError("not JSON", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return RowError("not readable JSON", str(error))


def _read_json(file: Path) -> Rows:
    """Reads a list of objects; a file that begins otherwise is taken for one object a line."""
    with file.open("rb") as head:
        if not head.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _read_lines(file)
            return
    try:
        text = _decode(file.read_bytes())
    except RowError as bad:
        raise DataError(f"{file}: {bad}") from None
    decoder, at, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    try:
        while (at := _skip(text, at)) < len(text) and text[at] != "]":
            line, counted = line + text.count("\n", counted, at), at
            row, end = decoder.raw_decode(text, at)
            yield f"{file}:{line}", row
            end = _skip(text, end)
            if text[end : end + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
            at = end + (text[end] == ",")
        if _skip(text, at + 1) != len(text) or text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting one list of rows", text, at)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}:{line}: not readable JSON: {error}") from None


def _skip(text: str, at: int) -> int:
    """Returns the place of the next character that is no white space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _read_csv(file: Path) -> Rows:
    csv.field_size_limit(sys.maxsize)
    with file.open("rb") as raw:
        try:
            rows = csv.DictReader(map(_decode, raw), strict=True)
            _ = rows.fieldnames
            line = rows.line_num + 1
            for row in rows:
                width = len(rows.fieldnames or ())
                extra = row.pop(None, ())
                found = sum(value is not None for value in row.values()) + len(extra)
                bad = RowError(
                    "wrong number of cells", f"{found}, and the header names {width}: quote what holds commas"
                )
                yield f"{file}:{line}", row if found == width else bad
                line = rows.line_num + 1
        except RowError as bad:
            raise DataError(f"{file}:{rows.line_num + 1}: {bad}") from None
        except csv.Error as error:
            raise DataError(f"{file}:{rows.line_num}: not CSV: {error}") from None


def _read_parquet(file: Path) -> Rows:
    try:
        number = 0
        with file.open("rb") as raw:  # by its name Arrow opens none whose bytes are no UTF-8
            for batch in parquet.ParquetFile(raw, page_checksum_verification=True).iter_batches(batch_size=1000):
                batch.validate(full=True)
                for row in _rows_of(batch):
                    number += 1
                    yield f"{file}:{number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _rows_of(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Gives the rows of a batch, with `Unconvertible` for what Python has no value for, such as a far time."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (ArithmeticError, LookupError, ValueError):
        columns = [[_value(scalar) for scalar in values] for values in batch.columns]
        rows = [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]
    return rows


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ArithmeticError, LookupError, ValueError):
        return Unconvertible(str(scalar.type))


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8", f"{error.reason} at byte {error.start}; save it as UTF-8") from None


def _line_of_bad_byte(raw: bytes) -> int:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return raw.count(b"\n", 0, error.start) + 1
    return 1


READERS = {
    ".txt": _read_text,
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
