"""Which evaluation was the best so far, and whether to go on."""

from dataclasses import dataclass
from typing import Any

LOWER = ("loss", "mse")  # the figures of which less is better


@dataclass
class Best:
    """The best of a run's evaluations, that before its first step aside.

    Attributes:
        metric: the figure that is compared, without its `eval_`.
        patience: evaluations in a row without a better one, after which a run stops; None never stops it.
        step: of the best evaluation; None before there is one.
        value: of the figure then.
        waited: evaluations since.
    """

    metric: str
    patience: int | None = None
    step: int | None = None
    value: float = 0.0
    waited: int = 0

    def hear(self, step: int, figures: dict[str, Any]) -> bool:
        """Takes in an evaluation; says whether it is the best so far."""
        value: float = figures[f"eval_{self.metric}"]
        better = self.step is None or (value < self.value if self.metric in LOWER else value > self.value)
        if better:
            self.step, self.value, self.waited = step, value, 0
        else:
            self.waited += 1
        return better

    @property
    def is_over(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """Describes what was heard."""
        return {"metric": self.metric, "step": self.step, "value": self.value, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` described, unless it was about another figure."""
        if state["metric"] == self.metric:
            self.step, self.value, self.waited = state["step"], state["value"], state["waited"]

    def closing(self, step: int, max_steps: int) -> str:
        """Says how many steps a run took, and why when they are fewer."""
        return f"{step} steps" + (f", of {max_steps}: {self}" if self.is_over else "")

    def __str__(self) -> str:
        return f"the best held-out {self.metric.replace('_', ' ')} is {self.value:.4f}, of step {self.step}"
