"""Root-mean-square normalisation, which keeps its input for backward rather than what it made of it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scales the last dimension to unit root mean square, in at least fp32, and by a weight.

    Args:
        x: any shape.
        weight: as many numbers as the last dimension of `x`.
        eps: added to the mean of the squares.

    Returns:
        The shape of `x`; the scaled numbers are rounded to its dtype before the weight multiplies them.

    Source: arXiv 1910.07467, equation 4.
    """
    wide = _wide(x)
    return weight * (wide * _scale(wide, eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Equals `reference`; backward needs the input, and the scale of each row; it can be differentiated once.

    On a GPU it is one kernel of torch's in place of eight, and rounds once, after the weight.
    """
    if x.is_cuda and x.dtype == weight.dtype and not torch.is_autocast_enabled("cuda"):  # which would have it in fp32
        return F.rms_norm(x, weight.shape, weight, eps)
    if not torch.is_grad_enabled():
        return reference(x, weight, eps)
    out: Tensor = _RmsNorm.apply(x, weight, eps)
    return out


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scale(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        scale = _scale(wide, eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, wide_grad = _wide(x) * scale, _wide(grad)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (wide_grad * normed.to(x.dtype)).sum_to_size(weight.shape).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            weighed = wide_grad * weight
            along = (weighed * normed).mean(dim=-1, keepdim=True)
            grad_x = weighed.sub_(normed.mul_(along)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None
