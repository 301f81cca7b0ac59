"""What one layer keeps for its backward pass, tensor by tensor, and what comes and goes while it is differentiated.

It mirrors mixtral/modeling.py, mixtral/ops/experts.py and train/parallel/expert.py. Shape letters: see
`mixtral/modeling.py`; b is the bytes of a number, R the rows that a process's experts take.
"""

from typing import NamedTuple

from train.plan.blocks import Blocks
from train.plan.layout import Layout
from train.plan.load import Skew

FP32, INDEX = 4, 8
BLOCK = 32
"""The rows of an expert are filled up to a multiple of this: mixtral/ops/experts.py."""


class Kept(NamedTuple):
    """Tensors of one layer on the process with the most rows.

    Attributes:
        dense: kept of every token: norms, attention, residuals.
        routed: kept of every row of its experts.
        last: kept by the last norm.
        dense_backward, routed_backward: that come and go when the experts are differentiated.
    """

    dense: Blocks
    routed: Blocks
    last: Blocks
    dense_backward: Blocks
    routed_backward: Blocks


def kept_of_layer(layout: Layout, skew: Skew) -> Kept:
    """Counts what a layer keeps."""
    config, b, tokens = layout.config, layout.bytes, layout.tokens
    hidden = config.model.hidden_size
    sent = tokens * config.model.num_experts_per_tok
    held = config.model.num_local_experts // layout.expert_ranks
    split = layout.expert_ranks > 1
    parts = _norm(layout, 0) + _norm(layout, 1) + _attention(layout) + _router(layout)
    dense = Blocks.of(tokens * part for part in parts)
    rows = sent * skew.mean
    routed = Blocks.of(_rows(layout, rows, rows + held * BLOCK / 2, split))
    dense_backward = Blocks.of([b * tokens * hidden] * 2)  # gradients of the layer's output, and of the residual beside
    routed_backward = Blocks.of(_rows_backward(layout, skew))
    if config.train.recompute == "layers":  # of a layer only the input is kept; when its turn comes, all of it is there
        dense_backward, routed_backward = dense_backward + dense, routed_backward + routed
        dense, routed = Blocks.of([b * tokens * hidden]), Blocks()
    return Kept(
        dense=dense,
        routed=routed,
        last=Blocks.of(tokens * part for part in _norm(layout, 2)),
        dense_backward=dense_backward,
        routed_backward=routed_backward,
    )


def _norm(layout: Layout, which: int) -> list[float]:
    """Bytes of a token: the input, its scale, and the output where it is wanted."""
    hidden, b = layout.config.model.hidden_size, layout.bytes
    outputs: list[list[float]] = [_outputs_of_first_norm(layout), _outputs_of_second_norm(layout), [b * hidden]]
    return [b * hidden, FP32, *outputs[which]]


def _outputs_of_first_norm(layout: Layout) -> list[float]:
    """Bytes of a token: the projections' input, once, or as each adapter's dropout leaves it, with what it drops."""
    hidden, b = layout.config.model.hidden_size, layout.bytes
    into = ("q_proj", "k_proj", "v_proj")
    shared: list[float] = [b * hidden] if layout.trains(*(f"{name}.weight" for name in into)) else []
    adapted = [name for name in layout.adapted if name in into]
    if layout.config.lora.dropout:
        return shared + _dropped(layout, hidden) * len(adapted)
    return [b * hidden] if adapted else shared


def _outputs_of_second_norm(layout: Layout) -> list[float]:
    """Bytes of a token: what the router and experts that are here take, and what an adapter of the router takes."""
    hidden, b = layout.config.model.hidden_size, layout.bytes
    taken: list[float] = [b * hidden] if layout.expert_ranks == 1 or layout.trains("mlp.gate.") else []
    adapter: list[float] = [FP32 * hidden] if "gate" in layout.adapted and b < FP32 else []
    return taken + adapter


def _attention(layout: Layout) -> list[float]:
    """Bytes of a token: rotated queries, keys, values, the output and its normaliser, and the mask or probabilities."""
    model, b = layout.config.model, layout.bytes
    length = layout.config.data.sequence_length
    queries, keys = model.num_attention_heads * layout.head_dim, model.num_key_value_heads * layout.head_dim
    backend = model.attn_implementation
    repeated = backend in ("sdpa", "eager")  # which take as many key and value heads as query heads beside a mask
    heads = queries if repeated else keys
    kept: list[float] = [b * queries, b * heads, b * heads]
    adapted = "o_proj" in layout.adapted and not layout.config.lora.dropout
    if backend != "tiled":
        kept += [b * queries, FP32 * model.num_attention_heads]
    elif adapted or layout.trains("o_proj.weight"):
        kept.append(b * queries)
    if backend == "sdpa":
        kept.append(b * length)  # the mask of a row, in numbers
    elif backend == "eager":
        kept.append(model.num_attention_heads * length * (FP32 + (b if b < FP32 else 0)))
    if "o_proj" in layout.adapted and layout.config.lora.dropout:
        kept += _dropped(layout, queries)
    return kept


def _dropped(layout: Layout, width: int) -> list[float]:
    """Bytes of a token: an adapter's input as dropout leaves it, and what it drops."""
    return [width * layout.bytes, width * (1 if layout.on_gpu else layout.bytes)]


def _router(layout: Layout) -> list[float]:
    """Bytes of a token: logits, their softmax, what was chosen, and what the losses keep."""
    model = layout.config.model
    return [*[FP32 * model.num_local_experts] * 6, (INDEX + 2 * FP32) * model.num_experts_per_tok]


def _rows(layout: Layout, rows: float, filled: float, split: bool) -> list[float]:
    """Bytes of a layer: what gate and up projections give of its rows, where these belong, and rows that came here."""
    model, b = layout.config.model, layout.bytes
    kept = [filled * 2 * model.intermediate_size * b, filled * (2 * INDEX + FP32)]
    if split:
        kept += [rows * model.hidden_size * b, rows * (INDEX + FP32)]
    if layout.config.lora.rank and layout.config.lora.experts and layout.config.lora.dropout:
        kept += [filled * model.hidden_size, filled * model.intermediate_size]  # which inputs the adapters see
    return kept


def _rows_backward(layout: Layout, skew: Skew) -> list[float]:
    """Bytes of a layer: gradients of its rows, with those of the fullest expert's gate, up and what is between."""
    model, b = layout.config.model, layout.bytes
    hidden, inner = model.hidden_size, model.intermediate_size
    sent = layout.tokens * model.num_experts_per_tok
    rows, experts = sent * skew.layer, model.num_local_experts // layout.expert_ranks
    each = layout.expert_ranks * sent / model.num_local_experts * skew.expert  # from all ranks of the group
    found = [b * (rows + experts * BLOCK / 2) * hidden, b * rows * hidden]
    found += [b * each * width for width in (inner, inner, inner, 2 * inner, hidden, hidden)]
    if layout.expert_ranks > 1:
        found.append(b * rows * hidden)  # the gradient that arrived
    if layout.config.lora.quantize == "nf4":
        found.append(b * 2 * inner * hidden)  # the matrix that is made of its four bits, one at a time
    return found
