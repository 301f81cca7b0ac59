"""The experts' gated feed-forward, from tokens to the weighted sum of what their experts give.

Shape letters: see `mixtral/modeling.py`; r is the rank of a low-rank addition, and lower case m the rows of one expert.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtral.ops.linear import few_rows, is_few
from mixtral.ops.permute import sum_choices, weigh_rows

Activation = Callable[[Tensor], Tensor]

BLOCK = 32
"""The rows of an expert are filled up to a multiple of this, from as many on.

Matrix products are fastest at such sizes, and on a CPU each new size costs milliseconds at its first use.
"""


VECTOR_BYTES = 16


class Assignment(NamedTuple):
    """Which rows each expert gets: K of every token's, in the order of `sort_rows`.

    Attributes:
        order_R: row r is choice `order_R[r] % K` of token `order_R[r] // K`.
        counts_E: rows of each expert, which come one expert after the other.
        weights_TK: what each choice counts in its token's sum, in any floating dtype. A weight of exactly zero gets no
            gradient: the softmax that gave it has none there either.
    """

    order_R: Tensor
    counts_E: Tensor
    weights_TK: Tensor


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


class Matrices(Protocol):
    """A matrix of every expert: a tensor (E, Y, X), or what makes a frozen one (Y, X) whenever it is asked for."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, expert: int, /) -> Tensor: ...


class Projection(NamedTuple):
    """A projection of every expert, from X inputs to Y outputs, with or without a low-rank addition."""

    weight_EYX: Matrices
    addition: LowRank | None = None


def reference(
    x_TH: Tensor, assignment: Assignment, gate_up: Projection, down: Projection, activation: Activation
) -> Tensor:
    """Sends every token through its own experts, one row at a time: the definition.

    Args:
        x_TH: tokens.
        assignment: of the tokens to the experts.
        gate_up: to the gate and up projections, gate first, each of I outputs. Its dropout does not take place.
        down: the down projection. Its dropout does not take place.
        activation: applied to the gate.

    Returns:
        (T, H), in the dtype of `x_TH`, added up in that of the weights if it is wider.

    Source: arXiv 2401.04088, section 2.1: SwiGLU experts.
    """
    order_R, counts_E, weights_TK = assignment
    gate_up_EYH, down_EHI = _sum(gate_up), _sum(down)
    expert_of_row = torch.arange(len(counts_E), device=counts_E.device).repeat_interleave(counts_E)
    sums = [torch.zeros_like(x_H, dtype=torch.promote_types(x_TH.dtype, weights_TK.dtype)) for x_H in x_TH]
    for choice, expert in zip(order_R.tolist(), expert_of_row, strict=True):
        token, rank = divmod(choice, weights_TK.shape[1])
        gate_I, up_I = (gate_up_EYH[expert] @ x_TH[token]).chunk(2)
        out_H = down_EHI[expert] @ (activation(gate_I) * up_I)
        sums[token] = sums[token] + weights_TK[token, rank] * out_H
    return torch.stack(sums).to(x_TH.dtype) if sums else torch.zeros_like(x_TH)


def _sum(projection: Projection) -> Tensor:
    matrices_EYX, addition = projection
    if not isinstance(matrices_EYX, Tensor):
        matrices_EYX = torch.stack([matrices_EYX[expert] for expert in range(matrices_EYX.shape[0])])
    if addition is None:
        return matrices_EYX
    return matrices_EYX + addition.scale * addition.up_EYr @ addition.down_ErX


