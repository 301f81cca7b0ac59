"""Memory of a process, kind by kind, at each moment of a step that may be its peak.

What is counted is what train/ and DeepSpeed 0.19 hold, tensor by tensor; train/plan/README.md has the equations in
words. Shape letters: see `mixtral/modeling.py`; P ranks share a layer's experts out, b is the bytes of a number.
"""

from dataclasses import dataclass, field

from train.plan.kept import Kept, kept_of_layer
from train.plan.layout import NF4, Layout
from train.plan.load import Skew

FP32 = 4
BUCKET = 500_000_000
"""Elements of DeepSpeed's bucket of gradients, `reduce_bucket_size`."""
LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps whole at most, `stage3_max_live_parameters` and `stage3_max_reuse_distance`."""
CHUNK = 1024
"""Rows of logits that are formed at a time."""
CONTEXT = 0.6e9
"""What CUDA, cuBLAS and its workspaces take of a GPU before anything is stored."""
COMMUNICATOR = 0.3e9
"""What NCCL takes of a GPU for each group of processes that talk."""
MAPPED = 32 * 2**20
"""glibc's malloc gives blocks of so many bytes back when they are freed; of smaller ones hardly any, between others."""
HOLES = 0.2
"""Share of these at their most that lies in holes between others which nothing fits into."""
FRAGMENTS = 0.05
"""Share of what comes and goes that torch's caching allocator holds in pieces nobody can use."""

KINDS = (
    *("weights", "gradients", "masters", "moments", "activations", "routed rows", "logits", "communication"),
    "overhead",
)


@dataclass(frozen=True)
class Memory:
    """What the process with the most rows holds.

    Attributes:
        moments: bytes of each kind at each moment.
        host: bytes in host memory that offloading puts there.
    """

    moments: dict[str, dict[str, float]]
    host: float = 0.0
    skew: Skew = field(default_factory=Skew)

    @property
    def moment(self) -> str:
        """When it is most."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Bytes of each kind then."""
        return self.moments[self.moment]

    @property
    def peak(self) -> float:
        """Bytes in all then."""
        return sum(self.parts.values())


def memory_of(layout: Layout, skew: Skew) -> Memory:
    """Computes the memory of the process that takes the most rows.

    Args:
        layout: of the run.
        skew: how many rows those are.
    """
    state, host = _state(layout)
    kept = kept_of_layer(layout, skew)
    moments = {
        "start": _start(layout, state),
        "loss": _loss(layout, state, kept),
        "backward, last layer": _backward(layout, state, kept, layers=layout.config.model.num_hidden_layers),
        "backward, first layer": _backward(layout, state, kept, layers=1),
        "reduction": _reduction(layout, state),
        "step": _step(layout, state),
    }
    in_heap = {moment: _in_heap(layout, parts, kept) for moment, parts in moments.items()}
    for moment, parts in moments.items():
        if layout.on_gpu:
            comes_and_goes = sum(parts[kind] for kind in parts if kind not in state)
            parts["overhead"] = CONTEXT + COMMUNICATOR * _groups(layout) + FRAGMENTS * comes_and_goes
        elif moment != "start":  # what was the most is there for good
            parts["overhead"] = (1 + HOLES) * max(in_heap.values()) - in_heap[moment]
    return Memory(moments, host, skew)


def _in_heap(layout: Layout, parts: dict[str, float], kept: Kept) -> float:
    """Bytes of what comes and goes in blocks so small that the C library never gives their memory back."""
    model, b = layout.config.model, layout.bytes
    blocks = {
        "activations": b * layout.tokens * model.hidden_size,
        "routed rows": kept.block,
        "logits": FP32 * model.hidden_size * model.vocab_size,
    }
    return sum(parts.get(kind, 0.0) for kind, block in blocks.items() if block < MAPPED)


def _groups(layout: Layout) -> int:
    return 0 if layout.processes == 1 else 1 if layout.expert_ranks == 1 else 3


