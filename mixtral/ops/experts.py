"""The experts' gated feed-forward on routed rows."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def reference(
    rows_RH: Tensor, counts_E: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, activation: Activation
) -> Tensor:
    """Sends every row through its own expert, one row at a time: the definition.

    Args:
        rows_RH: rows sorted by expert.
        counts_E: rows of each expert.
        gate_up_E2IH: gate and up projections, gate first.
        down_EHI: down projections.
        activation: applied to the gate.

    Returns:
        (R, H).

    Source: arXiv 2401.04088, section 2.1: SwiGLU experts.
    """
    expert_of_row = torch.arange(len(counts_E), device=counts_E.device).repeat_interleave(counts_E)
    outputs = []
    for row_H, expert in zip(rows_RH, expert_of_row, strict=True):
        gate_I, up_I = (gate_up_E2IH[expert] @ row_H).chunk(2)
        outputs.append(down_EHI[expert] @ (activation(gate_I) * up_I))
    return torch.stack(outputs) if outputs else torch.zeros_like(rows_RH)


def expert_ffn(
    rows_RH: Tensor, counts_E: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, activation: Activation
) -> Tensor:
    """Sends each expert's block of rows through it in three matrix products; see `reference`.

    `unbind` gives every expert's matrix one gradient that is stacked once; indexing the stacked
    parameter instead would fill and add a full-size gradient per expert. An expert without rows
    takes part with an empty product, so that its gradient is zero and never missing.
    """
    outputs = []
    rows = rows_RH.split(counts_E.tolist())
    for rows_rH, gate_up_2IH, down_HI in zip(rows, gate_up_E2IH.unbind(), down_EHI.unbind(), strict=True):
        gate_rI, up_rI = F.linear(rows_rH, gate_up_2IH).chunk(2, dim=-1)
        outputs.append(F.linear(activation(gate_rI) * up_rI, down_HI))
    return torch.cat(outputs)
