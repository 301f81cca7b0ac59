"""Documents of files, which several processes read into Arrow files that a later start finds.

It imports neither torch nor `datasets`, so that a process that reads starts in a moment.
"""

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from train.data.files import Rows, read_rows
from train.data.formats import BLANK, Schema, as_document
from train.errors import DataError, MachineError, UserError

GROUP_BYTES = 16 << 20  # of files that are read into one: a process earns its start by as many
MOST_GROUPS = 256  # about as many of a source, however large: each is open, and mapped, in every process
Progress = Callable[[int], object]


class Group(NamedTuple):
    """Files that are read into one.

    Attributes:
        target: the Arrow file.
        files: of one source, one after the other.
        schema: how their rows are read.
        part: number of their source.
    """

    target: Path
    files: Sequence[Path]
    schema: Schema
    part: int


def hash_of(text: str) -> int:
    """Gives the number, below 2**64, by which texts are chosen to be held out."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def documents_of(rows: Rows, schema: Schema, part: int, strict: bool) -> Iterator[dict[str, Any]]:
    """Yields the rows of a source as documents, of `train.data.sources.FEATURES`.

    Raises:
        DataError: where no format fits the first, and if `strict` for the first with a problem.
    """
    for where, row in rows:
        if isinstance(row, Mapping):
            schema = schema.recognised(row, where)
        document = as_document(row, where, schema) | {"part": part}
        document["hash"] = hash_of(document["text"])
        problem = document["problem"]
        if strict and problem is not None and not problem.startswith(BLANK):
            raise DataError(f"{where}: {problem}")
        yield document


def rows_of(files: Sequence[Path]) -> Rows:
    """Yields the rows of files, one after the other."""
    return (row for file in files for row in read_rows(file))


def grouped(files: Sequence[Path]) -> list[list[Path]]:
    """Divides files into groups of neighbours, from the first on, so that another at their end changes the last alone.

    Where there are twice as many bytes, all groups may become larger.
    """
    sizes = [file.stat().st_size for file in files]
    least = GROUP_BYTES
    while least * MOST_GROUPS < sum(sizes):
        least *= 2
    groups: list[list[Path]] = []
    held = least
    for file, size in zip(files, sizes, strict=True):
        if held >= least:
            groups.append([])
            held = 0
        groups[-1].append(file)
        held += size
    return groups


def recognised(files: Sequence[Path], schema: Schema) -> Schema:
    """Settles `auto` by the first row of columns in files; it stays where there is none.

    Raises:
        DataError: where that row is no format's, and for what cannot be read before it.
    """
    rows = rows_of(files) if schema.format == "auto" else iter(())
    return next((schema.recognised(row, where) for where, row in rows if isinstance(row, Mapping)), schema)


def settled(groups: Sequence[Group]) -> list[Group]:
    """Gives groups after the one with the first row of columns the format by which that is recognised.

    Raises:
        DataError: see `recognised`.
    """
    for number, group in enumerate(groups):
        schema = recognised(group.files, group.schema)
        if schema.format != "auto":
            return [*groups[: number + 1], *(later._replace(schema=schema) for later in groups[number + 1 :])]
    return list(groups)


def write(
    target: Path, documents: Iterator[dict[str, Any]], columns: pa.Schema, progress: Progress, starter: int
) -> int:
    """Writes documents into an Arrow file, which appears once it is whole; returns how many they are.

    Args:
        target: the file.
        documents: with those columns.
        columns: names and types.
        progress: is told, now and then, how many more there are.
        starter: process that clears up if this one is ended.
    """
    written, unfinished = 0, _unfinished(target, starter)
    try:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, columns) as writer:
            while batch := list(islice(documents, 1000)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=columns))
                progress(len(batch))
                written += len(batch)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return written


def _unfinished(target: Path, starter: int) -> Path:
    return target.with_suffix(f".{socket.gethostname()}.{starter}.partial")


def read(groups: Sequence[Group], columns: pa.Schema, workers: int, progress: Progress) -> None:
    """Reads groups of files into their Arrow files, several at a time.

    The processes are started anew, not forked, since this one may have threads and a GPU.

    Args:
        groups: to read.
        columns: of the documents.
        workers: processes; 1 reads in this one.
        progress: see `write`; it is told of a group as a whole where others read.

    Raises:
        DataError: for what cannot be read: the first of it, in the order of the groups.
        MachineError: when a process was killed.
    """
    if min(workers, len(groups)) <= 1:
        for group in groups:
            _read_group(group, columns, progress, os.getpid())
        return
    try:
        _read_in_processes(groups, columns, min(workers, len(groups)), progress)
    finally:
        for group in groups:  # what an ended process cannot remove
            _unfinished(group.target, os.getpid()).unlink(missing_ok=True)


def _read_in_processes(groups: Sequence[Group], columns: pa.Schema, workers: int, progress: Progress) -> None:
    """Gives each process a group and, once it is read, the next; none waits for what another holds, or has held."""
    readers: list[_Reader] = []
    busy: dict[Connection, int] = {}
    found: dict[int, int | Exception] = {}
    left = iter(enumerate(groups))

    def occupy(pipe: Connection) -> None:
        number, group = next(left, (0, None))
        if group is None:
            pipe.close()
            return
        with contextlib.suppress(ConnectionError):  # of a dead process, whose end is met below
            pipe.send((group, columns, os.getpid()))
        busy[pipe] = number

    try:
        for _ in range(workers):
            readers.append(_Reader())
            occupy(readers[-1].pipe)
        for number in range(len(groups)):
            while number not in found:
                for pipe in wait(list(busy)):
                    assert isinstance(pipe, Connection)
                    found[busy.pop(pipe)] = _answer(pipe)
                    occupy(pipe)
            if isinstance(answer := found.pop(number), Exception):
                raise answer
            progress(answer)
    finally:
        for reader in readers:
            reader.end()


def _answer(pipe: Connection) -> int | Exception:
    try:
        answer: int | Exception = pipe.recv()
    except (EOFError, ConnectionError):
        raise MachineError(
            "a process that read files was killed, perhaps for its memory: try fewer data.workers"
        ) from None
    return answer


class _Reader:
    """A process that reads what it is sent, until this one closes the pipe, or dies.

    It imports nothing of the program that starts it, which may be a script that does all it does when it is imported.
    """

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        code = f"import sys; sys.path[:] = {[str(place) for place in sys.path]!r}"
        code += f"; from train.data.reading import serve; serve({theirs.fileno()})"
        with theirs:
            command, handles = [sys.executable, "-c", code], [theirs.fileno()]
            self._process = subprocess.Popen(command, pass_fds=handles, stdin=subprocess.DEVNULL)

    def end(self) -> None:
        """Ends it, whatever it does."""
        self.pipe.close()
        self._process.kill()
        self._process.wait()


def serve(handle: int) -> None:
    """Reads groups that whoever started this process sends, who is told how many documents each has, or its error.

    Args:
        handle: of the pipe.
    """
    for number in (signal.SIGINT, signal.SIGHUP):  # it is left to that one to end this
        signal.signal(number, signal.SIG_IGN)
    with Connection(handle) as pipe, contextlib.suppress(EOFError, ConnectionError):
        while True:
            group, columns, starter = pipe.recv()
            try:
                answer: int | Exception = _read_group(group, columns, _silent, starter)
            except Exception as error:  # whatever it is, it is raised where the answer is awaited
                if not isinstance(error, UserError):
                    error.add_note(traceback.format_exc())
                answer = error
            pipe.send(answer)


def _silent(count: int) -> None:
    """Leaves it to the process that waits for this one to say how far it is."""


def _read_group(group: Group, columns: pa.Schema, progress: Progress, starter: int) -> int:
    documents = documents_of(rows_of(group.files), group.schema, group.part, strict=False)
    return write(group.target, documents, columns, progress, starter)
