"""The experts' gated feed-forward, from tokens to the weighted sum of what their experts give.

Shape letters: see `mixtral/modeling.py`; r is the rank of a low-rank addition, and lower case m the rows of one expert.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtral.ops.permute import weigh_rows

Activation = Callable[[Tensor], Tensor]

BLOCK = 32
"""The rows of an expert are filled up to a multiple of this, from as many on.

Matrix products are fastest at such sizes, and on a CPU each new size costs milliseconds at its first use.
"""


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
    x_TH: Tensor, assignment: Assignment, gate_up: Projection, down: Projection, activation: Activation
) -> Tensor:
    """Sends each expert's block of rows through it in a few matrix products; see `reference`.

    Backward needs of a layer's rows the tokens and what the gate and up projections gave, H + K * 2I numbers per
    token; it computes the rest again, which costs no matrix product. No matrix is ever added up with its low-rank
    addition, and every gradient is written where it stays. An expert without rows takes part with an empty product,
    so that its gradient is zero and never missing. Matrices that are made when they are asked for have no gradient;
    they are made one at a time, here and again in backward, and none is kept.
    """
    order_R, counts_E, weights_TK = assignment
    blocks = [_filled(block, len(order_R)) for block in order_R.split(counts_E.tolist())]
    made = [None if isinstance(weight, Tensor) else weight for weight in (gate_up.weight_EYX, down.weight_EYX)]
    settings = _Settings(
        order_P=torch.cat(blocks),
        counts=[len(block) for block in blocks],
        activation=activation,
        keep=torch.is_grad_enabled(),
        inner=down.weight_EYX.shape[2],
        gate_up=_strength(gate_up.addition),
        down=_strength(down.addition),
        made_gate_up=made[0],
        made_down=made[1],
    )
    out_TH: Tensor = _ExpertFfn.apply(settings, x_TH, weights_TK, *_tensors(gate_up), *_tensors(down))
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


def _filled(choices_m: Tensor, nothing: int) -> Tensor:
    """Fills an expert's choices up with what is no choice."""
    missing = -len(choices_m) % BLOCK if len(choices_m) > BLOCK else 0
    return F.pad(choices_m, (0, missing), value=nothing) if missing else choices_m


class _Settings(NamedTuple):
    """What has no gradient: P rows, those of experts that were filled up among them.

    Attributes:
        order_P: of the choices, R where a row is none.
        counts: rows of each expert.
        activation: of the gate.
        keep: whether a gradient may be asked for.
        inner: I.
        gate_up, down: their additions.
        made_gate_up, made_down: their matrices, where these are no tensors.
    """

    order_P: Tensor
    counts: list[int]
    activation: Activation
    keep: bool
    inner: int
    gate_up: _Strength
    down: _Strength
    made_gate_up: Matrices | None
    made_down: Matrices | None


class _Product:
    """One projection of one expert on its rows, and the gradients of that.

    Args:
        weights: a matrix (Y, X) of each expert.
        expert: which one it is.
        pair: A (r, X) and B (Y, r), or None without an addition.
        strength: of the addition.
        seen_mX: which inputs A sees; None where it sees all.
        gradients: where those of the three go; None for a frozen one.
    """

    def __init__(
        self,
        weights: Matrices,
        expert: int,
        pair: list[Any],
        strength: _Strength,
        seen_mX: Tensor | None,
        gradients: list[Tensor | None],
    ) -> None:
        self.weights, self.expert = weights, expert
        self.a, self.b = pair
        self.scale = strength.scale / (1 - strength.dropout)
        self.seen_mX, self.gradients = seen_mX, gradients

    def of(self, x_mX: Tensor, out_mY: Tensor) -> None:
        """Computes the projection of m rows."""
        torch.mm(x_mX, self.weights[self.expert].to(x_mX.dtype).t(), out=out_mY)
        if self.a is not None:
            out_mY.addmm_(self._seen(x_mX) @ self.a.t(), self.b.t(), alpha=self.scale)

    def backward(self, gradient_mY: Tensor, x_mX: Tensor, out_mX: Tensor) -> None:
        """Computes the gradient of the rows, and those of the tensors."""
        for_weight, for_a, for_b = self.gradients
        torch.mm(gradient_mY, self.weights[self.expert].to(x_mX.dtype), out=out_mX)
        if for_weight is not None:
            torch.mm(gradient_mY.t(), x_mX, out=for_weight)
        if self.a is None:
            return
        inner_mr, x_mX = self.scale * (gradient_mY @ self.b), self._seen(x_mX)
        if for_a is not None:
            torch.mm(inner_mr.t(), x_mX, out=for_a)
        if for_b is not None:
            torch.mm(gradient_mY.t(), self.scale * (x_mX @ self.a.t()), out=for_b)
        if self.seen_mX is None:
            out_mX.addmm_(inner_mr, self.a)
        else:
            out_mX += self._seen(inner_mr @ self.a)

    def _seen(self, x_mX: Tensor) -> Tensor:
        return x_mX if self.seen_mX is None else x_mX * self.seen_mX


