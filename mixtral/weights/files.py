"""Tensors as byte ranges of files: headers are read and checked, and no code in a file is ever run.

Reads go through `readinto` and not through a memory map, whose pages would count as memory in use.
"""

import json
import math
import re
import zipfile
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound
CHUNK_BYTES = 16 << 20  # at a time, where the dtype changes on the way


class WeightsError(ValueError):
    """Weights that cannot be used: the message names tensor, file and what was expected."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: row-major, `nbytes` bytes from `offset`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read_into(self, out: Tensor, part: int = 0) -> None:
        """Fills `out` with as many elements as it has, from element `part * out.numel()` of the tensor.

        Args:
            out: contiguous, of any device and floating dtype.
            part: which of the equal parts to read.

        Raises:
            WeightsError: when the file ends before its time.
        """
        self.read_from(part * out.numel(), out)

    def read_from(self, first: int, out: Tensor) -> None:
        """Does so from any element; see `read_into`."""
        flat, size = out.view(-1), self.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + first * size)
            if out.dtype == self.dtype and out.device.type == "cpu":
                self._read(file, flat)
                return
            step = CHUNK_BYTES // size
            chunk = torch.empty(min(step, flat.numel()), dtype=self.dtype)
            for start in range(0, flat.numel(), step):
                target = flat[start : start + step]
                self._read(file, chunk[: target.numel()])
                target.copy_(chunk[: target.numel()])

    def _read(self, file: Any, flat: Tensor) -> None:
        view = memoryview(flat.detach().view(torch.uint8).numpy().data)
        while view:
            count = file.readinto(view)
            if not count:
                raise WeightsError(f"{self.path} ends {len(view)} bytes before its tensors do: copy the file again")
            view = view[count:]


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        WeightsError: when the file is missing or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def scan(folder: Path, stem: str = "model", pickled: str = "pytorch_model.bin") -> dict[str, Stored]:
    """Finds the tensors of a folder: one safetensors file, several with an index, or the same of PyTorch's files.

    Args:
        folder: where to look.
        stem: of `STEM.safetensors` and `STEM.safetensors.index.json`.
        pickled: name of PyTorch's file, its index being `PICKLED.index.json`.

    Returns:
        The tensors by name; empty when there is no such file.

    Raises:
        WeightsError: for a file that is damaged, unsafe, outside of the folder or at odds with the index.
    """
    for name, header in ((f"{stem}.safetensors", safetensors_header), (pickled, pickle_header)):
        if (folder / name).exists():
            return header(inside(folder, name))
        if (folder / f"{name}.index.json").exists():
            return _scan_index(folder, f"{name}.index.json", header)
    return {}


def _scan_index(folder: Path, index: str, header: Any) -> dict[str, Stored]:
    path = inside(folder, index)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{path}: weight_map must map tensor names to file names")
    found: dict[str, Stored] = {}
    shards = {name: inside(folder, name, said_by=path) for name in sorted(set(weight_map.values()))}
    for name, shard in shards.items():
        if not shard.exists():
            raise WeightsError(f"{shard} is missing, which {path} names")
        for tensor, stored in header(shard).items():
            if weight_map.get(tensor) != name:
                raise WeightsError(f"tensor {tensor} lies in {shard}, but {path} says {weight_map.get(tensor)!r}")
            found[tensor] = stored
    for tensor, name in weight_map.items():
        if tensor not in found:
            raise WeightsError(f"tensor {tensor} is missing in {folder / name}, where {path} expects it")
    return found


def inside(folder: Path, name: str, said_by: Path | None = None) -> Path:
    """Returns the path of a file that lies in the folder itself, links followed.

    The hub's cache is allowed for: its folders `snapshots/REVISION` hold links into `blobs` beside `snapshots`.

    Raises:
        WeightsError: when the file lies elsewhere.
    """
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    path = folder / name
    if name in ("", ".", "..") or Path(name).name != name or path.resolve().parent not in homes:
        raise WeightsError(f"{said_by or folder} names the file {name!r}, which is not inside of the folder {folder}")
    return path


def safetensors_header(path: Path) -> dict[str, Stored]:
    """Reads where the tensors of a safetensors file lie.

    Raises:
        WeightsError: unless the tensors are floating-point and cover the file exactly.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise WeightsError(
                f"{path}: a safetensors header of {length} bytes cannot be, in a file of {size} bytes; "
                f"at most {MAX_HEADER_BYTES} are allowed"
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
            if not isinstance(header, dict):
                raise TypeError("not an object")
            header.pop("__metadata__", None)
            found = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
        except WeightsError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{path}: the safetensors header is malformed ({error!r})") from None
    end = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != end:
            raise WeightsError(f"tensor {name} begins at byte {stored.offset} of {path}, expected {end}")
        end += stored.nbytes
    if end != size:
        raise WeightsError(f"{path} has {size} bytes, its header expects {end}: the file was cut or added to")
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key appears twice")
    return content


def _entry(path: Path, name: str, fields: dict[str, Any], data: int) -> Stored:
    if fields["dtype"] not in DTYPES:
        raise WeightsError(
            f"tensor {name} in {path} has dtype {fields['dtype']}, expected {' | '.join(DTYPES)}: "
            "quantized weights cannot be used"
        )
    shape, (start, end) = tuple(fields["shape"]), fields["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"{name}: sizes and offsets must be integers from 0 up")
    stored = Stored(path, DTYPES[fields["dtype"]], shape, data + start)
    if end - start != stored.nbytes:
        raise WeightsError(
            f"tensor {name} in {path} has {end - start} bytes, but its shape {list(shape)} "
            f"and dtype {fields['dtype']} expect {stored.nbytes}"
        )
    return stored


def pickle_header(path: Path) -> dict[str, Stored]:
    """Reads where the tensors of a file that `torch.save` wrote lie, refusing whatever is not plain tensors.

    Raises:
        WeightsError: for code, a damaged or compressed archive, or tensors that are not row-major.
    """
    try:
        with FakeTensorMode():  # tensors without data, which know their place in the file
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with zipfile.ZipFile(path) as archive:
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
    except (OSError, MemoryError):  # of the machine
        raise
    except Exception as error:  # a byte changed in what describes tensors has torch's reader fail as any code may
        code = re.search(r"GLOBAL (\S+)", str(error))  # torch's own words advise to run it
        damaged = f"it is damaged, or of the format before PyTorch 1.6 ({type(error).__name__})"
        reason = f"it asks for {code[1]}" if code else damaged
        raise WeightsError(f"{path} cannot be read as plain tensors, and nothing in it was run: {reason}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors")
    starts = [record.header_offset for record in records]
    found = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise WeightsError(f"{path}: {name!r} is a {type(tensor).__name__}, expected a tensor")
        if tensor.dtype not in DTYPES.values() or not tensor.is_contiguous():
            expected = " | ".join(str(dtype) for dtype in DTYPES.values())
            raise WeightsError(
                f"tensor {name} in {path} has dtype {tensor.dtype} and strides {tensor.stride()}, "
                f"expected {expected}, contiguous"
            )
        storage = tensor.untyped_storage()
        start = storage._checkpoint_offset
        if start is None or tensor.is_neg():
            raise WeightsError(f"tensor {name} in {path} is on no device, or a negative view, expected its own numbers")
        record = records[bisect_right(starts, start) - 1]
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != storage.nbytes():
            raise WeightsError(f"tensor {name} in {path}: its record is damaged or compressed")
        offset = start + int(tensor.storage_offset()) * tensor.dtype.itemsize
        found[name] = Stored(path, tensor.dtype, tuple(tensor.shape), offset)
    return found
