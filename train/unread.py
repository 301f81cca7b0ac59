"""What happens when nobody reads what is printed any more."""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_once_unread() -> Iterator[None]:
    """Ends the process without a traceback when what reads its standard output has ended, as `head` does."""
    try:
        try:
            yield
        except SystemExit:  # of argparse, once it has printed help
            if sys.stdout is not None:
                sys.stdout.flush()
            raise
        if sys.stdout is not None:  # which is closed
            sys.stdout.flush()
    except BrokenPipeError:
        if sys.stdout is None or not _is_unread(sys.stdout.fileno()):
            raise  # of another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end
        raise SystemExit(128 + signal.SIGPIPE) from None


def _is_unread(descriptor: int) -> bool:
    """Says whether a pipe has no reader."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
