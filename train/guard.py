"""Which steps are taken: what is not finite on one process has all of them skip the step.

Every process decides from the same figures, so all decide alike, before the optimizer is asked.
"""

import statistics
from collections import deque
from typing import Any, NamedTuple

from train.config import TrainConfig
from train.parallel.replicas import Replicas

WINDOW, LEAST = 100, 20  # steps that a loss is compared with
NORMAL = 1.4826  # standard deviations of a normal distribution in its median deviation
FLOOR = 0.01  # of the median, for a deviation: or the noise of losses that hardly change would be spikes


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
        config: says how many may be, and what a spike is.
        replicas: what processes hold alike, compared before an update.

    Attributes:
        most: in a row, of the configuration.
        skipped: how many were.
        in_a_row: how many were since the last that was taken.
        alarm: what is to be said of the step judged last, if it is a spike.
        score: how many deviations its loss was above the median then.
    """

    def __init__(self, config: TrainConfig, replicas: Replicas | None = None) -> None:
        self._replicas = replicas
        self.most, self._highest = config.max_skipped_steps, config.spike_zscore
        self._skips_spikes = config.on_spike in ("skip", "rewind")
        self.skipped = self.in_a_row = 0
        self.alarm, self.score = "", 0.0
        self._losses: deque[float] = deque(maxlen=WINDOW)

    @property
    def is_over(self) -> bool:
        """Whether so many steps were skipped in a row that the run is to end."""
        return self.in_a_row >= max(1, self.most)

    def judge(self, loss: float, faults: list[list[float]]) -> Skip | None:
        """Says why a step is not to be taken, if it is not.

        Args:
            loss: of all processes.
            faults: of each process, whether there is anything not finite in its loss, in the gradient that it
                computed, and in the one that it would step with. One leads to the next, on other processes too.

        Raises:
            NumericsError: see `Replicas.compare`.
        """
        if self._replicas:
            self._replicas.begin_update()
        self.alarm = ""
        for number, what in enumerate(("the loss is", "the gradient is", "the gradient of all processes is")):
            ranks = tuple(rank for rank, found in enumerate(faults) if found[number])
            if ranks:
                return Skip(f"{what} not finite", ranks)
        self.alarm = self._spike(loss)
        return Skip(self.alarm, tuple(range(len(faults)))) if self.alarm and self._skips_spikes else None

    def _spike(self, loss: float) -> str:
        """Says how far a loss is above those of the steps that were taken last, if that is too far."""
        if self._highest is None or len(self._losses) < LEAST:
            return ""
        self.score = zscore(loss, list(self._losses))
        above = f"{self.score:.1f} deviations above the median of the last {len(self._losses)}"
        return f"the loss {loss:.4g} is {above}" if self.score > self._highest else ""

    def figures(self) -> dict[str, float]:
        """Gives what a row of metrics.jsonl says of the step judged last, and of those that were skipped."""
        return {"skipped_steps": self.skipped} | ({"spike_zscore": self.score} if self.alarm else {})

    def count(self, loss: float, skip: Skip | None) -> None:
        """Counts a step that was taken, or was not; the loss of one that was is compared with from now on."""
        if skip is None:
            self._losses.append(loss)
        self.skipped += skip is not None
        self.in_a_row = 0 if skip is None else self.in_a_row + 1

    def state(self) -> dict[str, Any]:
        """Describes what the next steps are judged by."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "losses": list(self._losses)}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` described."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self._losses = deque(state["losses"], maxlen=WINDOW)


def zscore(loss: float, losses: list[float]) -> float:
    """Says how many deviations a loss is above the median of others: by their median one, which no outlier moves."""
    median = statistics.median(losses)
    deviation = NORMAL * statistics.median(abs(one - median) for one in losses)
    return (loss - median) / max(deviation, FLOOR * abs(median), 1e-12)
