"""The start of a training run: whether its layout can fit the memory there is, and where its weights are."""

import socket

import torch

from train.config import PROBLEMS, Config
from train.model import find_weights
from train.parallel.engine import Engine
from train.parallel.host_memory import host_bytes
from train.plan.refusal import refuse_too_large


def check_and_find(engine: Engine, config: Config) -> None:
    """Refuses a layout that cannot fit the memory there is, then fetches the weights to start from.

    Raises:
        ConfigError, MachineError, CheckpointError: on every process.
    """
    on_gpu = engine.device.type == "cuda"
    if on_gpu:
        mine = float(torch.cuda.get_device_properties(engine.device).total_memory)
    else:
        mine = host_bytes() / engine.gather(socket.gethostname()).count(socket.gethostname())
    least = min(engine.gather(mine))
    refuse_too_large(config, engine.world_size, least, on_gpu=on_gpu)
    engine.first_on_each_host(lambda: find_weights(config.model, classifier=config.data.format in PROBLEMS))