def _state(layout: Layout) -> tuple[dict[str, float], float]:
    """What is held all the time: weights, masters and moments; and what of it is in host memory instead."""
    parallel, b = layout.config.parallel, layout.bytes
    owned = layout.trained_owned
    weights = sum((NF4 if layout.is_quantized(weight) else b) * layout.held(weight) for weight in layout.weights)
    has_masters = layout.zero > 0 or b < FP32
    state = {
        "weights": weights,
        "masters": FP32 * owned if has_masters else 0.0,
        "moments": FP32 * layout.moments * owned,
    }
    host = 0.0
    if layout.on_gpu and parallel.offload_optimizer:
        host += state["masters"] + state["moments"] + (FP32 + b) * owned  # and the gradients, and a copy of the weights
        state |= {"masters": 0.0, "moments": 0.0}
    if layout.on_gpu and parallel.offload_parameters:
        host += state["weights"]
        state["weights"] = 0.0
    return state, host


def _start(layout: Layout, state: dict[str, float]) -> dict[str, float]:
    """The engine is built: ZeRO-1 and 2 copy the weights of a group into one tensor, and then let go of them.

    On a GPU that is so for `BF16_Optimizer` alone: the other one does it in host memory where there is no room.
    """
    copied = max((sum(map(layout.here, group)) for group in layout.groups), default=0)
    on_device = layout.zero in (1, 2) and (not layout.on_gpu or (layout.zero == 1 and layout.bytes < FP32))
    copies = layout.bytes * copied if on_device else 0.0
    return {"weights": state["weights"], "communication": max(copies, state["masters"])}


def _loss(layout: Layout, state: dict[str, float], kept: Kept) -> dict[str, float]:
    """The forward pass is over, and the gradients of logits are multiplied into those of the head."""
    layers = layout.config.model.num_hidden_layers
    return state | {
        "gradients": _held(layout),
        "activations": kept.dense * layers + kept.last,
        "routed rows": kept.routed * layers,
        "logits": _logits(layout),
        "communication": _reserved(layout) + _gathered(layout),
    }


def _backward(layout: Layout, state: dict[str, float], kept: Kept, layers: int) -> dict[str, float]:
    """The experts of a layer are differentiated: so many layers are still kept, of the others there are gradients."""
    done = layout.trained_of_layers[layers - 1 :]
    new = done[0][0]
    arrived = layout.trained_above + sum(map(sum, done)) - done[0][1]  # attention comes after the experts
    return state | {
        "gradients": _arrived(layout, arrived, new),
        "activations": kept.dense * layers + kept.dense_backward,
        "routed rows": kept.routed * layers + kept.routed_backward,
        "logits": 0.0,
        "communication": _reserved(layout) + _gathered(layout),
    }


def _reduction(layout: Layout, state: dict[str, float]) -> dict[str, float]:
    """All gradients of the last pass are there, and are summed over the processes."""
    b, trained = layout.bytes, layout.trained_here
    parts = state | {"gradients": _arrived(layout, trained, 0), "communication": _reserved(layout)}
    if layout.zero == 0 or (layout.zero == 1 and b < FP32):
        return parts
    several = layout.processes > 1  # or what goes to one process is one piece, which is not copied
    groups = [sum(map(layout.here, group)) for group in layout.groups]
    split = layout.expert_ranks > 1  # then each kind of parameter is summed by itself
    copied = min(max(groups, default=0) if split else trained, BUCKET) if several else 0
    if layout.zero == 3:
        parts["communication"] += FP32 * copied * (1 if layout.on_gpu else 2)  # gloo sums a copy of its own
        ends = [weight for weight in layout.weights if weight.name.startswith(("model.embed_tokens.", "lm_head."))]
        parts["communication"] += b * sum(map(layout.here, ends))  # which are whole until the pass is over
    elif b < FP32:
        parts["communication"] += (b + FP32) * copied  # the bucket, in pieces, and these in fp32
    else:
        parts["communication"] += max(FP32 * copied, FP32 * layout.touched)
    return parts


