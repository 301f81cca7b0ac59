"""How libraries are imported: without looking for garbage in them."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Lets modules be imported without collecting garbage meanwhile, and leaves what they made to no collection after.

    That is half a million objects, which stay to the end: to look through them again and again is a fifth of a start,
    and would be a quarter of a second of each full collection later, of which a run asks for several.
    """
    known, collects = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        if len(sys.modules) > known:
            gc.freeze()
