"""Rows that travel between ranks: a differentiable all-to-all with unequal splits."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Traffic(NamedTuple):
    """Routed rows, padding's among them: all of this rank's tokens, those an expert took, those sent to other ranks."""

    routed: Tensor | float = 0.0
    taken: Tensor | float = 0.0
    crossing: Tensor | float = 0.0

    @staticmethod
    def total(several: "Iterable[Traffic]") -> "Traffic":
        """Adds up the rows of layers and passes."""
        return Traffic(*(sum(map(float, kind)) for kind in zip(*several, strict=True)))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RH: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.route = (sends, receives, group)
        arrived_RH = rows_RH.new_empty((sum(receives), *rows_RH.shape[1:]))
        dist.all_to_all_single(arrived_RH, rows_RH.contiguous(), receives, sends, group=group)
        return arrived_RH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sends, receives, group = ctx.route
        return exchange_rows(gradients[0], receives, sends, group), None, None, None


def exchange_rows(rows_RH: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Sends consecutive blocks of rows to the ranks of a group and gathers theirs, in the order of the ranks.

    Its gradient travels the same way back. No rank may have nothing to do with it: one without rows takes part.

    Args:
        rows_RH: the rows, those for the first rank first.
        sends: rows for each rank.
        receives: rows from each rank.
        group: the ranks.
    """
    arrived: Tensor = _Exchange.apply(rows_RH, sends, receives, group)
    return arrived


def exchange_counts(counts_E: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Tells each rank of a group how many rows come to each of its experts.

    Args:
        counts_E: this rank's rows for every expert, those of the first rank first.
        group: the ranks.

    Returns:
        (ranks, E / ranks): rows from each rank for each expert of this one.
    """
    arriving = torch.empty_like(counts_E)
    dist.all_to_all_single(arriving, counts_E, group=group)
    return arriving.view(dist.get_world_size(group), -1)