def _step(layout: Layout, state: dict[str, float]) -> dict[str, float]:
    """The optimizer steps; ZeRO-1 and 2 in fp32, and ZeRO-3, hand it copies of the gradients in one piece."""
    owned = [sum(map(layout.owned, group)) for group in layout.groups]
    gradients, copies = _held(layout), 0.0
    if layout.zero == 0 and layout.bytes == FP32:
        gradients = _arrived(layout, layout.trained_here, 0)
    elif layout.zero == 0:
        gradients = FP32 * layout.trained_here + (gradients if layout.processes > 1 else 0)
    elif layout.zero < 3 and layout.bytes == FP32:
        gradients, copies = FP32 * layout.touched, FP32 * max(owned, default=0.0)
    elif layout.zero == 2:
        gradients = FP32 * sum(owned)
    elif layout.zero == 3:
        copies = FP32 * max((min(elements, LIVE) for elements in owned), default=0.0)
    return state | {"gradients": gradients, "communication": _reserved(layout) * (layout.zero == 3) + copies}


def _held(layout: Layout) -> float:
    """Bytes of gradients that are there between passes: buckets, partitions, accumulators."""
    b, trained = layout.bytes, layout.trained_here
    accumulates = layout.config.train.gradient_accumulation_steps > 1
    if layout.zero == 0:
        buckets = b * trained if layout.processes > 1 else 0  # DistributedDataParallel's
        return buckets + (FP32 * trained if accumulates and (b < FP32 or not buckets) else 0)
    if layout.zero == 1 and b < FP32:
        return (FP32 + b) * trained  # BF16_Optimizer: accumulators of all, and gradients that are never let go of
    if layout.zero == 1:
        return FP32 * trained if accumulates else 0.0
    if layout.on_gpu and layout.config.parallel.offload_optimizer:
        return 0.0
    if layout.zero == 2 and not accumulates:
        return 0.0
    return FP32 * (layout.touched if layout.zero == 2 and b == FP32 else layout.trained_owned)


def _arrived(layout: Layout, arrived: int, new: int) -> float:
    """Bytes of gradients when those of so many elements have been computed, the newest ones not yet put away."""
    b, held = layout.bytes, _held(layout)
    if layout.zero < 2:
        return held + b * (new if held else arrived)
    number = FP32 if layout.zero == 3 else b
    in_bucket = 0 if layout.on_gpu or layout.zero == 3 else number * min(arrived, BUCKET)
    put_away = 0.0
    if layout.zero == 2 and not held and arrived > BUCKET:  # a bucket was full, and summed
        put_away = FP32 * (layout.touched if b == FP32 else layout.trained_owned)
    return held + in_bucket + put_away + b * new


def _reserved(layout: Layout) -> float:
    """Bytes of DeepSpeed's bucket for gradients, where it is not only what is written into it that takes memory.

    On a processor that is the case at stage 3 alone, which keeps one bucket for ever.
    """
    if layout.zero == 0 or (layout.zero == 1 and layout.bytes < FP32):
        return 0.0
    if layout.zero == 3:
        return FP32 * (BUCKET if layout.on_gpu else min(layout.trained_here, BUCKET))
    return layout.bytes * BUCKET if layout.on_gpu else 0.0


def _gathered(layout: Layout) -> float:
    """Bytes of the weights that ZeRO-3 has brought together: what it may keep, and at least what it computes with."""
    if layout.zero < 3:
        return 0.0
    small = layout.config.parallel.persistent_elements
    apart = [weight for weight in layout.weights if layout.here(weight) >= small and layout.replicas([weight]) > 1]
    module = sum(layout.here(weight) for weight in apart if "layers.0.mlp.experts." in weight.name)
    return layout.bytes * min(sum(map(layout.here, apart)), max(LIVE, module))


def _logits(layout: Layout) -> float:
    """Bytes of a chunk of logits, of the head's gradient, and of a product on its way into it."""
    if layout.is_classifier:
        return 0.0
    model, b = layout.config.model, layout.bytes
    rows, head = min(CHUNK, layout.tokens), model.vocab_size * model.hidden_size
    trained = layout.trains("lm_head.weight") or (model.tie_word_embeddings and layout.trains("embed_tokens"))
    wide = rows * model.vocab_size * 2 * FP32 if layout.on_gpu else 0  # of a processor's only a few rows at a time
    chunk = rows * model.vocab_size * b + wide
    adding = chunk + ((FP32 + b) * head if trained else 0)  # the product of a chunk to the sum
    scaling = (2 * FP32 + (b if b < FP32 else 0)) * head if trained else 0  # the sum, then rounding it
    return max(adding, scaling) + b * layout.tokens * model.hidden_size
