"""A step's mathematics in fp64, around the engine: the same layers and losses, with reductions of its own.

DeepSpeed reduces in fp32 at best. Here the gradient of every process is summed in fp64 as its layout says: dense
parameters over all, experts over those who hold them; so an error of 1e-10 is one of the mathematics.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral import MixtralForCausalLM
from mixtral.weights.names import is_stacked, trained_parameters
from train.data.packing import Batch
from train.objective import Coefficients, Parts, StepSize, objective_parts, predict
from train.parallel.engine import Engine, Piece, Weights, fill


class Proof:
    """One process's part of a step in fp64.

    Args:
        engine: whose layout it takes.
        model: on the meta device.
        weights: as the engine was given.

    Attributes:
        loss: the token-mean cross-entropy, of `step`.
    """

    def __init__(self, engine: Engine, model: MixtralForCausalLM, weights: Weights) -> None:
        self._engine = engine
        self._expert_group: Any = None  # the ranks that share a layer's experts out
        self._same_experts: Any = None  # those that hold the same ones
        if engine.expert_ranks > 1:
            from train.parallel.expert import expert_groups, split_experts

            split_experts(model, model.config, engine.parallel, engine.rank)
            self._expert_group, self._same_experts = expert_groups(engine.expert_ranks)
        for _ in fill(model, weights(engine.experts(model.config.num_local_experts)), torch.float64):
            pass
        self._model = model.to(engine.device).train()

    def step(self, micro_batches: list[Batch], size: StepSize, coefficients: Coefficients, load_LE: Tensor) -> Parts:
        """Adds up the gradient of a step over all processes; returns the step's values."""
        done = []
        for batch in micro_batches:
            batch = batch.to(self._engine.device)
            output = predict(self._model, batch, size.trained_tokens, routing=True)
            parts = objective_parts(output, batch, size, self._engine.sum, coefficients, load_LE)
            parts.loss(coefficients).backward()
            done.append(parts.detached())
        if self._engine.world_size > 1:
            for name, parameter in trained_parameters(self._model).items():
                assert parameter.grad is not None, name
                split = is_stacked(name) and self._engine.expert_ranks > 1
                dist.all_reduce(parameter.grad, group=self._same_experts if split else None)
        return Parts.total(done, self._engine.sum)

    def norm(self) -> float:
        """Gives the norm of the whole gradient: what is split is added up once, over the ranks of a group."""
        squares = {True: 0.0, False: 0.0}
        for name, parameter in trained_parameters(self._model).items():
            assert parameter.grad is not None, name
            squares[is_stacked(name)] += parameter.grad.square().sum().item()
        experts = torch.tensor(squares[True], dtype=torch.float64, device=self._engine.device)
        if self._engine.expert_ranks > 1:
            dist.all_reduce(experts, group=self._expert_group)
        return math.sqrt(squares[False] + experts.item())

    def gradients(self) -> Iterator[Piece]:
        """Yields the whole gradient to the main process; every process must go through it."""
        trained = trained_parameters(self._model)
        return self._engine.whole((name, tensor.grad) for name, tensor in trained.items() if tensor.grad is not None)
