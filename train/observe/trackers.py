"""Trackers: where figures go besides metrics.jsonl. None of them can change, stop or delay training for long."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from train.config import TrackerConfig
from train.errors import ConfigError
from train.folder import RunFolder

IMPATIENT_SECONDS = 4.0  # what an unreachable service, or any after an error, may add to a run
FLUSH_SECONDS = 30.0  # what one that was reached may take to receive the rest


class Tracker(Protocol):
    """Receives rows of figures."""

    def log(self, row: dict[str, Any]) -> None: ...

    def finish(self, *, failed: bool) -> None: ...


def open_tracker(config: TrackerConfig, folder: RunFolder) -> Tracker | None:
    """Opens the tracker that `tracker.name` names.

    Raises:
        ConfigError: when its package is not installed.
    """
    if config.name == "tensorboard":
        return TensorBoard(folder)
    if config.name == "wandb":
        return WandB(config, folder)
    return None


def last_step(metrics: Path) -> int | None:
    """Reads the last step that is logged; None for a new run."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else None


class TensorBoard:
    """Event files in the run folder's `tensorboard/`."""

    def __init__(self, folder: RunFolder) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("tracker.name=tensorboard: not installed; pip install 'cierzo[tensorboard]'") from None
        self._folder = folder
        last = last_step(folder.metrics_path)
        purge = None if last is None else last + 1  # what an attempt that died has written past it
        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=purge)

    def log(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def finish(self, *, failed: bool) -> None:
        from matplotlib.image import imread

        for picture in sorted((self._folder.path / "plots").glob("*.png")):
            self._writer.add_image(picture.stem, imread(picture)[..., :3], dataformats="HWC")
        self._writer.close()


class WandB:
    """Weights & Biases, in a process of its own that follows metrics.jsonl.

    Nothing it does, be it slow, stuck or dead, reaches the training process: it is told to finish, waited
    for, and ended if it does not. Its key comes from the environment or its own login, never from here.
    """

    def __init__(self, config: TrackerConfig, folder: RunFolder) -> None:
        self._folder, self._offline = folder, config.mode == "offline"
        (folder.path / "wandb").mkdir(exist_ok=True)
        self._reached = folder.path / "wandb" / ".reached"
        self._reached.unlink(missing_ok=True)
        self._log_path = folder.path / "wandb" / "follower.log"
        script = Path(__file__).with_name("wandb_follower.py")
        with self._log_path.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(script), str(folder.path), config.project, config.mode, *self._place()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # a Ctrl-C at the terminal is the run's to handle
            )

    def _place(self) -> list[str]:
        """Says under which id the run goes on at W&B, and after how many bytes of metrics.jsonl."""
        metrics = self._folder.metrics_path
        return [self._folder.tracker_id, str(metrics.stat().st_size if metrics.exists() else 0)]

    def log(self, row: dict[str, Any]) -> None:
        """Does nothing: the follower reads metrics.jsonl."""

    def finish(self, *, failed: bool) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        patient = not failed and (self._offline or self._reached.exists())
        answered = True
        try:
            self._process.wait(FLUSH_SECONDS if patient else IMPATIENT_SECONDS)
        except subprocess.TimeoutExpired:
            answered = False
            os.killpg(self._process.pid, signal.SIGKILL)  # and the service that W&B started
            self._process.wait()
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            said = pipe.read().strip() if answered else ""
        where = f"its log: {self._log_path}, the figures: {self._folder.metrics_path}"
        print(said or f"W&B {self._complaint()}; {where}")

    def _complaint(self) -> str:
        """What the follower last said, if it ended by itself."""
        said = self._log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if self._process.returncode < 0 or not said:
            return "did not answer in time"
        return f"was not used ({said[-1]})"
