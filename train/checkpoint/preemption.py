"""Being told to stop: all processes agree after which step."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from train.errors import StopSignal, UserError
from train.parallel.engine import Engine

GRACE_SECONDS = 30.0  # a launcher's, before it kills; one that is told twice tells its processes twice


class Preemption:
    """Takes SIGTERM as a request to save and stop after this step; once the launcher's grace is over, as before.

    Args:
        engine: whose processes are to agree.
        enabled: whether a request can be met; else signals do what they did.

    Attributes:
        asked: whether this process was told.
    """

    def __init__(self, engine: Engine, *, enabled: bool) -> None:
        self._engine, self._enabled = engine, enabled
        self._asked_at: float | None = None
        self._before: Any = None

    @property
    def asked(self) -> bool:
        """Whether this process was told to stop."""
        return self._asked_at is not None

    def agreed(self) -> bool:
        """Whether any process was told to stop; every process must ask after every step."""
        if not self._enabled:
            return False
        asked = torch.tensor(float(self.asked), device=self._engine.device)
        return bool(self._engine.max(asked) > 0)

    def __enter__(self) -> Self:
        if self._enabled:
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Hands SIGTERM back, unless the run ends by it: an echo must not disturb what is still to be written.

        Raises:
            StopSignal: in place of what another process's death led to here.
        """
        if not self.asked and self._enabled:
            signal.signal(signal.SIGTERM, self._before)
        if self.asked and isinstance(error, Exception) and not isinstance(error, UserError):
            raise StopSignal(
                "stopped by SIGTERM, and not saved: another process was gone; a launcher stops all when one has died, "
                f"its own lines say which and why ({type(error).__name__})",
                signal.SIGTERM,
            ) from error

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at > GRACE_SECONDS:
            self._before(number, frame)
