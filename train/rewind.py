"""Going back from a spike of the loss: to the last checkpoint, and on without the batches that led to it.

The run ends and is started again, as after any other death, so that it goes on by the way that all resumes take; a
small file beside the checkpoints says from which of them, and how many steps' batches it then leaves out.
"""

import json
from pathlib import Path
from typing import Any

from train.checkpoint.checkpoints import REWIND, Checkpoints
from train.checkpoint.manifest import read_text
from train.config import Config
from train.errors import CheckpointError, NumericsError, RewoundError, UserError
from train.parallel.engine import Engine

KEYS = ("step", "left_out", "times")


class Rewind:
    """Knows which batches a run leaves out, and sends it back.

    Args:
        engine: of the run.
        config: of the run.
        checkpoints: of the run, which say where it goes on.

    Attributes:
        left_out: steps whose batches the run has left out so far: step n takes batch n + left_out.

    Raises:
        CheckpointError: when the file cannot be read.
    """

    def __init__(self, engine: Engine, config: Config, checkpoints: Checkpoints) -> None:
        self._engine, self._checkpoints = engine, checkpoints
        self._is_wanted = config.train.on_spike == "rewind" and checkpoints.newest_is_next
        self._most = config.train.max_skipped_steps
        self._path = Path(str(config.run.dir)) / "checkpoints" / REWIND
        order = engine.on_main(self._read)
        self._order = order if order is not None and order["step"] == checkpoints.step else None
        self.left_out = 0
        if self._order is not None:
            self._leave_out(self._order["left_out"])

    def _leave_out(self, steps: int) -> None:
        self.left_out = steps
        if steps and self._engine.is_main:
            print(f"the batches of {steps} steps are left out: the next is batch {self._checkpoints.step + steps + 1}")

    def _read(self) -> dict[str, int] | None:
        """Reads where the run was sent back to; None where it was not."""
        if not self._path.exists():
            return None
        content = read_text(self._path)
        try:
            order: dict[str, int] = json.loads(content)
            if sorted(order) == sorted(KEYS) and all(type(one) is int and one >= 0 for one in order.values()):
                return order
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
        raise CheckpointError(
            f"{self._path} is damaged: expected {', '.join(KEYS)} as numbers; delete it, and the run goes on with the "
            "batches of the spike"
        )

    def state(self) -> dict[str, Any]:
        """Describes what a checkpoint keeps of it."""
        return {"left_out": self.left_out}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` described, unless the run was sent back to that step since."""
        if self._order is None:
            self._leave_out(state["left_out"])

    def go_back(self, step: int, why: str) -> UserError | None:
        """Sends the run back from a step that was skipped as a spike, if it is to be; every process must call it.

        Without a checkpoint to go back to, the step stays skipped.

        Args:
            step: of the spike.
            why: it is one.

        Returns:
            What every process is to end with: to be started again, or because it was sent back there too often.
        """
        if not self._is_wanted or self._most == 0:
            return None
        self._checkpoints.finish()
        target = self._checkpoints.newest()
        if target is None:
            return None
        times = 1 + (self._order["times"] if self._order and self._order["step"] == target else 0)
        if times > self._most:
            return NumericsError(
                f"step {step}: {why}; the run went back to step {target} as often as "
                f"train.max_skipped_steps={self._most} allows, each time to other batches: look at the data, allow "
                "more, or take such steps (train.on_spike=log)"
            )
        left_out = self.left_out + step - target
        order = dict(zip(KEYS, (target, left_out, times), strict=True))
        self._engine.on_main(lambda: self._checkpoints.note(REWIND, json.dumps(order)))
        return RewoundError(
            f"step {step}: {why}; started again, the run goes on after step {target} with batch "
            f"{target + left_out + 1}: those of {left_out} steps are left out"
        )
