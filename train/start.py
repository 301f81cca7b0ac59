"""The start of a training run: whether its layout can fit the memory there is, its weights, and where it goes on."""

import socket

import torch

from train.checkpoint.checkpoints import Checkpoints
from train.config import PROBLEMS, Config
from train.data.loader import Data
from train.drift import Drift
from train.lora import find_adapter, with_adapters
from train.model import find_weights, starting_weights
from train.parallel.engine import Engine, Model
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


def begin(engine: Engine, model: Model, checkpoints: Checkpoints, config: Config, data: Data) -> Drift | None:
    """Fills a model with the weights that the run starts from, then with those that it goes on with.

    Args:
        engine: of the run.
        model: on the meta device.
        checkpoints: of the run.
        config: of the run.
        data: of the run.

    Returns:
        What compares the routing with that of the weights that the run starts from, if that is to be.

    Raises:
        MachineError, CheckpointError, DataError: when the weights, or the checkpoint, cannot be used.
    """
    engine.first_on_each_host(lambda: find_adapter(config.lora, model.config))
    engine.prepare(model, with_adapters(starting_weights(config, model.config), config, model.config))
    drift = Drift.of(engine, config, data)  # before the weights are a checkpoint's
    checkpoints.restore(data)
    return drift
