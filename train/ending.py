"""How a verb ends: its exit code, what is printed of an error, and what `exit.json` says."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

from train.errors import StopSignal, UserError, report

if TYPE_CHECKING:
    from train.folder import RunFolder


class Ending:
    """The block in which a verb does its work; errors that are the user's to mend end it, all others leave it.

    Attributes:
        folder: of the run, once there is one; it is closed at the end.
        message: what there is to say of work that was done.
        met: whether the processes have met, see `report`.
        code: the exit code, once the block has ended.
    """

    def __init__(self) -> None:
        self.folder: RunFolder | None = None
        self.message, self.met, self.code = "", False, 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Reports the error, if it is one of the user's, and closes the folder; says whether it was."""
        reason, message = ("done", self.message) if error is None else ("crash", f"{type(error).__name__}: {error}")
        self.code = 0 if error is None else 1
        try:
            if isinstance(error, UserError | StopSignal):
                reason, self.code, message = error.reason, error.code, str(error)
                report(error, met=self.met)
                return True
            return False
        finally:
            if self.folder is not None:
                self.folder.close(reason, self.code, message)
