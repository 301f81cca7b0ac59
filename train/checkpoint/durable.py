"""Files that are hashed while they are written, forced to the disk, and read back."""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from train.errors import CheckpointError

BLOCK_BYTES = 1 << 22
EARLY_BYTES = 1 << 26  # the disk begins after so many, rather than once all are there


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

    A thread hashes each part while it is written, and another waits for the disk while more is written and all of it
    is read back: none of the three holds the interpreter's lock.

    Args:
        path: of the file.
        parts: its content, each in bytes.
        read_back: whether what was written is compared with what was meant to be.

    Raises:
        OSError: when the disk does not take it.
        CheckpointError: when it is not what is read back.
    """
    digest, size, early = hashlib.sha256(), 0, 0
    forced: list[Future[None]] = []
    with (
        naming(path),
        path.open("xb", buffering=0) as file,
        ThreadPoolExecutor(1, "hash") as hashing,
        ThreadPoolExecutor(1, "disk") as disk,
    ):
        for part in parts:
            hashed = hashing.submit(digest.update, part)
            size += _put(file, part)
            hashed.result()
            if size - early >= EARLY_BYTES and all(future.done() for future in forced):
                forced.append(disk.submit(os.fdatasync, file.fileno()))
                early = size
        written = Written(size, digest.hexdigest())
        forced.append(disk.submit(os.fsync, file.fileno()))
        if read_back:
            check_file(path.parent, path.name, written)
        for future in forced:
            future.result()
    return written


def _put(file: io.FileIO, data: memoryview) -> int:
    left = data
    while left:
        left = left[file.write(left) :]
    return len(data)


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
