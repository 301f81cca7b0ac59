"""Which steps are taken: what is not finite on one process has all of them skip the step.

Every process decides from the same figures, so all decide alike, before the optimizer is asked.
"""

from typing import Any, NamedTuple

from train.config import TrainConfig


class Skip(NamedTuple):
    """Why a step is not taken.

    Attributes:
        reason: in words.
        ranks: the processes where it began, as far as that can be told.
    """

    reason: str
    ranks: tuple[int, ...]


class Guard:
    """Judges steps, and counts those that are skipped.

    Args:
        config: says how many may be.

    Attributes:
        most: in a row, of the configuration.
        skipped: how many were.
        in_a_row: how many were since the last that was taken.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.most = config.max_skipped_steps
        self.skipped = self.in_a_row = 0

    @property
    def is_over(self) -> bool:
        """Whether so many steps were skipped in a row that the run is to end."""
        return self.in_a_row >= max(1, self.most)

    def judge(self, faults: list[list[float]]) -> Skip | None:
        """Says why a step is not to be taken, if it is not.

        Args:
            faults: of each process, whether there is anything not finite in its loss, in the gradient that it
                computed, and in the one that it would step with. One leads to the next, on other processes too.
        """
        for number, what in enumerate(("the loss is", "the gradient is", "the gradient of all processes is")):
            ranks = tuple(rank for rank, found in enumerate(faults) if found[number])
            if ranks:
                return Skip(f"{what} not finite", ranks)
        return None

    def count(self, skip: Skip | None) -> None:
        """Counts a step that was taken, or was not."""
        self.skipped += skip is not None
        self.in_a_row = 0 if skip is None else self.in_a_row + 1

    def state(self) -> dict[str, Any]:
        """Describes what is counted."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` described."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
