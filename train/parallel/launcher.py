"""What a launcher said of this process and the others, checked before torch is imported."""

import os
import socket
import subprocess
import sys

from train.config import Config
from train.errors import ConfigError, MachineError

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def number_of_processes() -> int:
    """Reads how many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_processes(processes: int, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a module in so many processes of this host, on a port that is free, and waits for them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", module, *words]
    return subprocess.run(command, capture_output=True, text=True)


def is_first() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return os.environ.get("RANK", "0") == "0"


def check_launch(config: Config) -> None:
    """Refuses what processes started so can never train.

    Raises:
        ConfigError: when the experts cannot be split over so many processes.
        MachineError: when a variable that the launcher or the user sets is wrong, or the port is taken.
    """
    _check_variables()
    processes, expert = number_of_processes(), config.parallel.expert
    if processes % expert != 0:
        if processes == 1:
            raise ConfigError(
                f"parallel.expert={expert} needs as many processes: torchrun --nproc_per_node {expert} -m train ..."
            )
        fits = [n for n in range(1, processes + 1) if processes % n == config.model.num_local_experts % n == 0]
        raise ConfigError(
            f"parallel.expert={expert} does not divide the number of processes, {processes}: "
            f"use one of {', '.join(map(str, fits))}, or start a multiple of {expert} processes"
        )
    if processes == 1 and config.parallel.zero == 0:
        return
    for variable in INTERFACES:
        _check_interface(variable)
    if processes > 1 and hosts_the_meeting():
        listen().close()


def hosts_the_meeting() -> bool:
    """Whether this process listens at MASTER_PORT: the first does, unless torchrun does so itself."""
    return os.environ.get("RANK") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def listen() -> socket.socket:
    """Opens MASTER_PORT on every address of this host.

    Raises:
        MachineError: when it cannot be had, naming one that can.
    """
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", int(os.environ["MASTER_PORT"])), family=family, dualstack_ipv6=dual)
    except OSError as error:
        with socket.create_server(("", 0)) as free:
            raise MachineError(
                f"the processes cannot meet at {meeting_place()}: {os.strerror(error.errno or 0).lower()}; "
                f"port {free.getsockname()[1]} is free: --master_port of torchrun and deepspeed, PORT of launch/*.sh"
            ) from None


def meeting_place() -> str:
    """MASTER_ADDR:MASTER_PORT."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def interfaces() -> list[str]:
    """Names the network interfaces of this host."""
    return [name for _, name in socket.if_nameindex()]


def _check_variables() -> None:
    number = {name: os.environ[name] for name in VARIABLES if name in os.environ and name != "MASTER_ADDR"}
    for name, value in number.items():
        if not value.isdecimal():
            raise MachineError(f"{name}={value!r} is not a number: a launcher sets it")
    if int(number.get("MASTER_PORT", "0")) >= 2**16:
        raise MachineError(f"MASTER_PORT={number['MASTER_PORT']} is no port: it must be below {2**16}")
    for name in TASKS:
        if "WORLD_SIZE" not in os.environ and int(os.environ.get(name, "1")) > 1:
            raise MachineError(
                f"{name}={os.environ[name]}, but WORLD_SIZE is not set: each process would train alone. Start one "
                "torchrun on each host, as launch/slurm.sbatch does, or set WORLD_SIZE=1 where that is meant"
            )
    processes, rank = int(number.get("WORLD_SIZE", "1")), int(number.get("RANK", "0"))
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if processes > 1 and missing:
        raise MachineError(
            f"WORLD_SIZE={processes}, but {', '.join(missing)} not set: start with torchrun, deepspeed or "
            "accelerate launch, which set them"
        )
    if rank >= processes:
        raise MachineError(f"RANK={rank} is not below WORLD_SIZE={processes}: processes count from 0")


def _check_interface(variable: str) -> None:
    """Checks that what a backend is told to talk over is there; NCCL takes prefixes, and its `^` says which not."""
    asked, here = os.environ.get(variable, ""), interfaces()
    if not asked or asked.startswith("^"):
        return
    exact = variable == "GLOO_SOCKET_IFNAME" or asked.startswith("=")
    for name in asked.removeprefix("=").split(","):
        if not any(known == name if exact else known.startswith(name) for known in here):
            raise MachineError(
                f"{variable}={asked}: {socket.gethostname()} has no network interface {name}; "
                f"expected one of {', '.join(here)}"
            )
