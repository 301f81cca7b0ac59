"""Routed rows in expert order, and back into token order."""

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
    return experts_R.argsort(stable=True), torch.bincount(experts_R, minlength=num_experts)


def combine_rows(rows_RH: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
    """Sums each token's K expert outputs by its routing weights, in a fixed order.

    Args:
        rows_RH: expert outputs in the order of `sort_rows`.
        order_R: that order.
        weights_TK: routing weights.

    Returns:
        (T, H), of the dtype of `rows_RH`, weighted and summed in that of the weights if it is wider; equal from run
        to run, since nothing is added atomically.
    """
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    rows_TKH = rows_RH[place_R].unflatten(0, weights_TK.shape)
    return (rows_TKH * weights_TK.unsqueeze(-1)).sum(dim=1).to(rows_RH.dtype)
