"""Weights that are not trained: not saved, since the run begins with them again, but told apart."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mixtral.weights.names import is_stacked
from train.parallel.engine import Engine


def frozen_digests(engine: Engine) -> dict[str, str]:
    """Hashes the weights that are not trained, each expert by itself; every process must call it.

    Returns:
        Hashes by name, the same in every layout; empty where all is trained.
    """
    trained = {whole.name for whole in engine.state.wholes.values()}
    found: dict[str, str] = {}
    if any(not parameter.requires_grad for parameter in engine.module.parameters()):
        mine = engine.experts(engine.module.config.num_local_experts)
        for name, values in engine.local("weights"):
            if name not in trained and engine.rank < engine.expert_ranks:
                found |= dict(_digests(name, values, mine))
    return {name: digest for part in engine.gather(found) for name, digest in part.items()}


def _digests(name: str, values: Tensor, experts: range) -> Iterator[tuple[str, str]]:
    if is_stacked(name):
        for expert, part in zip(experts, values, strict=True):
            yield f"{name}/{expert}", _digest(part)
    else:
        yield name, _digest(values)


def _digest(values: Tensor) -> str:
    data = values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(data.data)).hexdigest()
