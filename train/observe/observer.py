"""The figures of a run: counted on every process, written and shown by the main one."""

import contextlib
import json
import resource
from typing import Any, Self

import torch

from mixtral import MixtralConfig
from train.config import Config
from train.errors import MachineError
from train.folder import RunFolder
from train.observe.alarms import CollapseAlarm, DriftAlarm, against_drift
from train.observe.hardware import peak_flops
from train.observe.plots import draw
from train.observe.progress import Progress
from train.observe.trackers import Tracker
from train.parallel.engine import Engine


class Observer:
    """Writes metrics.jsonl, shows progress and feeds the tracker.

    Args:
        folder: the run folder; None on the processes that write nothing.
        tracker: where figures also go.
        max_steps: for the progress bar.
        model: for the floating-point operations of a token.
        config: of the run.
    """

    def __init__(
        self, folder: RunFolder | None, tracker: Tracker | None, max_steps: int, model: MixtralConfig, config: Config
    ) -> None:
        self._tracker = tracker
        self._flops_per_token = model.training_flops_per_token(config.data.sequence_length)
        self._in_bf16 = config.train.precision == "bf16"
        self._pictures = folder if config.run.plots else None
        self._undrawn = False
        self._metrics = folder.open_metrics() if folder else None
        self._progress = Progress(max_steps) if folder else None
        self._alarm = CollapseAlarm(model.num_experts_per_tok)
        self._drift_alarm = DriftAlarm(config.evaluate.router_agreement_alarm, against_drift(config))
        self._steps = self._tokens = self._new_tokens = 0
        self._seconds = self._waited = 0.0
        self.last: dict[str, Any] = {}
        self.evaluations: list[float] = []
        self.evaluated = 0
        self.postponed: tuple[int, dict[str, Any]] | None = None

    def count(self, tokens: int, *, seconds: float, waited: float) -> None:
        """Counts a step: its tokens over all processes, its time, and the part of it spent waiting for data."""
        self._steps += 1
        self._tokens += tokens
        self._new_tokens += tokens
        self._seconds += seconds
        self._waited += waited
        if self._progress:
            self._progress.advance(seconds)

    def speed(self, engine: Engine) -> dict[str, Any]:
        """Gives the figures of speed and memory since the last call; every process must call it."""
        if engine.device.type == "cuda":
            peak_bytes = torch.cuda.max_memory_allocated(engine.device)
        else:
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        worst = engine.max(
            torch.tensor([peak_bytes, self._waited / self._seconds], dtype=torch.float64, device=engine.device)
        )
        rate = self._new_tokens / self._seconds
        figures: dict[str, Any] = {
            "tokens": self._tokens,
            "tokens_per_second": rate,
            "data_wait_fraction": worst[1].item(),
            "peak_memory_bytes": int(worst[0]),
        }
        peak = peak_flops(engine.device)
        if peak is not None and self._in_bf16:
            figures["mfu"] = rate * self._flops_per_token / (engine.world_size * peak)
        self._new_tokens, self._seconds, self._waited = 0, 0.0, 0.0
        return figures

    def log(self, step: int, figures: dict[str, Any]) -> None:
        """Writes one line of figures, shows it and hands it to the tracker."""
        self.postponed = None
        row = {"step": step, "tokens": self._tokens} | figures
        self.last |= row
        if "eval_loss" in row:
            self.evaluations.append(row["eval_loss"])
            self.evaluated = step
        if self._metrics and self._progress:
            self._write(json.dumps(row, allow_nan=False) + "\n")
            self._progress.show(row)
            lines = self._alarm.hear(step, row["expert_load"]) if "expert_load" in row else []
            lines += self._drift_alarm.hear(step, row["router_agreement"]) if "router_agreement" in row else []
            for line in lines:
                self._progress.say(line)
            if "eval_loss" in row and step > 0 and self._pictures:
                self._draw(self._pictures)
        if self._tracker:
            self._tracker.log(row)

    def _write(self, line: str) -> None:
        """Writes a line of metrics.jsonl.

        Raises:
            MachineError: when the disk does not take it.
        """
        assert self._metrics is not None
        try:
            self._metrics.write(line)
        except OSError as error:
            raise MachineError(f"{self._metrics.name} cannot be written: {error.strerror}; make room") from None

    def say(self, line: str) -> None:
        """Prints a line, on the main process."""
        if self._progress:
            self._progress.say(line)

    def postpone(self, step: int, figures: dict[str, Any]) -> None:
        """Keeps the figures of a step whose evaluation is left to the run that goes on."""
        self.postponed = (step, figures)

    def log_postponed(self, evaluation: dict[str, Any]) -> None:
        """Writes the line of that step, now that it is evaluated."""
        assert self.postponed is not None
        step, figures = self.postponed
        self.log(step, figures | evaluation)

    def state(self) -> dict[str, Any]:
        """Describes what the figures to come depend on."""
        counted = {"steps": self._steps, "tokens": self._tokens, "evaluated": self.evaluated}
        return counted | {"last": self.last, "evaluations": self.evaluations, "postponed": self.postponed}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` described."""
        self._steps, self._tokens = state["steps"], state["tokens"]
        self.evaluated = state.get("evaluated", 0)
        self.last, self.evaluations = state["last"], state["evaluations"]
        self.postponed = tuple(state["postponed"]) if state["postponed"] else None
        if self._progress:
            self._progress.begin_at(self._steps)

    def end_of_training(self) -> None:
        """Leaves the terminal to what is printed next."""
        if self._progress:
            self._progress.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes files, bar and tracker; after an error the tracker is not waited for long."""
        self.end_of_training()
        if self._metrics:
            with contextlib.suppress(OSError):  # of a line that the disk did not take
                self._metrics.close()
        if self._pictures and kind is not None and "loss" in self.last:
            self._draw(self._pictures)
        if self._tracker:
            self._tracker.finish(failed=kind is not None)

    def _draw(self, folder: RunFolder) -> None:
        """Draws the pictures; were that to fail, it must not end a run or hide why it ended, and is said once."""
        try:
            draw(folder)
        except Exception as error:
            if not self._undrawn:
                self.say(f"WARNING: the pictures were not drawn ({type(error).__name__}: {error})")
            self._undrawn = True
