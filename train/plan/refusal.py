"""What a start refuses: a layout that cannot fit the memory that each process has."""

from train.config import Config
from train.errors import ConfigError
from train.plan.layout import Layout
from train.plan.load import Skew
from train.plan.memory import Memory, memory_of

GB = 1e9
WORST = 0.12
"""So much less is not refused. The arithmetic was at most 2 % too high on processors (bench/README.md); on a GPU it was
not measured."""
KNOWN = ("reduction", "step")
"""Moments whose memory does not hang on what layers keep."""


def refuse_too_large(config: Config, processes: int, available: float, *, on_gpu: bool) -> None:
    """Refuses a run that would end for want of memory, with its load even and the arithmetic at its worst.

    Args:
        config: of the run.
        processes: in all.
        available: bytes of the device of each process, or its share of its host's memory.
        on_gpu: whether that is a GPU.

    Raises:
        ConfigError: with the figures, and what to do.
    """
    if not config.plan.check:
        return
    layout = Layout(config, processes, on_gpu)
    memory = memory_of(layout, Skew())
    moments = dict(memory.moments)
    del moments["start"]  # which takes more only where there is room
    if layout.left_out:
        moments = {name: moments[name] | {"overhead": 0.0} for name in KNOWN}  # which is a share of what layers keep
    memory = Memory(moments, memory.host)
    least = (1 - WORST) * memory.peak
    if least > available:
        parts = ", ".join(f"{size / GB:.1f} {kind}" for kind, size in memory.parts.items() if size > 0.05 * memory.peak)
        where = "its GPU has" if on_gpu else "its share of the host's memory is"
        device = "NAME (as conf/hardware.yaml has it)" if on_gpu else "cpu plan.calibrate=true"
        raise ConfigError(
            f"the layout cannot fit: a process needs about {memory.peak / GB:.1f} GB ({parts}), and {where} "
            f"{available / GB:.1f} GB. `cierzo plan` with the same words but without run.dir, plan.gpus={processes} "
            f"plan.gpu={device} and plan.search=true names layouts that fit; plan.check=false starts it all the same"
        )
