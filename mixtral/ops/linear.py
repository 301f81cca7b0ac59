"""Linear maps of a few rows, which is what writing a text one token at a time is made of, and in a wider dtype."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW = 8  # up to so many rows the product is faster the other way round


def is_few(x: Tensor) -> bool:
    """Whether rows are so few, of fp32 on a processor, that `few_rows` is faster than a product."""
    return x.is_cpu and x.dtype == torch.float32 and x.dim() > 1 and 0 < x.shape[:-1].numel() <= FEW


def few_rows(x_mX: Tensor, weight_YX: Tensor) -> Tensor:
    """Computes x @ weight.mT, (m, Y), as (weight @ x.mT).mT, and one row as two.

    It reads the matrix at 12 to 43 GB/s, where the product in its usual order reads it at 5 to 18: measured with MKL on
    two cores of an AMD EPYC; only 5 to 8 rows of more than a thousand numbers lose, by up to a third. In bf16, whose
    products are oneDNN's, it is slower.
    """
    rows = x_mX.shape[0]
    columns_Xm = x_mX.repeat(2, 1).mT if rows == 1 else x_mX.mT
    return (weight_YX @ columns_Xm)[:, :rows].mT.contiguous()


class Linear(nn.Linear):
    """A linear layer that is fast for a few rows too, where no gradient is asked for and nothing else replaces it."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps the last dimension."""
        is_plain = self.bias is None and type(self.weight) is nn.Parameter and not torch.compiler.is_compiling()
        if is_plain and not torch.is_grad_enabled() and is_few(x):
            return few_rows(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return super().forward(x)


def wide_linear(x_TX: Tensor, weight_YX: Tensor) -> Tensor:
    """Computes x @ weight.mT in at least fp32, (T, Y), and keeps of the rows none but those given.

    It can be differentiated once.
    """
    out_TY: Tensor = _WideLinear.apply(x_TX, weight_YX)
    return out_TY


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, weight_YX: Tensor) -> Tensor:
        ctx.save_for_backward(x_TX if ctx.needs_input_grad[1] else None, weight_YX)
        ctx.dtype = x_TX.dtype
        wide = torch.promote_types(x_TX.dtype, torch.float32)
        return F.linear(x_TX.to(wide), weight_YX.to(wide))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TY: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TX, weight_YX = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TY @ weight_YX.to(grad_TY.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_TY.mT @ x_TX.to(grad_TY.dtype)).to(weight_YX.dtype)
        return grad_x, grad_weight
