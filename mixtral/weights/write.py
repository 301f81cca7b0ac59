"""Writing weights tensor by tensor into a folder that appears whole or not at all."""

import contextlib
import fcntl
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from mixtral.weights import names
from mixtral.weights.files import DTYPES, Stored, WeightsError, pickle_header

MAX_SHARD_BYTES = 5_000_000_000
WRITE_BYTES = 1 << 19  # at a time: for more, Linux takes its memory in pieces of 2 MB, and finding those can cost 10 x


class Planned(NamedTuple):
    """What a tensor will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_whole(file: io.FileIO, data: memoryview) -> None:
    """Writes all of some bytes where an unbuffered file stands, whatever part of them each call takes.

    Raises:
        OSError: when the disk does not take them.
    """
    while data:
        data = data[file.write(data[:WRITE_BYTES]) :]


@contextlib.contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Gives a hidden folder beside `target` to write into, which takes its name at the end of the block.

    An exception removes it. What a killed process left behind is cleared by the next one. Where `target` is a link, the
    folder that it leads to is made.

    Raises:
        FileExistsError: when `target` holds something, or is where a disk is mounted, which nothing can replace.
        BlockingIOError: when a living process is writing it.
    """
    target = Path(target).resolve()
    partial = target.with_name(f".{target.name}.partial")
    _refuse_existing(target)
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{target} is being written by another process") from None
        _refuse_existing(target)  # by now the other one may be done
        if not partial.exists() or os.stat(partial).st_ino != os.fstat(lock).st_ino:
            raise BlockingIOError(f"{target} is being written by another process")
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield partial
            for path in [*sorted(partial.rglob("*")), partial]:
                _sync(path)
            partial.rename(target)
            _sync(target.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _refuse_existing(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists already: name another folder, or move it away")
    if target.is_mount():
        raise FileExistsError(f"{target} is where a disk is mounted: name a folder in it")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TensorWriter:
    """Writes tensors, or equal parts of them, in any order into files laid out before.

    Leaving its `with` block without an exception checks that nothing is missing.

    Args:
        tensors: where each tensor lies.
    """

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self._tensors = tensors
        self._left = {name: math.prod(stored.shape) for name, stored in tensors.items()}
        self._seen: set[tuple[str, int]] = set()

    def add(self, name: str, tensor: Tensor, part: int = 0) -> None:
        """Writes a tensor, or the part of it that follows `part` others of the same size, in the planned dtype.

        Args:
            name: as planned.
            tensor: of the planned shape or, for a part, fewer rows.
            part: how many parts lie before it.

        Raises:
            ValueError: for a tensor that was not planned so, or comes twice.
            WeightsError: for a number that is finite, but not in the planned dtype.
        """
        stored = self._tensors.get(name)
        if stored is None:
            raise ValueError(f"tensor {name} was not planned")
        rows = math.prod(tensor.shape[:1])
        if tensor.shape[1:] != stored.shape[1:] or (part + 1) * rows > stored.shape[0] or stored.shape[0] % rows:
            raise ValueError(f"tensor {name} was planned of shape {list(stored.shape)}, not {list(tensor.shape)}")
        if (name, part) in self._seen:
            raise ValueError(f"tensor {name}, part {part}, was written before")
        flat = tensor.detach().to("cpu", stored.dtype).contiguous().view(-1)
        if stored.dtype != tensor.dtype and int(flat.isinf().sum()) > int(tensor.isinf().sum()):
            raise WeightsError(
                f"tensor {name} holds {tensor.abs().max():.3g}, which {stored.dtype} cannot hold, "
                f"expected at most {torch.finfo(stored.dtype).max:.3g}: give another dtype"
            )
        view = memoryview(flat.view(torch.uint8).numpy().data)
        with stored.path.open("r+b", buffering=0) as file:
            file.seek(stored.offset + part * view.nbytes)
            write_whole(file, view)
        self._seen.add((name, part))
        self._left[name] -= flat.numel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        missing = [name for name, count in self._left.items() if count]
        if kind is None and missing:
            raise ValueError(f"tensor {missing[0]} was planned, but not written ({len(missing)} in all)")


class HubWriter(TensorWriter):
    """Writes `model.safetensors`, or shards and their index, in the hub's layout, a tensor at a time in any order.

    So a process may hold one tensor at a time, and hand in those of other processes as they arrive.

    Args:
        folder: an existing one, best from `new_folder`; `config.json` is the caller's.
        tensors: dtype and shape of each by its hub name: see `mixtral.weights.names.hub_shapes`.
        max_shard_bytes: bound on a shard, unless a single tensor is larger.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Planned], max_shard_bytes: float = MAX_SHARD_BYTES) -> None:
        super().__init__(lay_out_safetensors(folder, tensors, "model", max_shard_bytes))

    def add_parameter(self, name: str, tensor: Tensor, experts: Iterable[int]) -> None:
        """Writes a parameter of our models, or the given experts of a stacked one.

        Args:
            name: in memory, such as `model.layers.3.mlp.experts.gate_up_proj`.
            tensor: the parameter; a stacked one holds the given experts in this order.
            experts: the experts that a stacked parameter holds.
        """
        for index, row in enumerate(names.on_hub(name, experts)):
            whole = tensor[index] if names.is_stacked(name) else tensor
            for hub_name, part in zip(row, whole.chunk(len(row)), strict=True):
                self.add(hub_name, part)


def _shards(tensors: Mapping[str, Planned], max_bytes: float) -> list[dict[str, Planned]]:
    """Cuts the tensors, in their order, into shards."""
    shards: list[dict[str, Planned]] = [{}]
    size = 0
    for name, planned in tensors.items():
        if shards[-1] and size + planned.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = planned
        size += planned.nbytes
    return shards


def lay_out_safetensors(
    folder: Path, tensors: Mapping[str, Planned], stem: str, max_shard_bytes: float
) -> dict[str, Stored]:
    """Makes safetensors files whose headers are done and whose data is still to be written, and their index.

    Args:
        folder: an existing one.
        tensors: what to make room for.
        stem: of `STEM.safetensors`, or `STEM-00001-of-0000N.safetensors` and `STEM.safetensors.index.json`.
        max_shard_bytes: bound on a shard, unless a single tensor is larger.
    """
    shards = _shards(tensors, max_shard_bytes)
    codes = {dtype: code for code, dtype in DTYPES.items()}
    found: dict[str, Stored] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, planned in shard.items():
            offsets = [end, end := end + planned.nbytes]
            header[tensor] = {"dtype": codes[planned.dtype], "shape": list(planned.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        start = 8 + len(text)
        for tensor, planned in shard.items():
            found[tensor] = Stored(folder / name, planned.dtype, planned.shape, start)
            start += planned.nbytes
    if len(shards) > 1:
        total = sum(planned.nbytes for planned in tensors.values())
        weight_map = {tensor: stored.path.name for tensor, stored in found.items()}
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (folder / f"{stem}.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
    return found


def lay_out_pickled(folder: Path, tensors: Mapping[str, Planned], max_shard_bytes: float) -> dict[str, Stored]:
    """Makes `consolidated.NN.pth` files as `torch.save` does, whose data is still to be written.

    Args:
        folder: an existing one.
        tensors: what to make room for.
        max_shard_bytes: bound on a file, unless a single tensor is larger.
    """
    found: dict[str, Stored] = {}
    for number, shard in enumerate(_shards(tensors, max_shard_bytes)):
        path = folder / f"consolidated.{number:02}.pth"
        with FakeTensorMode():  # tensors without data
            content = {name: torch.empty(planned.shape, dtype=planned.dtype) for name, planned in shard.items()}
        with skip_data(materialize_fake_tensors=True):
            torch.save(content, path)
        found |= pickle_header(path)
    return found


def plan(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], dtype: torch.dtype | None
) -> dict[str, Planned]:
    """Plans tensors in one dtype, or each in its own."""
    return {name: Planned(dtype or dtypes[name], shape) for name, shape in shapes.items()}
