"""NCCL over gloo: it takes tensors of the process's own GPU alone, and contiguous ones."""

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import distributed_c10d

NAME = "stand_in"
PATIENCE = datetime.timedelta(minutes=10)


def on_host(given: Any) -> Any:
    """The same memory as host tensors."""
    if isinstance(given, list | tuple):
        return [on_host(one) for one in given]
    if not given.is_cuda:
        raise RuntimeError("No backend type associated with device type cpu")
    if given.device.index != torch.cuda.current_device():
        raise RuntimeError(f"a tensor on {given.device} in a collective of cuda:{torch.cuda.current_device()}")
    if not given.is_contiguous():
        raise ValueError("Tensors must be contiguous")
    return torch.ops.stand_in.as_cpu(given)


class Pending(dist.Work):
    """A collective under way."""

    def __init__(self, pending: dist.Work, results: list[Any]) -> None:
        super().__init__()
        self._pending, self._results = pending, results

    def wait(self, timeout: datetime.timedelta = PATIENCE) -> bool:
        return self._pending.wait()

    def is_completed(self) -> bool:
        return self._pending.is_completed()

    def get_future(self) -> "torch.futures.Future[Any]":
        self._pending.wait()
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(self._results)
        return future


class Nccl(dist.ProcessGroup):
    """A process group of the device."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
        super().__init__(rank, size)
        self._size, self._number = size, 0
        self._gloo = dist.ProcessGroupGloo(store, rank, size, PATIENCE)

    def size(self) -> int:
        return self._size

    def getBackendName(self) -> str:
        return "nccl"

    def _get_sequence_number_for_group(self) -> int:
        return self._number

    def _set_sequence_number_for_group(self) -> None:
        pass

    def _run(self, name: str, tensors: list[Any], results: Any, *words: Any) -> Pending:
        self._number += 1
        pending = getattr(self._gloo, name)(*(on_host(one) for one in tensors), *words)
        return Pending(pending, results if isinstance(results, list) else [results])

    def allreduce(self, tensors: Any, opts: Any = None) -> Pending:
        return self._run("allreduce", [tensors], tensors, opts or c10d.AllreduceOptions())

    def broadcast(self, tensors: Any, opts: Any) -> Pending:
        return self._run("broadcast", [tensors], tensors, opts)

    def allgather(self, out: Any, tensors: Any, opts: Any = None) -> Pending:
        return self._run("allgather", [out, tensors], out, c10d.AllgatherOptions())

    def all_gather_single(self, out: Any, tensor: Any, opts: Any = None) -> Pending:
        return self._run("_allgather_base", [out, tensor], out, c10d.AllgatherOptions())

    def reduce_scatter_single(self, out: Any, tensor: Any, opts: Any) -> Pending:
        return self._run("_reduce_scatter_base", [out, tensor], out, opts)

    def all_to_all_single(self, out: Any, tensor: Any, taken: Any = (), given: Any = (), opts: Any = None) -> Pending:
        return self._run("alltoall_base", [out, tensor], out, list(taken), list(given), c10d.AllToAllOptions())

    def send(self, tensors: Any, to: int, tag: int) -> Pending:
        return self._run("send", [tensors], tensors, to, tag)

    def recv(self, tensors: Any, source: int, tag: int) -> Pending:
        return self._run("recv", [tensors], tensors, source, tag)

    def barrier(self, opts: Any = None) -> Pending:
        return self._run("barrier", [], [], c10d.BarrierOptions())


def register() -> None:
    """Has process groups of NCCL, and of no named backend, be of this one."""
    dist.Backend.register_backend(NAME, Nccl, devices=["cuda"])
    plain_init, plain_group = dist.init_process_group, dist.new_group

    def init(backend: str | None = None, *words: Any, **more: Any) -> None:
        plain_init(NAME if backend in (None, "nccl") else backend, *words, **more)

    def new_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, *words: Any, **more: Any) -> Any:
        return plain_group(ranks, timeout, NAME if backend in (None, "nccl") else backend, *words, **more)

    def own_device(group: Any = None) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    for place in (dist, distributed_c10d):
        place.is_nccl_available = lambda: True
        place.init_process_group, place.new_group = init, new_group
    distributed_c10d._set_pg_timeout = lambda *_: None
    distributed_c10d._get_object_coll_device = lambda group=None: str(own_device())
    distributed_c10d._get_pg_default_device = own_device