def expert_ffn(
    x_TH: Tensor,
    assignment: Assignment,
    gate_up: Projection,
    down: Projection,
    activation: Activation,
    *,
    grouped: bool | None = None,
) -> Tensor:
    """Sends each expert's block of rows through it in a few matrix products; see `reference`.

    Backward needs of a layer's rows the tokens and what the gate and up projections gave, H + K * 2I numbers per
    token; it computes the rest again, which costs no matrix product. No matrix is ever added up with its low-rank
    addition, and every gradient is written where it stays. An expert without rows takes part with an empty product,
    so that its gradient is zero and never missing. Matrices that are made when they are asked for have no gradient;
    they are made one at a time, here and again in backward, and none is kept.

    Args:
        x_TH: tokens.
        assignment: of the tokens to the experts.
        gate_up: to the gate and up projections.
        down: the down projection.
        activation: applied to the gate.
        grouped: whether all experts go through one product, `torch.nn.functional.grouped_mm`, which asks nothing of the
            host, rather than each through its own. By default on a GPU in bf16, where its kernels take the sizes.
    """
    order_R, counts_E, weights_TK = assignment
    made = [None if isinstance(weight, Tensor) else weight for weight in (gate_up.weight_EYX, down.weight_EYX)]
    tensors = (*_tensors(gate_up), *_tensors(down))
    if grouped is None:
        grouped = x_TH.is_cuda and _takes_grouped(x_TH, tensors)
    counts: list[int] = []
    if grouped:
        order_P, ends_E = order_R, counts_E.cumsum(dim=0, dtype=torch.int32)
    else:
        blocks = [_filled(block, len(order_R)) for block in order_R.split(counts_E.tolist())]
        order_P, ends_E, counts = torch.cat(blocks), None, [len(block) for block in blocks]
    settings = _Settings(
        counts=counts,
        activation=activation,
        keep=torch.is_grad_enabled(),
        inner=down.weight_EYX.shape[2],
        gate_up=_strength(gate_up.addition),
        down=_strength(down.addition),
        made_gate_up=made[0],
        made_down=made[1],
    )
    with torch.autocast(x_TH.device.type, enabled=False):
        out_TH: Tensor = _ExpertFfn.apply(settings, order_P, ends_E, x_TH, weights_TK, *tensors)
    return out_TH


class _Strength(NamedTuple):
    """What of a low-rank addition is no tensor."""

    scale: float = 1.0
    dropout: float = 0.0


def _strength(addition: LowRank | None) -> _Strength:
    return _Strength() if addition is None else _Strength(addition.scale, addition.dropout)


def _tensors(projection: Projection) -> tuple[Tensor | None, ...]:
    weight_EYX, addition = projection
    weight = weight_EYX if isinstance(weight_EYX, Tensor) else None
    return (weight, None, None) if addition is None else (weight, addition.down_ErX, addition.up_EYr)


