"""How the processes of a run meet, in bounded time, and form their process group."""

import contextlib
import datetime
import json
import os
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist

from train.errors import MachineError
from train.parallel.launcher import hosts_the_meeting, interfaces, listen, meeting_place, number_of_processes

COLLECTIVE_TIMEOUT = datetime.timedelta(days=20)  # others wait while one reads a corpus; hangs are the watchdog's
POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0


def meet(backend: str, patience: float) -> None:
    """Forms the process group of all processes; a lone process becomes a group of its own.

    Args:
        backend: gloo or nccl.
        patience: seconds that a process waits for the others, and for their first connections.

    Raises:
        MachineError: naming the address that does not answer, the processes that did not come, or the GPU that is
            not there.
    """
    timeout = datetime.timedelta(seconds=patience / 4)  # gloo tries so long several times
    processes, device = number_of_processes(), _own_device(backend)
    if processes == 1:  # accelerate asks for these before it lets DeepSpeed drive
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        store: dist.Store = dist.HashStore()
    else:
        try:
            store = _open_store(processes, patience)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise MachineError(f"the processes cannot meet at {meeting_place()}: {_first_line(error)}") from None
    try:
        dist.init_process_group(
            backend, store=store, rank=int(os.environ["RANK"]), world_size=processes, timeout=timeout
        )
        _await(dist.all_reduce(torch.zeros(1, device=device), async_op=True), patience)  # NCCL connects no earlier
    except RuntimeError as error:
        raise MachineError(
            f"the processes met, but cannot talk over {backend}: {_first_line(error)}; set "
            f"{backend.upper()}_SOCKET_IFNAME to what joins the hosts, here one of {', '.join(interfaces())}"
        ) from None
    dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT)
    store.set_timeout(COLLECTIVE_TIMEOUT)


def _own_device(backend: str) -> torch.device:
    """The device that this process's collectives run on."""
    if backend == "gloo":
        return torch.device("cpu")
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    here = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if here > there:
        raise MachineError(
            f"{socket.gethostname()} has {there} GPUs for {here} processes: start no more than that on it"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _await(work: dist.Work, patience: float) -> None:
    """Waits for a collective, without the backend's own way of giving up, which ends the process."""
    deadline = time.monotonic() + patience
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the first collective did not end within {patience:g} s")
        time.sleep(POLL_SECONDS / 10)
    work.wait()


def _open_store(processes: int, patience: float) -> dist.Store:
    """Connects to the store at MASTER_ADDR:MASTER_PORT and returns once every process has."""
    rank, deadline = int(os.environ["RANK"]), time.monotonic() + patience
    hosting = hosts_the_meeting()
    with listen() if hosting else contextlib.nullcontext() as listener:
        _await_listener(deadline, patience)  # or torch would fill the terminal while it waits
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            processes,
            is_master=hosting,
            timeout=datetime.timedelta(seconds=patience),
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener else None,
        )
    attempt = _of_this_attempt(store)
    attempt.set(report_key(rank), "")
    attempt.set(f"here/{rank}", json.dumps(_describe_host()))
    attempt.add("arrived", 1)
    if rank == 0:
        trouble = _trouble(attempt, processes, deadline, patience)
        attempt.set("trouble", trouble)
    else:
        trouble = _told(attempt, deadline, patience)
    if trouble:
        time.sleep(GRACE_SECONDS * (rank == 0))  # the others read it, before the store goes
        raise MachineError(trouble)
    return attempt


def report_key(rank: int) -> str:
    """Names what a process reports of itself in the store; it is there, if empty, once all have met."""
    return f"report/{rank}"


def connect_again(seconds: float) -> dist.Store:
    """Opens a connection of its own to where the processes met: what waits on it holds up no collective, nor it that.

    Args:
        seconds: that an answer may take.

    Raises:
        RuntimeError: when nothing answers.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = datetime.timedelta(seconds=seconds)
    store = dist.TCPStore(host, port, is_master=False, timeout=patience, wait_for_workers=False)
    return _of_this_attempt(store)


def _of_this_attempt(store: dist.Store) -> dist.Store:
    """The part of a store that no attempt before has written into."""
    return dist.PrefixStore(f"cierzo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _describe_host() -> tuple[str, str | None]:
    """What tells this host from others, and what is wrong with it where there are others."""
    network = os.readlink("/proc/self/ns/net")
    host = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() + network
    try:
        with socket.create_server((socket.gethostname(), 0)) as own:
            address = own.getsockname()[0]
    except OSError:
        address = "127.0.0.1"  # as gloo does
    if torch.cuda.is_available() or "GLOO_SOCKET_IFNAME" in os.environ or not address.startswith("127."):
        return host, None
    return host, (
        f"host {socket.gethostname()} calls itself {address}, which no other host can reach: set GLOO_SOCKET_IFNAME "
        f"there to the interface that joins the hosts, one of {', '.join(sorted(set(interfaces()) - {'lo'}))}"
    )


def _await_listener(deadline: float, patience: float) -> None:
    while True:
        try:
            address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            return socket.create_connection(address, timeout=max(POLL_SECONDS, deadline - time.monotonic())).close()
        except OSError as error:
            if time.monotonic() > deadline - POLL_SECONDS:
                raise MachineError(
                    f"nothing answers at {meeting_place()} within {patience:g} s (parallel.meeting_seconds): "
                    f"{error.strerror or error}; MASTER_ADDR must be an address of the first process's host, the "
                    "same for all"
                ) from None
            time.sleep(POLL_SECONDS)


def _trouble(store: dist.Store, processes: int, deadline: float, patience: float) -> str:
    """Waits for every process; says what is wrong with those that came, or did not."""
    while store.add("arrived", 0) < processes:
        if time.monotonic() > deadline:
            absent = [rank for rank in range(processes) if not store.check([f"here/{rank}"])]
            return _absence(", ".join(map(str, absent)), patience)
        time.sleep(POLL_SECONDS)
    hosts = dict(json.loads(store.get(f"here/{rank}")) for rank in range(processes))
    return next(filter(None, hosts.values()), "") if len(hosts) > 1 else ""


def _told(store: dist.Store, deadline: float, patience: float) -> str:
    """Waits for what the first process found."""
    while not store.check(["trouble"]):
        if time.monotonic() > deadline + GRACE_SECONDS:
            return _absence("0", patience)
        time.sleep(POLL_SECONDS)
    return store.get("trouble").decode()


def _absence(ranks: str, patience: float) -> str:
    return (
        f"process {ranks} of {number_of_processes()} did not come to {meeting_place()} within {patience:g} s "
        "(parallel.meeting_seconds): did it start, and can its host reach that address?"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