class _ExpertFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: _Settings, x_TH: Tensor, weights_TK: Tensor, *tensors: Tensor | None) -> Tensor:
        keep = settings.keep and any(ctx.needs_input_grad)
        width = 2 * settings.inner
        seen = _draw_seen(settings, x_TH)
        token_P, _, place_R = _places(settings.order_P, weights_TK)
        pre_PG = x_TH.new_empty(len(token_P), width) if keep else None
        out_PH = x_TH.new_empty(len(token_P), x_TH.shape[1])
        for rows, gate_up, down in _experts(settings, tensors, seen):
            x_mH = x_TH[token_P[rows]]
            pre_mG = x_TH.new_empty(len(x_mH), width) if pre_PG is None else pre_PG[rows]
            gate_up.of(x_mH, pre_mG)
            gate_mI, up_mI = pre_mG.chunk(2, dim=-1)
            down.of(settings.activation(gate_mI) * up_mI, out_PH[rows])
        ctx.settings = settings
        ctx.save_for_backward(x_TH, weights_TK, pre_PG, *seen, *tensors)
        return weigh_rows(out_PH, place_R, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        settings: _Settings = ctx.settings
        x_TH, weights_TK, pre_PG, *rest = ctx.saved_tensors
        seen, tensors = rest[:2], rest[2:]
        gradients = [
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip(tensors, ctx.needs_input_grad[3:], strict=True)
        ]
        token_P, weight_P, place_R = _places(settings.order_P, weights_TK)
        grad_x_PH = x_TH.new_empty(len(token_P), x_TH.shape[1])
        grad_weight_P = torch.empty_like(weight_P)
        for rows, gate_up, down in _experts(settings, tensors, seen, gradients):
            with torch.enable_grad():
                gate_mI, up_mI = pre_PG[rows].chunk(2, dim=-1)
                activated_mI = settings.activation(gate_mI.requires_grad_())
            inner_mI = activated_mI.detach() * up_mI
            grad_inner_mI = torch.empty_like(inner_mI)
            grad_mH = (grad_TH[token_P[rows]] * weight_P[rows, None]).to(x_TH.dtype)
            down.backward(grad_mH, inner_mI, grad_inner_mI)
            grad_weight_P[rows] = inner_mI.mul_(grad_inner_mI).sum(dim=-1, dtype=weight_P.dtype)
            grad_mG = torch.empty_like(pre_PG[rows])
            grad_gate_mI, grad_up_mI = grad_mG.chunk(2, dim=-1)
            torch.mul(grad_inner_mI, activated_mI.detach(), out=grad_up_mI)
            grad_gate_mI.copy_(torch.autograd.grad(activated_mI, gate_mI, grad_inner_mI.mul_(up_mI))[0])
            gate_up.backward(grad_mG, x_TH[token_P[rows]], grad_x_PH[rows])
        grad_weight_P /= weight_P.where(weight_P != 0, 1)  # it was found by way of what the weight multiplied
        grad_x_TH = grad_x_PH[place_R].unflatten(0, weights_TK.shape).sum(dim=1)
        return None, grad_x_TH, grad_weight_P[place_R].view_as(weights_TK), *gradients


def _places(order_P: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gives each row's token and weight, a token and nothing where the row is no choice, and the row of each choice."""
    token_P = (order_P // weights_TK.shape[1]).clamp(max=len(weights_TK) - 1)
    weight_P = F.pad(weights_TK.flatten(), (0, 1))[order_P]
    place = order_P.new_empty(weights_TK.numel() + 1)
    place[order_P] = torch.arange(len(order_P), device=order_P.device)
    return token_P, weight_P, place[:-1]


def _experts(
    settings: _Settings,
    tensors: Sequence[Tensor | None],
    seen: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None] = (None,) * 6,
) -> Iterator[tuple[slice, _Product, _Product]]:
    """Yields each expert's rows and its two projections."""
    end = 0
    weights: tuple[Any, Any] = (settings.made_gate_up or tensors[0], settings.made_down or tensors[3])
    for expert, count in enumerate(settings.counts):
        rows = slice(end, end := end + count)
        pairs = [None if tensor is None else tensor[expert] for tensor in (*tensors[1:3], *tensors[4:6])]
        their = [None if gradient is None else gradient[expert] for gradient in gradients]
        masks = [None if mask is None else mask[rows] for mask in seen]
        gate_up = _Product(weights[0], expert, pairs[:2], settings.gate_up, masks[0], their[:3])
        yield rows, gate_up, _Product(weights[1], expert, pairs[2:], settings.down, masks[1], their[3:])


def _draw_seen(settings: _Settings, x_TH: Tensor) -> list[Tensor | None]:
    """Draws which inputs of the two projections their A sees, where not all."""
    masks: list[Tensor | None] = []
    for strength, width in ((settings.gate_up, x_TH.shape[1]), (settings.down, settings.inner)):
        shape = (len(settings.order_P), width)
        drop = strength.dropout
        masks.append(torch.rand(shape, device=x_TH.device) >= drop if drop else None)
    return masks
