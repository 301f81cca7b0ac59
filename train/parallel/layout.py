"""Which engine a layout takes."""

from train.config import Config
from train.imports import uncollected
from train.parallel.engine import Engine
from train.parallel.launcher import check_launch
from train.quantize import library


def open_engine(config: Config) -> Engine:
    """Opens the engine of a run's layout.

    Raises:
        ConfigError: when the number of processes does not fit the layout.
        MachineError: when the processes cannot meet, or this machine lacks what quantizes.
    """
    check_launch(config)
    if config.lora.quantize == "nf4":
        library()
    if config.parallel.zero == 0:
        from train.parallel.replicated import ReplicatedEngine

        return ReplicatedEngine(config)
    with uncollected():
        from train.parallel.zero import ZeroEngine

    return ZeroEngine(config)
