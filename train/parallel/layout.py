"""Which engine a layout takes, and whether the processes at hand can form it."""

import os

from train.config import Config
from train.errors import ConfigError
from train.parallel.engine import Engine


def open_engine(config: Config) -> Engine:
    """Opens the engine of a run's layout.

    Raises:
        ConfigError: when the number of processes does not fit the layout.
        MachineError: when the processes cannot meet.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes % config.parallel.expert != 0:
        fits = [n for n in range(1, processes + 1) if processes % n == config.model.num_local_experts % n == 0]
        raise ConfigError(
            f"parallel.expert={config.parallel.expert} does not divide the number of processes, {processes}: "
            f"use one of {', '.join(map(str, fits))}, or start a multiple of {config.parallel.expert} processes"
        )
    if config.parallel.zero == 0:
        from train.parallel.replicated import ReplicatedEngine

        return ReplicatedEngine(config)
    from train.parallel.zero import ZeroEngine

    return ZeroEngine(config)
