"""A bf16 model's gradients on their way into its masters, while backward goes on to compute others."""

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from train.optim import MasterWeights


class Collected:
    """Adds each gradient to that of its master as soon as a pass has computed it, and lets go of it.

    In the last pass of a step each sum travels to the other processes at once, in one order on all: that of the
    parameters backwards, which is about the order in which backward comes to them.

    Args:
        masters: of the model.
        world_size: how many processes hold the same.
    """

    def __init__(self, masters: MasterWeights, world_size: int) -> None:
        self._masters, self._world_size = masters, world_size
        self._order = list(reversed(masters.pairs))
        self._active = self._summed = False
        self._arrived: set[nn.Parameter] = set()
        self._under_way: list[Any] = []
        arrive = partial(Collected._arrive, weakref.proxy(self))  # a hook that held the masters would never be freed
        for parameter, _ in masters.pairs:
            parameter.register_post_accumulate_grad_hook(arrive)

    @contextlib.contextmanager
    def during(self, *, last: bool) -> Iterator[None]:
        """Must be around a backward pass; behind the last one of a step the sums over all processes are there.

        A step's only pass in a single process leaves its gradients where they are.
        """
        self._summed = last and self._world_size > 1
        self._active = self._summed or not last or self._masters.has_collected
        try:
            yield
            left = self._order[len(self._under_way) :] if self._summed else ()  # behind what no loss depends on
            for _, master in left:
                self._send(master)
            for pending in self._under_way:
                if pending is not None:
                    pending.wait()
        finally:
            self._active = False
            self._arrived.clear()
            self._under_way.clear()

    def _arrive(self, parameter: nn.Parameter) -> None:
        if not self._active:
            return
        self._masters.collect(parameter)
        self._arrived.add(parameter)
        while self._summed and len(self._under_way) < len(self._order):
            first, master = self._order[len(self._under_way)]
            if first not in self._arrived:
                break
            self._send(master)

    def _send(self, master: Tensor) -> None:
        self._under_way.append(None if master.grad is None else dist.all_reduce(master.grad, async_op=True))
