"""Devices as the planner knows them: conf/hardware.yaml, or what was measured of this machine."""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.compose import conf_folder
from train.config import PlanConfig, nearest
from train.errors import ConfigError


@dataclass(frozen=True)
class Efficiency:
    """Which share of a peak each kind of work reaches; one number for all devices of a kind.

    Attributes:
        matrices: of dense matrix products.
        experts: of those of one expert after the other.
        attention: of the attention core, forward and backward, counted without causality.
        memory: of the memory's bandwidth, by elementwise work.
        update: of the memory's bandwidth, by the optimizer.
        network: of a link's bandwidth, by collectives.
        launch: seconds that a process takes to start one kernel.
    """

    matrices: float
    experts: float
    attention: float
    memory: float
    update: float
    network: float
    launch: float


@dataclass(frozen=True)
class Device:
    """One device, and its share of its host; units as in conf/hardware.yaml.

    Of this machine's processors, which all processes share, it is the whole host's memory.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    fp8: float | None
    bandwidth: float
    inside: float
    between: float
    host: float
    per_host: int
    host_memory: float
    source: str
    efficiency: Efficiency

    @property
    def is_gpu(self) -> bool:
        """Whether it is none of this machine's processors."""
        return self.name != "cpu"

    def memory_of_each(self, processes: int) -> float:
        """Bytes that each of so many processes has."""
        return self.memory if self.is_gpu else self.memory / processes

    def hosts(self, processes: int) -> int:
        """Hosts on which so many processes run."""
        return math.ceil(processes / self.per_host) if self.is_gpu else 1

    def peak(self, precision: str) -> float:
        """Dense FLOP/s in a precision of the trainer's."""
        return self.bf16 if precision == "bf16" else self.fp32


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """Reads conf/hardware.yaml."""
    rows: dict[str, dict[str, Any]] = yaml.safe_load((conf_folder() / "hardware.yaml").read_text(encoding="utf-8"))
    return rows


def device_of(plan: PlanConfig) -> Device:
    """Gives the device that is planned for.

    Raises:
        ConfigError: for one that is not known, or a calibration that cannot be read.
    """
    rows = table()
    if plan.gpu == "cpu":
        for name in ("per_host", "interconnect"):
            if getattr(plan, name) is not None:
                raise ConfigError(
                    f"plan.{name}={getattr(plan, name)} is of hosts with GPUs: leave it out of plan.gpu=cpu"
                )
        return _measured(plan.calibration)
    known = [name for name in rows if name != "efficiency"]
    if plan.gpu not in known:
        raise ConfigError(f"plan.gpu={plan.gpu}: expected {' | '.join([*known, 'cpu'])}{nearest(plan.gpu, known)}")
    device = Device(name=plan.gpu, efficiency=Efficiency(**rows["efficiency"]), **rows[plan.gpu])
    between = device.between if plan.interconnect is None else plan.interconnect * 1e9
    return dataclasses.replace(device, between=between, per_host=plan.per_host or device.per_host)


def _measured(path: str | None) -> Device:
    if path is None:
        raise ConfigError(
            "plan.gpu=cpu is not measured: set plan.calibrate=true, or plan.calibration to the calibration.json of an "
            "earlier plan"
        )
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        efficiency = Efficiency(**found.pop("efficiency"))
        return Device(efficiency=efficiency, **found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"plan.calibration={path} cannot be read: {error}") from None
