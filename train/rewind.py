"""Going back from a spike of the loss: to the last checkpoint, and on without the batches that led to it.

The run ends and is started again, as after any other death, so that it goes on by the way that all resumes take; a
small file beside the checkpoints says from which of them, and how many steps' batches it then leaves out.
"""

import json
from pathlib import Path
from typing import Any

from train.checkpoint.checkpoints import Checkpoints
from train.config import Config
from train.errors import CheckpointError, NumericsError, Rewound
from train.parallel.engine import Engine

NAME = "rewind.json"
KEYS = ("step", "left_out", "times")


class Rewind:
    """Knows which batches a run leaves out, and sends it back.

    Args:
        engine: of the run.
        config: of the run.
        checkpoints: of the run, which say where it goes on.

    Attributes:
        left_out: steps whose batches the run has left out so far: after step n it goes on with batch n + left_out.

    Raises:
        CheckpointError: when the file cannot be read.
    """

    def __init__(self, engine: Engine, config: Config, checkpoints: Checkpoints) -> None:
        self._engine, self._checkpoints = engine, checkpoints
        self._is_wanted = config.train.on_spike == "rewind"
        self._most = max(1, config.train.max_skipped_steps)
        self._path = Path(str(config.run.dir)) / "checkpoints" / NAME
        self._order = engine.on_main(self._read)
        self.left_out = 0
        self._is_sent_back = self._order is not None and self._order["step"] == checkpoints.step
        if self._order is not None and self._is_sent_back:
            self.left_out = self._order["left_out"]

    def _read(self) -> dict[str, int] | None:
        """Reads where the run was sent back to; None where it was not."""
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            order = {name: int(content[name]) for name in KEYS}
            if min(order.values()) < 0:
                raise ValueError("a number below 0")
            return order
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._path} is damaged ({error!r}): delete it, and the run goes on with the batches of the spike"
            ) from None

    def state(self) -> dict[str, Any]:
        """Describes what a checkpoint keeps of it."""
        return {"left_out": self.left_out}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` described, unless the run was sent back to that step since."""
        if not self._is_sent_back:
            self.left_out = state["left_out"]

    def go_back(self, step: int, why: str) -> Rewound | NumericsError | None:
        """Sends the run back from a step that was skipped as a spike, if it is to be; every process must call it.

        Without a checkpoint to go back to, the step stays skipped.

        Args:
            step: of the spike.
            why: it is one.

        Returns:
            What every process is to end with: to be started again, or because it was sent back there too often.
        """
        if not self._is_wanted:
            return None
        self._checkpoints.finish()
        target = self._checkpoints.newest()
        if target is None:
            return None
        order, times = self._order, 1
        if order is not None and order["step"] == target:
            times += order["times"]
        if times > self._most:
            return NumericsError(
                f"step {step}: {why}; the run went back to step {target} {self._most} times (train.max_skipped_steps), "
                "each time to other batches: lower optim.lr or look at the data"
            )
        order = dict(zip(KEYS, (target, self.left_out + step - target, times), strict=True))
        self._engine.on_main(lambda: self._checkpoints.note(NAME, json.dumps(order)))
        return Rewound(
            f"step {step}: {why}; started again, the run goes on after step {target} without the batches of the "
            f"{step - target} steps that led there"
        )
