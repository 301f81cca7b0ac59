"""ZeRO-1's gradients in bf16, reduced where they lie, and those of a step's first pass put there without adding.

DeepSpeed adds an fp32 copy of each to zeros, and joins and copies back all of them to reduce them.
"""

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor


def reduce_in_place(engine: Any) -> None:
    """Replaces two methods of DeepSpeed's engine and optimizer, where the optimizer is ZeRO-1's in bf16.

    It keeps the gradients of a group of parameters in one flat fp32 tensor, which is what a collective takes.
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, BF16_Optimizer):
        return
    if optimizer.autoep_folding_tp_group is not None:
        raise RuntimeError("DeepSpeed would correct gradients for folded tensor parallelism, which is not done here")

    def reduce(tensors: list[Tensor], group: Any, size: float | None = None) -> None:
        for tensor in tensors:
            engine.allreduce_bucket([tensor], group, size)

    @torch.no_grad()
    def add(parameter: Any, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        total, began = optimizer.fp32_groups_gradients[group][index], optimizer.fp32_groups_has_gradients[group]
        if began[index]:
            total.add_(parameter.grad.flatten())
        else:
            total.copy_(parameter.grad.flatten())
        began[index] = True
        parameter._hp_grad = total
        if clear_lp_grads:
            parameter.grad.zero_()

    engine.allreduce_and_copy, optimizer._update_hp_grad = reduce, add
