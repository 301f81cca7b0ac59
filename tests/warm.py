"""Starts the processes of a run as `torchrun` would, by forking a server that has imported everything once.

Each is a process of its own as torchrun's are: gloo, DeepSpeed, files, signals and exit codes are what they are, and it
runs a module as `python -m` would, to the interpreter's end. What it shares with the others is what importing alone
decides: the seed of hashes, and what libraries say and read of the environment while they are imported. Launches that
are about these, or about a launcher, belong to `launch` in `tests.train.helpers`.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MODULES = (
    "train.compose",
    "hydra",
    "train.run",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "setuptools",
    "train.verify.verb",
    "train.parallel.replicated",
    "train.parallel.zero",
    "peft",
    "deepspeed.runtime.zero.muon.original_muon",  # with all of torch's compiler, whenever an optimizer is given
)
AT_IMPORT = ("CUDA_", "DS_", "HF_", "MKL_", "OMP_", "PYTHON", "TORCH_", "TRANSFORMERS_")
FIXED = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # CUDA does not survive a fork, and gloo is what these launches are for
    "DS_ACCELERATOR": "cpu",  # as a run sets it then, before it imports DeepSpeed
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # Arrow's allocator has a thread otherwise
}
REQUEST_BYTES = 2**17
START_SECONDS = 240.0
PATIENCE_SECONDS = 30.0  # torchrun's, between SIGTERM and SIGKILL
PR_SET_PDEATHSIG = 1
STARTING = threading.Lock()


@dataclass(frozen=True)
class Done:
    """What became of a launch.

    Attributes:
        returncode: of the process that failed first, or 0.
        returncodes: of each process, by rank; negative for the signal that ended it.
        stdout, stderr: what all of them wrote.
    """

    returncode: int
    returncodes: list[int]
    stdout: str
    stderr: str


def launch_ranks(processes: int, module: str, *words: str, timeout: float = 240, **environment: str) -> Done:
    """Runs `python -m module words...` in processes that torchrun's variables join, or in one that is told of none.

    When one fails, the others are ended as torchrun ends them. Nothing of the launch is left behind.
    """
    with STARTING:
        forks = server()
    with meeting(processes) as variables:
        return forks.launch(processes, [module, *words], os.environ | FIXED | variables | environment, timeout)


@contextlib.contextmanager
def meeting(processes: int) -> Iterator[dict[str, str]]:
    """Hosts the store where the processes meet, on a port that it chose, and yields the variables that tell of it."""
    if processes == 1:
        yield {}
        return
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }


class Server:
    """The process that is forked, seen from the tests' own, with which it ends."""

    def __init__(self, modules: tuple[str, ...] = MODULES) -> None:
        self.environment = os.environ | FIXED
        self.log = os.memfd_create("log")
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(theirs.fileno()), *modules],
                cwd=Path(__file__).parents[1],
                env=self.environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                start_new_session=True,
            )
        self.channel.settimeout(START_SECONDS)
        self._check(self.channel.recv(1))

    def launch(self, processes: int, words: list[str], environment: dict[str, str], timeout: float) -> Done:
        """Forks, waits for the exit codes, and kills whatever is there still."""
        for name in sorted(environment.keys() | self.environment.keys()):
            if name.startswith(AT_IMPORT) and environment.get(name) != self.environment.get(name):
                raise ValueError(f"{name} is read while libraries are imported: it needs a fresh interpreter, `launch`")
        request = json.dumps([processes, words, os.getcwd(), environment]).encode()
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with mine, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            with theirs:
                socket.send_fds(self.channel, [request], [theirs.fileno(), out.fileno(), err.fileno()])
            group = int(self._check(mine.recv(16)))
            mine.settimeout(timeout)
            try:
                first, codes = json.loads(self._check(mine.recv(4096)))
            except TimeoutError:
                err.seek(0)
                raise subprocess.TimeoutExpired(words, timeout, stderr=err.read()) from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            out.seek(0)
            err.seek(0)
            return Done(first, codes, out.read(), err.read())

    def close(self) -> None:
        """Ends the server, by leaving it nobody to listen to, and with it whatever it started."""
        self.channel.close()
        self.process.wait()
        os.close(self.log)

    def _check(self, answer: bytes) -> bytes:
        if not answer:
            said = os.pread(self.log, 2**20, 0).decode()
            raise RuntimeError(f"the fork server ended: {said[-3000:]}")
        return answer


@functools.cache
def server() -> Server:
    """Starts the server, once for all tests; the first launch waits for its imports."""
    started = Server()
    atexit.register(started.close)
    return started


def serve(channel: socket.socket, modules: list[str]) -> list[str]:
    """Imports, then forks for each request. Returns in the processes asked for, with the words they are to run."""
    started_with = dict(os.environ)
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or collecting would copy every page into every process
    channel.send(b"+")
    while True:
        request, descriptors, *_ = socket.recv_fds(channel, REQUEST_BYTES, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not request:
            sys.exit()  # the tests are over
        assert len(os.listdir("/proc/self/task")) == 1, "a thread that importing started is not in the processes"
        if os.fork() == 0:
            channel.close()
            processes, words, folder, environment = json.loads(request)
            os.setsid()
            rank = lead(processes, *descriptors)
            for name in started_with.keys() - environment.keys():
                del os.environ[name]
            os.environ |= {name: value for name, value in environment.items() if started_with.get(name) != value}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            os.chdir(folder)
            return words
        for descriptor in descriptors:
            os.close(descriptor)


def lead(processes: int, reply: int, out: int, err: int) -> int:
    """Forks the processes of a launch, waits for them and replies. Returns in each of them alone, with its rank."""
    end_with_parent()
    os.write(reply, str(os.getpid()).encode())
    os.dup2(out, 1)
    os.dup2(err, 2)
    pids: list[int] = []
    for rank in range(processes):
        pids.append(os.fork())
        if pids[-1] == 0:
            end_with_parent()
            for descriptor in (reply, out, err):
                os.close(descriptor)
            return rank
    os.write(reply, json.dumps(await_codes(pids)).encode())
    os._exit(0)


def await_codes(pids: list[int]) -> tuple[int, list[int]]:
    """Waits for processes; when one fails, ends the others. Returns the first failure's code, and each one's."""
    first, deadline = 0, float("inf")
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
        if pid and codes[pid] != 0 and first == 0:
            first, deadline = codes[pid], time.monotonic() + PATIENCE_SECONDS
            kill(set(pids) - codes.keys(), signal.SIGTERM)
        if time.monotonic() > deadline:
            kill(set(pids) - codes.keys(), signal.SIGKILL)
        time.sleep(0.0 if pid else 0.02)
    return first, [codes[pid] for pid in pids]


def kill(pids: set[int], number: signal.Signals) -> None:
    """Signals processes that have not been waited for. One that is stopped hears nothing, and is killed at once."""
    for pid in pids:
        is_stopped = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        os.kill(pid, signal.SIGKILL if is_stopped else number)


def end_with_parent() -> None:
    """Has the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    module, *arguments = serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
