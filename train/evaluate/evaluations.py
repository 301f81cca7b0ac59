"""The evaluations of a run: when they take place, which was the best, and when to stop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from train.config import Config
from train.data.loader import Data
from train.drift import Drift
from train.evaluate.best import Best
from train.evaluate.held_out import evaluate
from train.evaluate.prompts import Prompts
from train.parallel.engine import Engine


@dataclass
class Evaluations:
    """Evaluates the model in training.

    Attributes:
        engine: holds the model.
        config: of the run.
        data: whose held-out rows are evaluated.
        prompts: that are answered.
        keep: called by every process after an evaluation that is the best so far.
        drift: compares the routing with that of the model that the run started from.
        best: of those heard; the main process knows it alone.
    """

    engine: Engine
    config: Config
    data: Data
    prompts: Prompts | None = None
    keep: Callable[[], None] | None = None
    drift: Drift | None = None
    best: Best = field(init=False)

    def __post_init__(self) -> None:
        self.best = Best(self.config.evaluate.metric, self.config.evaluate.patience)

    def are_due(self, step: int, *, last: bool) -> bool:
        """Whether the model is to be evaluated after a step."""
        every = self.config.evaluate.every
        return last or (every is not None and step % every == 0)

    def parts(self) -> dict[str, Any]:
        """Gives what of it is in a checkpoint, by name."""
        return {"best": self.best} | ({"drift": self.drift} if self.drift else {})

    def figures(self) -> dict[str, Any]:
        """Evaluates; every process takes part."""
        figures = evaluate(self.engine, self.config, self.data, self.prompts)
        return figures | (self.drift.figures() if self.drift else {})

    def hear(self, step: int, figures: dict[str, Any]) -> bool:
        """Has the model of a step kept if its figures are the best so far; says whether patience is at its end."""
        is_better, is_over = self.engine.on_main(lambda: (self.best.hear(step, figures), self.best.is_over))
        if is_better and self.keep is not None:
            self.keep()
        return is_over

    def are_over(self) -> bool:
        """Says on every process whether patience is at its end."""
        return self.engine.on_main(lambda: self.best.is_over)
