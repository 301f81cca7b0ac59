"""What benches measure with: a process for every measurement, sides in turns, memory, and the machine's own speed."""

import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def in_turns(module: str, sides: Iterable[str], rounds: int, words: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Measures sides in turns, so that neither a warm allocator nor a busy minute favours one.

    Args:
        module: of the bench, which measures the side after `--measure` and prints what it found as JSON.
        sides: to be measured.
        rounds: processes of each side.
        words: further arguments.

    Returns:
        What each process of each side printed.
    """
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side in reversed(found) if turn % 2 else found:
            command = [sys.executable, "-m", module, "--measure", side, *words]
            found[side].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    return found


def median(runs: Sequence[dict[str, Any]], figure: str) -> float:
    """The median of a figure, or of all values of one that is a list, over the processes of a side."""
    values = [run[figure] if isinstance(run[figure], list) else [run[figure]] for run in runs]
    return statistics.median(value for some in values for value in some)


def spread(runs: Sequence[dict[str, Any]], figure: str) -> float:
    """How far the largest value is above the smallest, in medians."""
    values = [value for run in runs for value in run[figure]]
    return (max(values) - min(values)) / statistics.median(values)


def machine() -> str:
    """Says what is measured on."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"


def timed(function: Callable[[], object]) -> float:
    """Seconds that a function takes, what it left to the device included."""
    started = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def product_rate(shapes: Iterable[tuple[int, int, int]], dtype: torch.dtype, repeats: int = 8) -> float:
    """The machine's own speed: FLOP/s of the fastest of some products (m, k) @ (k, n), alone and warm."""
    best = 0.0
    for m, k, n in shapes:
        left, right = torch.randn(m, k, device=DEVICE).to(dtype), torch.randn(n, k, device=DEVICE).to(dtype)
        out = torch.empty(m, n, device=DEVICE, dtype=dtype)

        def product(left: Tensor = left, right: Tensor = right, out: Tensor = out) -> None:
            torch.mm(left, right.t(), out=out)

        product()
        best = max(best, 2 * m * k * n / min(timed(product) for _ in range(repeats)))
    return best


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[list[int]]:
    """Counts the bytes that operations keep for backward, the parameters left out: the only item of the list."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, Tensor] = {}
    total = [0]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = tensor  # held, so that no other gets its place
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total


def resident(key: str) -> int:
    """Reads VmRSS or VmHWM of this process, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


class PeakMemory:
    """The most memory held inside the block, above what was held before it: `.bytes`.

    On the CPU that is the resident memory of the process, read every millisecond.
    """

    def __enter__(self) -> "PeakMemory":
        """Begins to watch."""
        self.done = threading.Event()
        self.highest = self.before = self._now()
        self.watcher = threading.Thread(target=self._watch)
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops watching."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            self.highest = torch.cuda.max_memory_allocated()
        else:
            self.done.set()
            self.watcher.join()
        self.bytes = self.highest - self.before

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.highest = max(self.highest, self._now())

    @staticmethod
    def _now() -> int:
        if DEVICE == "cuda":
            return torch.cuda.memory_allocated()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
