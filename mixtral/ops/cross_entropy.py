"""Cross-entropy of a linear head, summed over tokens, with and without forming all logits."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
CPU_BYTES = 4 * 2**20
"""On a CPU, what is computed of large tensors is computed of so many bytes at a time, and stays in the cache."""


def reference(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> Tensor:
    """Sums the cross-entropy of `hidden @ weight.T` against the labels.

    Args:
        hidden_TH: inputs of the head.
        weight_VH: the head's weight.
        labels_T: target ids; -100 is not trained.

    Returns:
        A scalar of at least fp32, in nats; zero, with zero gradient, when no token is trained.
    """
    return cross_entropy_sum(F.linear(hidden_TH, weight_VH), labels_T)


def cross_entropy_sum(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Sums the cross-entropy over the tokens whose label is not -100, in at least fp32."""
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE_INDEX, reduction="sum")


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, chunk: int = 1024) -> Tensor:
    """Equals `reference`, holding at most `chunk` rows of logits at a time."""
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, labels_T, chunk)


def head_cross_entropy(
    hidden_TH: Tensor, head: Callable[[Tensor], Tensor], labels_T: Tensor, chunk: int = 1024
) -> Tensor:
    """Sums the cross-entropy of any head, holding at most `chunk` rows of logits, which are computed twice."""

    def part(hidden_TH: Tensor, labels_T: Tensor) -> Tensor:
        return cross_entropy_sum(head(hidden_TH), labels_T)

    chunks = zip(hidden_TH.split(chunk), labels_T.split(chunk), strict=True)
    return torch.stack([checkpoint(part, *rows, use_reentrant=False) for rows in chunks]).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients of a sum together with it, since d(loss)/d(logits) needs no later factor.

    The head's gradient is accumulated in at least fp32 over the chunks.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, chunk: int) -> Tensor:
        accumulate = torch.promote_types(hidden_TH.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_TH) if needs_hidden else None
        grad_weight: Tensor | None = None
        total = hidden_TH.new_zeros((), dtype=accumulate)
        buffer = hidden_TH.new_empty(min(chunk, len(hidden_TH)), len(weight_VH))
        for start in range(0, max(1, len(hidden_TH)), chunk):
            rows = slice(start, start + chunk)
            logits = torch.mm(hidden_TH[rows], weight_VH.t(), out=buffer[: len(hidden_TH[rows])])
            total += _to_gradient(logits, labels_T[rows], accumulate, wanted=needs_hidden or needs_weight)
            if grad_hidden is not None:
                torch.mm(logits, weight_VH, out=grad_hidden[rows])
            if needs_weight:
                grad_weight = _sum(grad_weight, logits.t() @ hidden_TH[rows], accumulate)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VH.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            scaled = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            for part, out in _in_cache(grad_weight, scaled):
                torch.mul(part, grad_total, out=out)
            grad_weight = scaled
        return grad_hidden, grad_weight, None, None


def _in_cache(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields the same rows of some matrices: on a CPU as many as stay in the cache, elsewhere all."""
    first = tensors[0]
    rows = max(1, CPU_BYTES // (first.shape[1] * 4)) if first.is_cpu else max(1, len(first))
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _sum(total: Tensor | None, product: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds a product to a total in a dtype, in place; without one it begins it."""
    if total is None:
        return product.to(dtype)
    for part, added in _in_cache(total, product):
        part += added
    return total


def _to_gradient(logits_TV: Tensor, labels_T: Tensor, dtype: torch.dtype, *, wanted: bool) -> Tensor:
    """Sums the cross-entropy, computed in a dtype, and puts its gradient, if wanted, in place of the logits."""
    total = logits_TV.new_zeros((), dtype=dtype)
    for logits, labels in _in_cache(logits_TV, labels_T):
        trained = labels != IGNORE_INDEX
        wide = logits.to(dtype)
        targets = labels.where(trained, 0).unsqueeze(-1)
        gradient = wide.softmax(dim=-1)
        normalizer = wide.amax(dim=-1) - gradient.amax(dim=-1).log()  # log sum exp: the likeliest is no tiny number
        total += (normalizer - wide.gather(-1, targets).squeeze(-1)).where(trained, 0.0).sum()
        if wanted:
            gradient.scatter_add_(-1, targets, gradient.new_full(targets.shape, -1.0))
            logits.copy_(gradient.mul_(trained.unsqueeze(-1)))
    return total
