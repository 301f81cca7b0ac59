"""Slices in safetensors files: each process writes its own, and reads whatever ranges it needs from all of them."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mixtral.weights.files import CHUNK_BYTES, DTYPES, Stored, WeightsError, safetensors_header
from train.checkpoint.durable import Written, write_durably
from train.errors import CheckpointError
from train.parallel.state import Slice

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_KEY = re.compile(r"(\w+)/([\w.]+)\[(\d+):(\d+)\]")


def write_slices(path: Path, slices: Iterable[Slice], beat: Callable[[], None]) -> Written:
    """Writes slices into a new safetensors file, under `KIND/NAME[START:STOP]`, and reads it back.

    No more than a few chunks of them are copied at a time.

    Args:
        path: of the file.
        slices: of any device.
        beat: is called before each chunk.

    Raises:
        OSError: when the disk does not take them.
        CheckpointError: when they are not what is read back.
    """
    header, end, items = {}, 0, list(slices)
    for item in items:
        key = f"{item.kind}/{item.whole.name}[{item.start}:{item.stop}]"
        start, end = end, end + item.values.nbytes
        dtype = DTYPE_NAMES[item.values.dtype]
        header[key] = {"dtype": dtype, "shape": [item.values.numel()], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[memoryview]:
        yield memoryview(len(text).to_bytes(8, "little"))
        yield memoryview(text)
        for item in items:
            for chunk in item.values.split(CHUNK_BYTES // item.values.element_size()):
                beat()
                yield memoryview(chunk.cpu().view(torch.uint8).numpy().data)

    return write_durably(path, parts(), read_back=True)


class Values:
    """The slices of several files, as one set of parameters.

    Args:
        paths: of the files, whose content was checked.

    Raises:
        CheckpointError: for a file that `write_slices` did not write.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._found: dict[tuple[str, str], list[tuple[int, int, Stored]]] = {}
        for path in paths:
            try:
                header = safetensors_header(path)
            except WeightsError as error:
                raise CheckpointError(str(error)) from None
            for key, stored in header.items():
                match = _KEY.fullmatch(key)
                if match is None or stored.shape != (int(match[4]) - int(match[3]),):
                    raise CheckpointError(f"{path} holds {key!r}, which no checkpoint does")
                self._found.setdefault((match[1], match[2]), []).append((int(match[3]), int(match[4]), stored))
        for ranges in self._found.values():
            ranges.sort(key=lambda item: item[:2])

    def fill(self, item: Slice) -> None:
        """Overwrites a slice with what the files hold of it.

        Raises:
            CheckpointError: when they do not hold all of it.
        """
        at = item.start
        for start, stop, stored in self._found.get((item.kind, item.whole.name), []):
            if stop <= at or at == item.stop:
                continue
            if start > at:
                break
            end = min(stop, item.stop)
            _read(stored, at - start, item.values[at - item.start : end - item.start])
            at = end
        if at < item.stop:
            raise CheckpointError(f"{item.kind} of {item.whole.name} lack element {at} in the checkpoint")


def _read(stored: Stored, first: int, out: Tensor) -> None:
    try:
        stored.read_from(first, out)
    except (WeightsError, OSError) as error:
        raise CheckpointError(str(error)) from None
