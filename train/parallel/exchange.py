"""Rows that travel between ranks: a differentiable all-to-all with unequal splits, in the background."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Traffic(NamedTuple):
    """Routed rows, padding's among them: all of this rank's tokens, those an expert took, those sent to other ranks."""

    routed: Tensor | float = 0.0
    taken: Tensor | float = 0.0
    crossing: Tensor | float = 0.0

    @staticmethod
    def total(several: "Iterable[Traffic]") -> "Traffic":
        """Adds up the rows of layers and passes."""
        return Traffic(*(sum(map(float, kind)) for kind in zip(*several, strict=True)))


class Route(NamedTuple):
    """Where rows travel: consecutive blocks, one for each rank of a group, in the order of the ranks.

    Attributes:
        sends: rows for each rank.
        receives: rows from each rank.
        group: the ranks.
    """

    sends: list[int]
    receives: list[int]
    group: dist.ProcessGroup | None

    def back(self) -> "Route":
        """Gives the way on which what arrived returns."""
        return Route(self.receives, self.sends, self.group)


class Journey:
    """Rows on their way to other ranks, while this one may compute; their gradient travels back in the same manner.

    It departs when backward comes to where the rows arrived, and is awaited where they departed. So backward computes
    what forward computed between two points while the gradient travels between them. No rank may have nothing to do
    with it: one without rows takes part, and all begin their journeys in the same order.

    Args:
        rows_RH: the rows, those for the first rank first.
        route: their way.
    """

    def __init__(self, rows_RH: Tensor, route: Route) -> None:
        self._transfer = _Transfer()
        self._rows_RH: Tensor = _Depart.apply(rows_RH, route, self._transfer)

    def arrived(self) -> Tensor:
        """Waits for the rows of all ranks, those of the first one first."""
        rows_RH: Tensor = _Arrive.apply(self._rows_RH, self._transfer)
        return rows_RH


class _Transfer:
    """What is under way: forward, then backward. It must know no tensor with a history, which knows it."""

    route: Route

    def begin(self, rows_RH: Tensor, route: Route) -> Tensor:
        self.route = route
        self._arriving_RH = rows_RH.new_empty((sum(route.receives), *rows_RH.shape[1:]))
        self._work = dist.all_to_all_single(
            self._arriving_RH, rows_RH.contiguous(), route.receives, route.sends, group=route.group, async_op=True
        )
        return self._arriving_RH.detach()

    def end(self) -> Tensor:
        self._work.wait()
        arrived_RH = self._arriving_RH
        del self._work, self._arriving_RH
        return arrived_RH


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, route: Route, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.begin(rows_RH, route)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, under_way_RH: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transfer.end(), None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.end()
        return rows_RH.view_as(rows_RH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RH: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.begin(gradient_RH, ctx.transfer.route.back())
        return gradient_RH, None  # of a size that autograd expects; the transfer has what returns


def exchange_counts(counts_NE: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Tells each rank of a group how many rows of several parts come to each of its experts.

    Args:
        counts_NE: this rank's rows of N parts for every expert, those of the first rank first.
        group: the ranks.

    Returns:
        (N, ranks, E / ranks): rows from each rank for each expert of this one.
    """
    ranks = dist.get_world_size(group)
    leaving_PNE = counts_NE.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    arriving_PNE = torch.empty_like(leaving_PNE)
    dist.all_to_all_single(arriving_PNE, leaving_PNE, group=group)
    return arriving_PNE.transpose(0, 1)
