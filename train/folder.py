"""The run folder: its lock, and the files that say what ran and how it ended."""

import fcntl
import json
import os
import platform
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml

from train.compose import Composed, to_yaml
from train.errors import MachineError

PACKAGES = (
    "cierzo",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "datasets",
    "hydra-core",
    "peft",
    "safetensors",
    "wandb",
)


def refuse_used(path: Path) -> None:
    """Refuses a folder that a run trained in, or that holds files that are no run's.

    Raises:
        MachineError: with the fix.
    """
    metrics = path / "metrics.jsonl"
    if metrics.is_file() and metrics.stat().st_size:
        raise MachineError(f"run.dir={path} holds a run already: name another folder, or move this one away")
    if path.is_dir() and not (path / ".lock").exists() and any(path.iterdir()):
        raise MachineError(f"run.dir={path} holds files that are no run's: name a new or an empty folder")


def refuse_early(path: Path) -> None:
    """Refuses a used folder before anything heavy is imported; one that a living run holds is left to `RunFolder`.

    Raises:
        MachineError: as `refuse_used`.
    """
    try:
        with (path / ".lock").open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except OSError:
        pass  # no lock, no run
    refuse_used(path)


class RunFolder:
    """A folder held by this process alone until it is closed.

    Args:
        path: of the folder; created where it is missing.

    Raises:
        MachineError: when it cannot be written, when a living run holds it, when a run that trained is in it,
            or files that are no run's. Nothing is changed in it then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not (path / ".lock").exists():
                refuse_used(path)
            self._lock = (path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise MachineError(f"run.dir={path} cannot be written: {error.strerror}") from None
        self._take_lock()
        try:
            refuse_used(path)
        except MachineError:
            self._lock.close()
            raise
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        for name in (
            "exit.json",
            "summary.json",
            "certificate.json",
        ):  # of an attempt before its first step, or a proof
            (path / name).unlink(missing_ok=True)

    def _take_lock(self) -> None:
        """Takes the lock; that of a run that died is free, since the system released it."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "an unknown process"
            self._lock.close()
            raise MachineError(
                f"run.dir={self.path} is in use by {owner}: name another folder, or stop that run"
            ) from None

    @property
    def metrics_path(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    def describe(self, composed: Composed, processes: int, device: str) -> None:
        """Writes `config.yaml`, `overrides.yaml` and `environment.json`."""
        (self.path / "config.yaml").write_text(to_yaml(composed.config), encoding="utf-8")
        (self.path / "overrides.yaml").write_text(yaml.safe_dump(composed.overrides), encoding="utf-8")
        self.write_json(
            "environment.json",
            {
                "python": sys.version.split()[0],
                "platform": platform.platform(),
                "host": socket.gethostname(),
                "processes": processes,
                "device": device,
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "packages": {name: _version(name) for name in PACKAGES},
            },
        )

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes a file whole or not at all."""
        partial = self.path / f".{name}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path / name)

    def open_metrics(self) -> IO[str]:
        """Opens `metrics.jsonl` for the lines of this run."""
        return self.metrics_path.open("w", encoding="utf-8", buffering=1)

    def close(self, reason: str, code: int, message: str) -> None:
        """Writes `exit.json` and gives the folder free."""
        self.write_json("exit.json", {"reason": reason, "code": code, "message": message})
        self._lock.close()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
