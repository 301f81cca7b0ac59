"""The run folder: its lock, and the files that say what ran and how it ended."""

import contextlib
import fcntl
import json
import os
import platform
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml

from train.compose import Composed, to_yaml
from train.config import Config
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


def folder_name(composed: Composed) -> str:
    """Gives `run.dir`, or a name made of recipe and time."""
    return composed.config.run.dir or f"runs/{composed.recipe or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"


def refuse_used(path: Path, config: Config | None) -> bool:
    """Refuses a folder that a run trained in, unless it is to go on, or that holds files that are no run's.

    Args:
        path: of the folder.
        config: of a run that may go on there; None where nothing trains.

    Returns:
        Whether there is a run to go on with.

    Raises:
        MachineError: with the fix.
    """
    if has_trained(path):
        problem = "" if config is None else _no_going_on(path, config)
        if config is None or problem:
            raise MachineError(
                f"run.dir={path} holds a run already{problem}: name another folder, or move this one away"
            )
        return True
    if path.is_dir() and not (path / ".lock").exists() and any(path.iterdir()):
        raise MachineError(f"run.dir={path} holds files that are no run's: name a new or an empty folder")
    return False


def has_trained(path: Path) -> bool:
    """Whether a run has logged a figure in a folder."""
    metrics = path / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


def has_saved(path: Path) -> bool:
    """Whether a checkpoint was ever written in a run's folder, be it whole, damaged or gone."""
    return (path / "checkpoints" / "latest").exists() or any(path.glob("checkpoints/step-*"))


def _no_going_on(path: Path, config: Config) -> str:
    """Says why the run in a folder cannot go on, or nothing."""
    if config.checkpoint.resume == "never":
        return ", and checkpoint.resume=never"
    if config.checkpoint.every is None and not has_saved(path):
        return " that saved nothing"
    try:
        ended = json.loads((path / "exit.json").read_text(encoding="utf-8"))["code"] == 0
        steps = json.loads((path / "summary.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    longer = config.train.max_steps is not None and config.train.max_steps > steps
    return f" that reached its last step, {steps}; a higher train.max_steps goes on" if ended and not longer else ""


def refuse_early(path: Path, config: Config | None) -> None:
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
    refuse_used(path, config)


class RunFolder:
    """A folder held by this process alone until it is closed.

    Args:
        path: of the folder; created where it is missing.
        config: of a run that may go on there; None where nothing trains.

    Attributes:
        goes_on: whether a run trained here, which this one is to go on with.

    Raises:
        MachineError: when it cannot be written, when a living run holds it, when a run that trained is in it and
            cannot go on, or files that are no run's. Nothing is changed in it then.
    """

    def __init__(self, path: Path, config: Config | None = None) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not (path / ".lock").exists():
                refuse_used(path, config)
            self._lock = (path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise MachineError(f"run.dir={path} cannot be written: {error.strerror}") from None
        self._take_lock()
        try:
            self.goes_on = refuse_used(path, config)
        except MachineError:
            self._lock.close()
            raise
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        (path / "exit.json").unlink(missing_ok=True)
        self._waiting: list[Callable[[], object]] = []
        self.once_accepted(self._remove_results)

    def once_accepted(self, write: Callable[[], object]) -> None:
        """Writes what replaces files of the run that was here, if any, once it is certain that this one goes on."""
        if self.goes_on:
            self._waiting.append(write)
        else:
            write()

    def accept(self) -> None:
        """Says that what was to be refused would have been: the run goes on."""
        for write in self._waiting:
            write()
        self._waiting.clear()

    def _remove_results(self) -> None:
        """Removes those of an attempt before its first step, of a run that goes on, or of a proof."""
        for name in ("summary.json", "certificate.json"):
            (self.path / name).unlink(missing_ok=True)

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

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the folder from other runs until the context ends, even where it is closed meanwhile."""
        lock = os.dup(self._lock.fileno())
        try:
            yield
        finally:
            os.close(lock)

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

    def read_config(self) -> dict[str, Any] | None:
        """Reads the `config.yaml` of the run that is here; None where a death cut it off."""
        try:
            found = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None
        return found if isinstance(found, dict) else None

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes a file whole or not at all."""
        _write_json(self.path / name, content)

    def open_metrics(self) -> IO[str]:
        """Opens `metrics.jsonl` for further lines."""
        return self.metrics_path.open("a", encoding="utf-8", buffering=1)

    def sync_metrics(self) -> None:
        """Forces `metrics.jsonl` to the disk."""
        with self.metrics_path.open("rb") as file:
            os.fsync(file.fileno())

    def rewind_metrics(self, step: int) -> int:
        """Moves the rows past a step from `metrics.jsonl` to `metrics.discarded.jsonl`; returns how many.

        A line that a death cut off is not kept.
        """
        kept: list[str] = []
        discarded: list[str] = []
        for line in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                (kept if json.loads(line)["step"] <= step else discarded).append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        if discarded:
            with (self.path / "metrics.discarded.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(discarded)
                os.fsync(file.fileno())
        partial = self.path / ".metrics.jsonl.partial"
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self.metrics_path)
        return len(discarded)

    def move_export(self, step: int) -> None:
        """Leaves room for another export: the one that is there gets the step up to which it was written before."""
        earlier = self.path / f"export-before-step-{step:08d}"
        if (self.path / "export").is_dir():
            shutil.rmtree(earlier, ignore_errors=True)  # of the same step, by an attempt that also died
            (self.path / "export").rename(earlier)

    @property
    def tracker_id(self) -> str:
        """Names this run to a tracker, the same after it went on."""
        path = self.path / ".tracker_id"
        if not path.exists():
            path.write_text(secrets.token_hex(4), encoding="utf-8")
        return path.read_text(encoding="utf-8")

    @tracker_id.setter
    def tracker_id(self, name: str) -> None:
        (self.path / ".tracker_id").write_text(name, encoding="utf-8")

    def close(self, reason: str, code: int, message: str) -> None:
        """Writes `exit.json`, if the disk takes it, and gives the folder free."""
        try:
            write_exit(self.path, reason, code, message)
        except OSError as error:
            print(f"{self.path / 'exit.json'} cannot be written: {error.strerror}", file=sys.stderr)
        self._lock.close()


def write_exit(folder: Path, reason: str, code: int, message: str) -> None:
    """Writes `exit.json`: the owner of a folder's lock does, or another of its processes where that one hangs."""
    _write_json(folder / "exit.json", {"reason": reason, "code": code, "message": message})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
