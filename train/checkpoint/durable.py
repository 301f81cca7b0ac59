"""Files that are hashed while they are written, forced to the disk, and read back."""

import contextlib
import hashlib
import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.errors import CheckpointError

BLOCK_BYTES = 1 << 22
EARLY_BYTES = 1 << 26  # the disk begins after so many, rather than once all are there
UNDER_WAY = 4  # parts that are hashed or read back while more is written


class Written(NamedTuple):
    """A file as it was written.

    Attributes:
        size: in bytes.
        sha256: of the bytes that were meant to be written.
    """

    size: int
    sha256: str


def write_durably(path: Path, parts: Iterable[memoryview], *, read_back: bool = False) -> Written:
    """Writes a new file and forces it to the disk.

    Beside the thread that writes, one hashes what it writes, one reads that back, and one waits for the disk: none of
    them holds the interpreter's lock.

    Args:
        path: of the file.
        parts: its content, each in bytes; a few are held at a time.
        read_back: whether what was written is compared with what was meant to be.

    Raises:
        OSError: when the disk does not take it.
        CheckpointError: when it is not what is read back.
    """
    digest, size, early = hashlib.sha256(), 0, 0
    block = memoryview(bytearray(BLOCK_BYTES if read_back else 0))
    under_way: deque[Future[None]] = deque()
    forced: list[Future[None]] = []
    with (
        naming(path),
        path.open("x+b", buffering=0) as file,
        ThreadPoolExecutor(1, "hash") as hashing,
        ThreadPoolExecutor(1, "back") as reading,
        ThreadPoolExecutor(1, "disk") as disk,
    ):
        for part in parts:
            under_way.append(hashing.submit(digest.update, part))
            _put(file, part)
            if read_back:
                under_way.append(reading.submit(_compare, file, size, part, block))
            size += len(part)
            if size - early >= EARLY_BYTES and all(future.done() for future in forced):
                forced.append(disk.submit(os.fdatasync, file.fileno()))
                early = size
            while len(under_way) > UNDER_WAY:
                under_way.popleft().result()
        forced.append(disk.submit(os.fsync, file.fileno()))
        for future in (*under_way, *forced):
            future.result()
    return Written(size, digest.hexdigest())


def _put(file: io.FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _compare(file: io.FileIO, start: int, meant: memoryview, block: memoryview) -> None:
    """Reads back what was written at a place of a file, by way of a block of memory."""
    while meant:
        size = os.preadv(file.fileno(), [block[: len(meant)]], start)
        if size == 0 or not np.array_equal(np.frombuffer(block[:size], "B"), np.frombuffer(meant[:size], "B")):
            raise CheckpointError(f"{file.name} is damaged: what is read back is not what was written")
        start, meant = start + size, meant[size:]


def check_file(folder: Path, name: str, expected: Written) -> None:
    """Compares a file with what is known of it.

    Raises:
        CheckpointError: when it is missing, a link, or has another size or hash.
    """
    path = folder / name
    if path.is_symlink():
        raise CheckpointError(f"{path} is a symbolic link: it is not followed")
    try:
        digest, size = hashlib.sha256(), 0
        with path.open("rb", buffering=0) as file:
            if (found := os.fstat(file.fileno()).st_size) != expected.size:
                raise CheckpointError(f"{path} has {found} bytes, the manifest says {expected.size}")
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                size += len(block)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if size != expected.size or digest.hexdigest() != expected.sha256:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's")


def sync_folder(path: Path) -> None:
    """Forces a folder's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives the errors of writing, which know no file, the name of one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