def _takes_grouped(x_TH: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether the kernels of grouped products take the tensors: bf16, in rows of whole vectors."""
    given = [tensor for tensor in tensors if tensor is not None]
    aligned = all(size * tensor.element_size() % VECTOR_BYTES == 0 for tensor in given for size in tensor.shape[1:])
    is_whole = tensors[0] is not None and tensors[3] is not None
    return is_whole and aligned and x_TH.dtype == torch.bfloat16


def _filled(choices_m: Tensor, nothing: int) -> Tensor:
    """Fills an expert's choices up with what is no choice."""
    missing = -len(choices_m) % BLOCK if len(choices_m) > BLOCK else 0
    return F.pad(choices_m, (0, missing), value=nothing) if missing else choices_m


class _Settings(NamedTuple):
    """What is no tensor.

    Attributes:
        counts: rows of each expert, where each has a product of its own.
        activation: of the gate.
        keep: whether a gradient may be asked for.
        inner: I.
        gate_up, down: their additions.
        made_gate_up, made_down: their matrices, where these are no tensors.
    """

    counts: list[int]
    activation: Activation
    keep: bool
    inner: int
    gate_up: _Strength
    down: _Strength
    made_gate_up: Matrices | None
    made_down: Matrices | None


class _Product:
    """A projection of one expert's rows, or of all experts' that end at `ends_E`, and the gradients of that.

    Args:
        weights: a matrix (Y, X) of each expert.
        expert: which one it is; None for all.
        pair: A (r, X) and B (Y, r), or None without an addition.
        strength: of the addition.
        seen_mX: which inputs A sees; None where it sees all.
        ends_E: of the rows of all experts.
        turns: whether a few rows may be multiplied the other way round.

    Attributes:
        gradients: of the three tensors. What is there already is written into.
    """

    def __init__(
        self,
        weights: Matrices,
        expert: int | None,
        pair: list[Any],
        strength: _Strength,
        seen_mX: Tensor | None,
        ends_E: Tensor | None,
        turns: bool,
        gradients: list[Tensor | None],
        wanted: Sequence[bool],
    ) -> None:
        self.weights, self.expert, self.seen_mX = weights, expert, seen_mX
        self.ends_E, self.turns = ends_E, turns
        self.gradients, self.wanted = gradients, wanted
        self.a, self.b = pair
        self.scale = strength.scale / (1 - strength.dropout)

    def of(self, x_mX: Tensor, out_mY: Tensor | None) -> Tensor:
        """Computes the projection of m rows, into a tensor if one is given and there is one expert."""
        weight_YX = self._weight(x_mX.dtype)
        if self.turns and is_few(x_mX):
            product_mY = few_rows(x_mX, weight_YX)
            out_mY = product_mY if out_mY is None else out_mY.copy_(product_mY)
        else:
            out_mY = self._product(x_mX, weight_YX.mT, out_mY)
        if self.a is not None:
            self._add(out_mY, self._product(self._seen(x_mX), self.a.mT), self.b.mT, self.scale)
        return out_mY

    def backward(self, gradient_mY: Tensor, x_mX: Tensor, out_mX: Tensor | None) -> Tensor:
        """Computes the gradient of the rows, into a tensor as `of` does, and those of the tensors that are wanted."""
        out_mX = self._product(gradient_mY, self._weight(x_mX.dtype), out_mX)
        self._differentiate(0, gradient_mY, x_mX)
        if self.a is None:
            return out_mX
        inner_mr, x_mX = self.scale * self._product(gradient_mY, self.b), self._seen(x_mX)
        self._differentiate(1, inner_mr, x_mX)
        if self.wanted[2]:
            self._differentiate(2, gradient_mY, self.scale * self._product(x_mX, self.a.mT))
        if self.seen_mX is None:
            self._add(out_mX, inner_mr, self.a)
        else:
            out_mX += self._seen(self._product(inner_mr, self.a))
        return out_mX

    def _weight(self, dtype: torch.dtype) -> Tensor:
        weight = self.weights if self.expert is None else self.weights[self.expert]
        assert isinstance(weight, Tensor)
        return weight.to(dtype)

    def _seen(self, x_mX: Tensor) -> Tensor:
        return x_mX if self.seen_mX is None else x_mX * self.seen_mX

    def _product(self, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        if self.ends_E is None:
            return torch.mm(left, right, out=out)
        return F.grouped_mm(left, right, offs=self.ends_E)

    def _add(self, out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
        if self.ends_E is None:
            out.addmm_(left, right, alpha=scale)
        else:
            out.add_(self._product(left, right), alpha=scale)

    def _differentiate(self, place: int, gradient_mY: Tensor, x_mX: Tensor) -> None:
        if self.wanted[place]:
            self.gradients[place] = self._product(gradient_mY.mT, x_mX, self.gradients[place])


class _ExpertFfn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        order_P: Tensor,
        ends_E: Tensor | None,
        x_TH: Tensor,
        weights_TK: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        keep = settings.keep and any(ctx.needs_input_grad)
        seen = _draw_seen(settings, x_TH, len(order_P))
        token_P, weight_P, place_R = _places(order_P, weights_TK)
        pre_PG: Any = None
        out_PH: Any = None
        if ends_E is None:
            out_PH = x_TH.new_empty(len(order_P), x_TH.shape[1])
            pre_PG = x_TH.new_empty(len(order_P), 2 * settings.inner) if keep else None
        for rows, gate_up, down in _experts(settings, ends_E, tensors, seen):
            pre_mG = gate_up.of(x_TH.index_select(0, token_P[rows]), _part(pre_PG, rows))
            gate_mI, up_mI = pre_mG.chunk(2, dim=-1)
            out_mH = down.of(settings.activation(gate_mI) * up_mI, _part(out_PH, rows))
        if ends_E is not None:
            pre_PG, out_PH = pre_mG, out_mH
        ctx.settings = settings
        ctx.save_for_backward(token_P, weight_P, place_R, ends_E, x_TH, weights_TK, pre_PG, *seen, *tensors)
        return weigh_rows(out_PH, place_R, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        settings: _Settings = ctx.settings
        token_P, weight_P, place_R, ends_E, x_TH, weights_TK, pre_PG, *rest = ctx.saved_tensors
        seen, tensors, wanted = rest[:2], rest[2:], ctx.needs_input_grad[5:]
        grad_weight_P = torch.empty_like(weight_P)
        gradients: list[Tensor | None] = [None] * len(tensors)
        grad_x_PH: Any = None
        if ends_E is None:
            gradients = [torch.empty_like(one) if needed else None for one, needed in zip(tensors, wanted, strict=True)]
            grad_x_PH = x_TH.new_empty(len(token_P), x_TH.shape[1])
        for rows, gate_up, down in _experts(settings, ends_E, tensors, seen, gradients, wanted):
            gate_mI, up_mI = pre_PG[rows].chunk(2, dim=-1)
            activated_mI, pull, *_ = torch.func.vjp(settings.activation, gate_mI)
            inner_mI = activated_mI * up_mI
            grad_mH = (grad_TH.index_select(0, token_P[rows]) * weight_P[rows, None]).to(x_TH.dtype)
            grad_inner_mI = down.backward(grad_mH, inner_mI, None)
            grad_weight_P[rows] = inner_mI.mul_(grad_inner_mI).sum(dim=-1, dtype=weight_P.dtype)
            grad_up_mI = grad_inner_mI * activated_mI
            grad_mG = torch.cat([*pull(grad_inner_mI.mul_(up_mI)), grad_up_mI], dim=-1)
            grad_x_mH = gate_up.backward(grad_mG, x_TH.index_select(0, token_P[rows]), _part(grad_x_PH, rows))
        if ends_E is not None:
            grad_x_PH, gradients = grad_x_mH, [*gate_up.gradients, *down.gradients]
        grad_weight_P /= weight_P.where(weight_P != 0, 1)  # it was found by way of what the weight multiplied
        grad_x_TH = sum_choices(grad_x_PH.index_select(0, place_R).unflatten(0, weights_TK.shape))
        return None, None, None, grad_x_TH, grad_weight_P[place_R].view_as(weights_TK), *gradients


def _part(rows_PX: Tensor | None, rows: slice) -> Tensor | None:
    return None if rows_PX is None else rows_PX[rows]


def _places(order_P: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gives each row's token and weight, a token and nothing where the row is no choice, and the row of each choice."""
    token_P = (order_P // weights_TK.shape[1]).clamp(max=len(weights_TK) - 1)
    weight_P = F.pad(weights_TK.flatten(), (0, 1))[order_P]
    place = order_P.new_empty(weights_TK.numel() + 1)
    place[order_P] = torch.arange(len(order_P), device=order_P.device)
    return token_P, weight_P, place[:-1]


def _experts(
    settings: _Settings,
    ends_E: Tensor | None,
    tensors: Sequence[Tensor | None],
    seen: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None] = (None,) * 6,
    wanted: Sequence[bool] = (False,) * 6,
) -> Iterator[tuple[slice, _Product, _Product]]:
    """Yields the rows of each expert and its two projections; or once all rows, and the projections of all experts."""
    weights: tuple[Any, Any] = (settings.made_gate_up or tensors[0], settings.made_down or tensors[3])
    ends = itertools.accumulate(settings.counts)
    blocks = [slice(end - count, end) for end, count in zip(ends, settings.counts, strict=True)]
    for expert, rows in enumerate(blocks) if ends_E is None else [(None, slice(None))]:
        if not settings.keep and rows.start == rows.stop and ends_E is None:
            continue  # nobody waits for the gradient of an expert without rows
        own = [one if one is None or expert is None else one[expert] for one in (*tensors, *gradients)]
        masks = [None if mask is None else mask[rows] for mask in seen]
        pairs, goals = (own[1:3], own[4:6]), (own[6:9], own[9:])
        turns = ends_E is None and not settings.keep
        yield (
            rows,
            _Product(weights[0], expert, pairs[0], settings.gate_up, masks[0], ends_E, turns, goals[0], wanted[:3]),
            _Product(weights[1], expert, pairs[1], settings.down, masks[1], ends_E, turns, goals[1], wanted[3:]),
        )


def _draw_seen(settings: _Settings, x_TH: Tensor, rows: int) -> list[Tensor | None]:
    """Draws which inputs of the two projections their A sees, where not all."""
    masks: list[Tensor | None] = []
    for strength, width in ((settings.gate_up, x_TH.shape[1]), (settings.down, settings.inner)):
        drop = strength.dropout
        masks.append(torch.rand(rows, width, device=x_TH.device) >= drop if drop else None)
    return masks
