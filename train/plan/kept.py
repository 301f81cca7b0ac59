"""What one layer keeps for its backward pass, tensor by tensor, and what comes and goes while it is differentiated.

It mirrors mixtral/modeling.py, mixtral/ops/experts.py and train/parallel/expert.py. Shape letters: see
`mixtral/modeling.py`; b is the bytes of a number, R the rows that a process's experts take.
"""

from typing import NamedTuple

from train.plan.layout import Layout
from train.plan.load import Skew

FP32, INDEX = 4, 8
BLOCK = 32
"""The rows of an expert are filled up to a multiple of this: mixtral/ops/experts.py."""


class Kept(NamedTuple):
    """Bytes of one layer on the process with the most rows.

    Attributes:
        dense: kept of every token: norms, attention, residuals.
        routed: kept of every row of its experts.
        last: kept by the last norm.
        dense_backward, routed_backward: that come and go when the experts are differentiated.
        block: the largest tensor among these.
    """

    dense: float
    routed: float
    last: float
    dense_backward: float
    routed_backward: float
    block: float


def kept_of_layer(layout: Layout, skew: Skew) -> Kept:
    """Counts what a layer keeps."""
    config, b, tokens = layout.config, layout.bytes, layout.tokens
    model = config.model
    hidden, inner = model.hidden_size, model.intermediate_size
    sent = tokens * model.num_experts_per_tok
    rows, worst = sent * skew.mean, sent * skew.layer
    held = model.num_local_experts // layout.expert_ranks
    split = layout.expert_ranks > 1
    filled = worst + held * BLOCK / 2
    each = layout.expert_ranks * sent / model.num_local_experts * skew.expert  # from all ranks of the group
    dense_backward: float = (
        2 * b * tokens * hidden
    )  # the gradients of the layer's output, and of the residual beside it
    routed_backward = b * (filled + worst) * hidden + b * each * (5 * inner + 2 * hidden)
    if split:
        routed_backward += b * worst * hidden  # the gradient that arrived
    if config.lora.quantize == "nf4":
        routed_backward += b * 2 * inner * hidden  # the matrix that is made of its four bits, one at a time
    dense = tokens * (_norm(layout, 0) + _norm(layout, 1) + _attention(layout) + _router(layout))
    routed = _rows(layout, rows, rows + held * BLOCK / 2, split)
    if config.train.recompute == "layers":  # of a layer only the input is kept; when its turn comes, all of it is there
        dense_backward, routed_backward = dense_backward + dense, routed_backward + routed
        dense, routed = b * tokens * hidden, 0.0
    return Kept(
        dense=dense,
        routed=routed,
        last=tokens * _norm(layout, 2),
        dense_backward=dense_backward,
        routed_backward=routed_backward,
        block=2 * b * inner * filled,
    )


def _norm(layout: Layout, which: int) -> float:
    """Bytes of a token: the input in fp32; the normed one where the norm is trained; the output where it is wanted."""
    hidden, b = layout.config.model.hidden_size, layout.bytes
    normed = b * hidden if layout.trains("norm.weight") else 0
    output = {0: _output_of_first_norm(layout), 1: _output_of_second_norm(layout), 2: b * hidden}[which]
    return FP32 * hidden + normed + output


def _output_of_first_norm(layout: Layout) -> float:
    """Bytes of a token: the projections' input, once, or as each adapter's dropout leaves it, with what it drops."""
    hidden, b = layout.config.model.hidden_size, layout.bytes
    into = ("q_proj", "k_proj", "v_proj")
    shared = b * hidden if layout.trains(*(f"{name}.weight" for name in into)) else 0
    adapted = [name for name in layout.adapted if name in into]
    if layout.config.lora.dropout:
        return shared + len(adapted) * hidden * (b + (1 if layout.on_gpu else b))
    return b * hidden if adapted else shared


def _output_of_second_norm(layout: Layout) -> float:
    """Bytes of a token: what the experts take, where they are here, and what a trained router takes, in fp32."""
    hidden, b = layout.config.model.hidden_size, layout.bytes
    router = FP32 * hidden if layout.trains("mlp.gate.") else 0
    experts = b * hidden if layout.expert_ranks == 1 else 0
    return max(router, experts) if b == FP32 else router + experts


def _attention(layout: Layout) -> float:
    """Bytes of a token: rotated queries, keys, values, the output and its normaliser, and the mask or probabilities."""
    model, b = layout.config.model, layout.bytes
    length = layout.config.data.sequence_length
    queries, keys = model.num_attention_heads * layout.head_dim, model.num_key_value_heads * layout.head_dim
    backend = model.attn_implementation
    repeated = backend in ("sdpa", "eager")  # which take as many key and value heads as query heads beside a mask
    kept: float = b * (2 * queries + 2 * (queries if repeated else keys)) + FP32 * model.num_attention_heads
    if backend == "sdpa":
        kept += b * length  # the mask of a row, in numbers
    elif backend == "eager":
        kept += model.num_attention_heads * length * (FP32 + (b if b < FP32 else 0))
    if "o_proj" in layout.adapted and layout.config.lora.dropout:
        kept += queries * (b + (1 if layout.on_gpu else b))
    return kept


def _router(layout: Layout) -> float:
    """Bytes of a token: logits, their softmax, what was chosen, and what the losses keep."""
    model = layout.config.model
    return FP32 * 6 * model.num_local_experts + (INDEX + 2 * FP32) * model.num_experts_per_tok


def _rows(layout: Layout, rows: float, filled: float, split: bool) -> float:
    """Bytes of a layer: what the gate and up projections give of its rows, their places, and rows that came here."""
    model, b = layout.config.model, layout.bytes
    kept = filled * (2 * model.intermediate_size * b + INDEX)
    if split:
        kept += rows * (model.hidden_size * b + INDEX + FP32)
    if layout.config.lora.rank and layout.config.lora.experts and layout.config.lora.dropout:
        kept += filled * (model.hidden_size + model.intermediate_size)  # which inputs the adapters see
    return kept
