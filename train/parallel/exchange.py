"""Rows that travel between ranks: a differentiable all-to-all with unequal splits, beside which a rank may compute."""

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
        beside: whether the rank computes beside it, until the rows are asked for; or waits when they depart.
    """

    sends: list[int]
    receives: list[int]
    group: dist.ProcessGroup | None
    beside: bool

    def back(self) -> "Route":
        """Gives the way on which what arrived returns."""
        return self._replace(sends=self.receives, receives=self.sends)


class Journey:
    """Rows on their way to other ranks; in backward their gradient travels back in the same manner.

    The gradient departs when backward comes to `arrived`, and is awaited where the rows departed. So beside it backward
    computes what forward computed beside the rows. No rank may have nothing to do with it: one without rows takes
    part, all begin their journeys in the same order, and a gradient is wanted on all of them or on none.

    Args:
        rows_RH: the rows, those for the first rank first.
        route: their way.
    """

    def __init__(self, rows_RH: Tensor, route: Route) -> None:
        self._transfer = _Transfer(route)
        self._rows_RH: Tensor = _Depart.apply(rows_RH, self._transfer)

    def arrived(self) -> Tensor:
        """Waits for the rows of all ranks, those of the first one first; to be called once."""
        rows_RH: Tensor = _Arrive.apply(self._rows_RH, self._transfer)
        return rows_RH


class _Transfer:
    """What is under way, forward and later backward.

    Nodes of the graph hold it; so of tensors it holds only detached ones, or what it holds would hold it in turn.
    """

    def __init__(self, route: Route) -> None:
        self.route = route

    def begin(self, rows_RH: Tensor, route: Route) -> Tensor:
        self._arriving_RH = rows_RH.new_empty((sum(route.receives), *rows_RH.shape[1:]))
        self._work = dist.all_to_all_single(
            self._arriving_RH,
            rows_RH.contiguous(),
            route.receives,
            route.sends,
            group=route.group,
            async_op=route.beside,
        )
        return self._arriving_RH.detach()

    def end(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        arrived_RH = self._arriving_RH
        del self._work, self._arriving_RH
        return arrived_RH


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.begin(rows_RH, transfer.route)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, under_way_RH: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.end(), None


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
