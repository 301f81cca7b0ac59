"""Routed rows in expert order, and back into token order."""

from typing import Any

import torch
from torch import Tensor


def sort_rows(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Orders the R = T*K routed rows by expert, keeping token order inside each expert.

    Args:
        experts_TK: expert index of every token's K choices.
        num_experts: E.

    Returns:
        order_R: row r of the sorted rows is choice `order_R[r] % K` of token `order_R[r] // K`.
        counts_E: rows of each expert.
    """
    experts_R = experts_TK.flatten()
    all_E1 = torch.arange(num_experts, device=experts_R.device).unsqueeze(-1)
    return experts_R.argsort(stable=True), (experts_R == all_E1).sum(dim=-1)  # bincount would wait for a GPU


def place_of(order_R: Tensor) -> Tensor:
    """Inverts an order: row `place_R[c]` of the sorted rows is choice c."""
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return place_R


def spread_rows(x_TH: Tensor, order_R: Tensor, top_k: int) -> Tensor:
    """Copies every token into its K rows, in the order of `sort_rows`; `gather_rows` is its gradient."""
    rows_RH: Tensor = _Spread.apply(x_TH, order_R, top_k)
    return rows_RH


def gather_rows(rows_RH: Tensor, order_R: Tensor, top_k: int) -> Tensor:
    """Sums each token's K rows, in a fixed order: equal from run to run, since nothing is added atomically.

    Args:
        rows_RH: in the order of `sort_rows`.
        order_R: that order.
        top_k: K.

    Returns:
        (T, H), of the dtype of `rows_RH`, summed in at least fp32; `spread_rows` is its gradient.
    """
    x_TH: Tensor = _Gather.apply(rows_RH, order_R, top_k)
    return x_TH


def weigh_rows(rows_PH: Tensor, place_R: Tensor, weights_TK: Tensor) -> Tensor:
    """Sums each token's K rows times what each weighs, in the dtype of the weights if it is wider.

    Args:
        rows_PH: at least the R rows that are summed.
        place_R: where each token's K are among them.
        weights_TK: what each weighs.

    Returns:
        (T, H), of the dtype of `rows_PH`.
    """
    rows_TKH = rows_PH.index_select(0, place_R).unflatten(0, weights_TK.shape)
    return sum_choices(rows_TKH * weights_TK.unsqueeze(-1)).to(rows_PH.dtype)


def sum_choices(rows_TKH: Tensor) -> Tensor:
    """Sums each token's K rows in at least fp32; two by one addition, since a CPU sums over few slowly."""
    if rows_TKH.shape[1] == 2:
        return torch.add(*rows_TKH.unbind(dim=1))
    return rows_TKH.sum(dim=1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, order_R: Tensor, top_k: int) -> Tensor:
        ctx.order_R, ctx.top_k = order_R, top_k
        return x_TH.index_select(0, order_R // top_k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gather_rows(gradients[0], ctx.order_R, ctx.top_k), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, order_R: Tensor, top_k: int) -> Tensor:
        ctx.order_R, ctx.top_k = order_R, top_k
        return sum_choices(rows_RH.index_select(0, place_of(order_R)).unflatten(0, (-1, top_k)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return spread_rows(gradients[0], ctx.order_R, ctx.top_k), None, None
