"""The experts' gated feed-forward on routed rows."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


class LowRank(NamedTuple):
    """What each expert adds to a projection of its own: `scale * (dropout(x) @ A.T) @ B.T`, of rank r.

    Attributes:
        down_ErX: A, from the X inputs of the projection to r.
        up_EYr: B, from r to its Y outputs.
        scale: of the addition.
        dropout: share of the inputs that A does not see; what is left is scaled up.

    Source: arXiv 2106.09685, section 4.1.
    """

    down_ErX: Tensor
    up_EYr: Tensor
    scale: float
    dropout: float = 0.0


def reference(
    rows_RH: Tensor,
    counts_E: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    activation: Activation,
    gate_up_addition: LowRank | None = None,
    down_addition: LowRank | None = None,
) -> Tensor:
    """Sends every row through its own expert, one row at a time: the definition.

    Args:
        rows_RH: rows sorted by expert.
        counts_E: rows of each expert.
        gate_up_E2IH: gate and up projections, gate first.
        down_EHI: down projections.
        activation: applied to the gate.
        gate_up_addition: to the gate and up projections, without dropout.
        down_addition: to the down projections, without dropout.

    Returns:
        (R, H).

    Source: arXiv 2401.04088, section 2.1: SwiGLU experts.
    """
    gate_up_E2IH, down_EHI = _sum(gate_up_E2IH, gate_up_addition), _sum(down_EHI, down_addition)
    expert_of_row = torch.arange(len(counts_E), device=counts_E.device).repeat_interleave(counts_E)
    outputs = []
    for row_H, expert in zip(rows_RH, expert_of_row, strict=True):
        gate_I, up_I = (gate_up_E2IH[expert] @ row_H).chunk(2)
        outputs.append(down_EHI[expert] @ (activation(gate_I) * up_I))
    return torch.stack(outputs) if outputs else torch.zeros_like(rows_RH)


def _sum(matrices_EYX: Tensor, addition: LowRank | None) -> Tensor:
    if addition is None:
        return matrices_EYX
    return matrices_EYX + addition.scale * addition.up_EYr @ addition.down_ErX


def expert_ffn(
    rows_RH: Tensor,
    counts_E: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    activation: Activation,
    gate_up_addition: LowRank | None = None,
    down_addition: LowRank | None = None,
) -> Tensor:
    """Sends each expert's block of rows through it in a few matrix products; see `reference`.

    `unbind` gives every expert's matrix one gradient that is stacked once; indexing the stacked
    parameter instead would fill and add a full-size gradient per expert. An expert without rows
    takes part with an empty product, so that its gradient is zero and never missing. No matrix is ever added up
    with its low-rank addition.
    """
    gate_ups, downs = _of_each(gate_up_E2IH, gate_up_addition), _of_each(down_EHI, down_addition)
    outputs = []
    for rows_rH, gate_up, down in zip(rows_RH.split(counts_E.tolist()), gate_ups, downs, strict=True):
        gate_rI, up_rI = _project(rows_rH, gate_up, gate_up_addition).chunk(2, dim=-1)
        outputs.append(_project(activation(gate_rI) * up_rI, down, down_addition))
    return torch.cat(outputs)


def _of_each(matrices_EYX: Tensor, addition: LowRank | None) -> Iterable[tuple[Tensor, ...]]:
    """Gives each expert's matrix and, with an addition, its A and B."""
    stacked = [matrices_EYX] if addition is None else [matrices_EYX, addition.down_ErX, addition.up_EYr]
    return zip(*(tensor.unbind() for tensor in stacked), strict=True)


def _project(x: Tensor, matrices: tuple[Tensor, ...], addition: LowRank | None) -> Tensor:
    out = F.linear(x, matrices[0])
    if addition is None:
        return out
    seen = F.dropout(x, addition.dropout) if addition.dropout else x
    return out.addmm_(F.linear(seen, matrices[1]), matrices[2].t(), alpha=addition.scale)
