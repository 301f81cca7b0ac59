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

from mixtral.weights.write import write_whole
from train.errors import CheckpointError

BLOCK_BYTES, BLOCKS = 1 << 22, 3
EARLY_BYTES = 1 << 26  # the disk begins after so many, rather than once all are there
UNDER_WAY = 4  # parts that are read back while more is written


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

    Beside the thread that writes, one reads that back, one hashes it, and one waits for the disk: none of them holds
    the interpreter's lock.

    Args:
        path: of the file.
        parts: its content, each in bytes; a few are held at a time.
        read_back: whether what was written is compared with what was meant to be, and what is hashed is what was read.

    Raises:
        OSError: when the disk does not take it.
        CheckpointError: when it is not what is read back.
    """
    size, early = 0, 0
    under_way: deque[Future[None]] = deque()
    forced: list[Future[None]] = []
    with (
        naming(path),
        path.open("x+b", buffering=0) as file,
        ThreadPoolExecutor(1, "hash") as hashing,
        ThreadPoolExecutor(1, "back") as reading,
        ThreadPoolExecutor(1, "disk") as disk,
    ):
        read = _Reader(file, hashing)
        for part in parts:
            write_whole(file, part)
            under_way.append(reading.submit(read.back, size, part) if read_back else read.hashed(part))
            size += len(part)
            if size - early >= EARLY_BYTES and all(future.done() for future in forced):
                forced.append(disk.submit(os.fdatasync, file.fileno()))
                early = size
            while len(under_way) > UNDER_WAY:
                under_way.popleft().result()
        forced.append(disk.submit(os.fsync, file.fileno()))
        for future in (*under_way, *forced):
            future.result()
        return Written(size, read.sha256())


class _Reader:
    """Reads back what is written into a file, and hashes it in a thread of its own."""

    def __init__(self, file: io.FileIO, hashing: ThreadPoolExecutor) -> None:
        self._file, self._hashing, self._digest = file, hashing, hashlib.sha256()
        self._blocks: deque[tuple[memoryview, Future[None]]] = deque()

    def hashed(self, data: memoryview) -> "Future[None]":
        """Begins to hash what comes next."""
        return self._hashing.submit(self._digest.update, data)

    def back(self, start: int, meant: memoryview) -> None:
        """Compares what was written at a place with what was meant to be, and begins to hash what is read.

        Raises:
            CheckpointError: when it is not that.
        """
        while meant:
            block = self._free_block()
            size = os.preadv(self._file.fileno(), [block[: len(meant)]], start)
            if size == 0 or not np.array_equal(np.frombuffer(block[:size], "B"), np.frombuffer(meant[:size], "B")):
                raise CheckpointError(f"{self._file.name} is damaged: what is read back is not what was written")
            self._blocks.append((block, self.hashed(block[:size])))
            start, meant = start + size, meant[size:]

    def _free_block(self) -> memoryview:
        """Gives memory whose content is hashed."""
        if len(self._blocks) < BLOCKS:
            return memoryview(bytearray(BLOCK_BYTES))
        block, hashed = self._blocks.popleft()
        hashed.result()
        return block

    def sha256(self) -> str:
        """Gives the hash of all that was hashed, once all of it is."""
        self._hashing.submit(int).result()  # after all others
        return self._digest.hexdigest()


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
