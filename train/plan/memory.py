"""Memory of a process, kind by kind, at each moment of a step that may be its peak.

What is counted is what train/ and DeepSpeed 0.19 hold, tensor by tensor; train/plan/README.md has the equations in
words. Shape letters: see `mixtral/modeling.py`; P ranks share a layer's experts out, b is the bytes of a number.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from train.plan.blocks import Blocks
from train.plan.kept import Kept, kept_of_layer
from train.plan.layout import NF4, Layout
from train.plan.load import Skew
from train.plan.weights import Weight

FP32 = 4
BUCKET = 500_000_000
"""Elements of DeepSpeed's bucket of gradients, `reduce_bucket_size`."""
LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps whole at most, `stage3_max_live_parameters` and `stage3_max_reuse_distance`."""
PART = 2**24
"""Elements whose gradients are widened before they are used, and a parameter at the most: train/optim.py."""
PREFETCH = 50_000_000
"""Elements that ZeRO-3 fetches ahead in one piece, `stage3_prefetch_bucket_size`; a parameter is a copy out of it."""
CHUNK = 1024
"""Rows of logits that are formed at a time."""
CONTEXT = 0.6e9
"""What CUDA, cuBLAS and its workspaces take of a GPU before anything is stored."""
COMMUNICATOR = 0.3e9
"""What NCCL takes of a GPU for each group of processes that talk."""
HOLES, UNEVEN_HOLES = 0.2, 0.4
"""Size of malloc's heap over the most that lies in it at once, less 1: what lies between blocks that nothing fits into.

As malloc itself counts both (mallinfo2), over a few steps: 1.1 to 1.35 in layouts whose blocks have the same sizes in
all layers, 1.35 to 1.8 where experts are split, and each layer of each step has other numbers of rows.
"""
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
    always = {kind: Blocks(size) for kind, size in state.items()}
    kept = kept_of_layer(layout, skew)
    last = layout.config.model.num_hidden_layers - 1
    held = {
        "start": _start(layout, state),
        "loss": always | _loss(layout, kept),
        "backward, last layer": always | _backward(layout, kept, last),
        "backward, first layer": always | _backward(layout, kept, 0),
        "reduction": always | _reduction(layout),
        "step": always | _step(layout),
    }
    moments = {moment: {kind: blocks.total for kind, blocks in parts.items()} for moment, parts in held.items()}
    fitting = max(sum(blocks.fitting for blocks in parts.values()) for parts in held.values())
    heap = fitting * (1 + (UNEVEN_HOLES if layout.expert_ranks > 1 else HOLES))
    for moment, parts in moments.items():
        if layout.on_gpu:
            comes_and_goes = sum(parts[kind] for kind in parts if kind not in state)
            parts["overhead"] = CONTEXT + COMMUNICATOR * _groups(layout) + FRAGMENTS * comes_and_goes
        elif moment != "start":
            parts["overhead"] = heap - sum(blocks.small for blocks in held[moment].values())
    return Memory(moments, host, skew)


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
        "moments": layout.moment_bytes * layout.moments * owned,
    }
    host = 0.0
    if layout.on_gpu and parallel.offload_optimizer:
        host += state["masters"] + state["moments"] + (FP32 + b) * owned  # and the gradients, and a copy of the weights
        state |= {"masters": 0.0, "moments": 0.0}
    if layout.on_gpu and parallel.offload_parameters:
        host += state["weights"]
        state["weights"] = 0.0
    return state, host


def _start(layout: Layout, state: dict[str, float]) -> dict[str, Blocks]:
    """The engine is built: ZeRO-1 and 2 copy the weights of a group into one tensor, and then let go of them.

    On a GPU that is so for `BF16_Optimizer` alone: the other one does it in host memory where there is no room.
    """
    copied = max((sum(map(layout.here, group)) for group in layout.groups), default=0)
    on_device = layout.zero in (1, 2) and (not layout.on_gpu or (layout.zero == 1 and layout.bytes < FP32))
    copies = layout.bytes * copied if on_device else 0.0
    return {"weights": Blocks(state["weights"]), "communication": Blocks(max(copies, state["masters"]))}


def _loss(layout: Layout, kept: Kept) -> dict[str, Blocks]:
    """The forward pass is over, and the gradients of logits are multiplied into those of the head."""
    layers = layout.config.model.num_hidden_layers
    return {
        "gradients": _held(layout),
        "activations": kept.dense * layers + kept.last,
        "routed rows": kept.routed * layers,
        "logits": _logits(layout),
        "communication": _reserved(layout) + _gathered(layout) + _fetched_ahead(layout),
    }


def _backward(layout: Layout, kept: Kept, layer: int) -> dict[str, Blocks]:
    """The experts of a layer are differentiated: those below are still kept, of those above there are gradients."""
    there = layout.differentiated(layer)
    own = [weight for weight in there if weight.layer == layer]
    gradients = _arrived(layout, there, own)
    if layout.config.parallel.overlap_degree > 1:  # one part's are added to those of the part before
        gradients += _gradients(layout, layout.bytes, [weight for weight in own if weight.is_expert])
    return {
        "gradients": gradients,
        "activations": kept.dense * (layer + 1) + kept.dense_backward,
        "routed rows": kept.routed * (layer + 1) + kept.routed_backward,
        "communication": _reserved(layout) + _gathered(layout),
    }


def _reduction(layout: Layout) -> dict[str, Blocks]:
    """All gradients of the last pass are there, and are summed over the processes."""
    b, trained = layout.bytes, layout.trained_here
    gradients, reserved = _arrived(layout, layout.trained, []), _reserved(layout)
    several = layout.processes > 1  # or what goes to one process is one piece, which is not copied
    groups = [sum(map(layout.here, group)) for group in layout.groups]
    split = layout.expert_ranks > 1  # then each kind of parameter is summed by itself
    together = layout.longest_run if layout.zero == 3 else max(groups, default=0) if split else trained
    copied = min(together, BUCKET) if several else 0
    copies = Blocks()
    if layout.zero == 3:
        copies = Blocks.of([FP32 * copied] * (1 if layout.on_gpu else 2))  # gloo sums a copy of its own
        ends = [weight for weight in layout.weights if weight.name.startswith(("model.embed_tokens.", "lm_head."))]
        copies += _tensors(b, map(layout.here, ends))  # which are whole until the pass is over
    elif layout.zero == 2 and b < FP32:
        copies = Blocks.of([b * copied, FP32 * copied])  # the bucket, in pieces, and these in fp32
    elif layout.zero > 0 and b == FP32:
        gradients = Blocks(gradients.total)  # ZeRO-1 puts them into the bucket by now
        copies = Blocks.of([FP32 * max(copied, layout.touched)])
    return {"gradients": gradients, "communication": reserved + copies}


def _step(layout: Layout) -> dict[str, Blocks]:
    """The optimizer steps; ZeRO-1 and 2 in fp32, and ZeRO-3, hand it copies of the gradients in one piece."""
    owned = [sum(map(layout.owned, group)) for group in layout.groups]
    gradients, copies = _held(layout), Blocks()
    if layout.zero == 0 and layout.bytes == FP32:
        gradients = _arrived(layout, layout.trained, [])
    elif layout.zero == 0 and layout.processes == 1 and not gradients.total:  # widened a part at a time
        gradients = _gradients(layout, layout.bytes, layout.trained)
        largest = max(map(layout.here, layout.trained), default=0)
        copies = Blocks.of([FP32 * min(layout.trained_here, PART + largest)])
    elif layout.zero == 0:
        gradients = _gradients(layout, FP32, layout.trained)
    elif layout.zero < 3 and layout.bytes == FP32:
        gradients, copies = Blocks.of([FP32 * layout.touched]), Blocks.of([FP32 * max(owned, default=0.0)])
    elif layout.zero == 2:
        gradients = Blocks.of(FP32 * elements for elements in owned)
    elif layout.zero == 3:
        copies = Blocks.of([FP32 * max((min(elements, LIVE) for elements in owned), default=0.0)])
    reserved = _reserved(layout) if layout.zero == 3 else Blocks()
    return {"gradients": gradients, "communication": reserved + copies}


def _tensors(number: int, elements: Iterable[float]) -> Blocks:
    """Tensors of so many elements each, of numbers of so many bytes."""
    return Blocks.of(number * each for each in elements)


def _gradients(layout: Layout, number: int, weights: Iterable[Weight]) -> Blocks:
    """A gradient for each parameter that a process has, before ZeRO, of numbers of so many bytes."""
    return _tensors(number, map(layout.here, weights))


def _held(layout: Layout) -> Blocks:
    """Gradients that are there between passes: buckets and partitions, which are there for good, and accumulators."""
    b = layout.bytes
    accumulates = layout.config.train.gradient_accumulation_steps > 1
    if layout.zero == 0:
        if layout.processes > 1 and b == FP32:  # DistributedDataParallel's buckets
            return Blocks(FP32 * layout.trained_here)
        return _gradients(layout, FP32, layout.trained) if accumulates else Blocks()
    if layout.zero == 1 and b < FP32:  # BF16_Optimizer: accumulators of all, and gradients that are never let go of
        return Blocks((FP32 + b) * layout.trained_here)
    if layout.zero == 1:
        return _gradients(layout, FP32, layout.trained) if accumulates else Blocks()
    if layout.on_gpu and layout.config.parallel.offload_optimizer:
        return Blocks()
    if layout.zero == 2 and not accumulates:
        return Blocks()
    if layout.zero == 2 and b == FP32:
        return Blocks.of([FP32 * layout.touched])
    return Blocks(FP32 * layout.trained_owned)


def _arrived(layout: Layout, arrived: list[Weight], new: list[Weight]) -> Blocks:
    """Gradients when those of some parameters have been computed, the newest ones not yet put away."""
    b, held = layout.bytes, _held(layout)
    if layout.zero == 0 and b < FP32 and (held.total or layout.processes > 1):  # masters take each up as it comes
        return (held if held.total else _gradients(layout, FP32, arrived)) + _gradients(layout, b, new)
    if layout.zero < 2:
        return held + _gradients(layout, b, new if held.total else arrived)
    number, elements = FP32 if layout.zero == 3 else b, sum(map(layout.here, arrived))
    in_bucket = 0 if layout.on_gpu or layout.zero == 3 else number * min(elements, BUCKET)
    put_away = Blocks()
    if layout.zero == 2 and not held.total and elements > BUCKET:  # a bucket was full, and summed
        put_away = Blocks.of([FP32 * layout.touched]) if b == FP32 else Blocks(FP32 * layout.trained_owned)
    return held + Blocks(in_bucket) + put_away + _gradients(layout, b, new)


def _reserved(layout: Layout) -> Blocks:
    """DeepSpeed's bucket for gradients, where it is not only what is written into it that takes memory.

    On a processor that is the case at stage 3 alone, which keeps one bucket for ever.
    """
    if layout.zero == 0 or (layout.zero == 1 and layout.bytes < FP32):
        return Blocks()
    if layout.zero == 3:
        return Blocks(FP32 * (BUCKET if layout.on_gpu else min(layout.longest_run, BUCKET)))
    return Blocks(layout.bytes * BUCKET if layout.on_gpu else 0.0)


def _gathered(layout: Layout) -> Blocks:
    """The weights that ZeRO-3 has brought together: what it may keep, and at least what it computes with."""
    apart = _apart(layout)
    module = sum(layout.here(weight) for weight in apart if "layers.0.mlp.experts." in weight.name)
    elements = sum(map(layout.here, apart))
    share = min(elements, max(LIVE, module)) / elements if elements else 0.0
    return _tensors(layout.bytes, map(layout.here, apart)) * share


def _fetched_ahead(layout: Layout) -> Blocks:
    """The piece that weights at the end of the forward pass came in, which is there until the last of them is used."""
    return Blocks.of([layout.bytes * min(PREFETCH, sum(map(layout.here, _apart(layout))))])


def _apart(layout: Layout) -> list[Weight]:
    """The weights that ZeRO-3 leaves in parts on several processes."""
    if layout.zero < 3:
        return []
    small = layout.config.parallel.persistent_elements
    return [weight for weight in layout.weights if layout.here(weight) >= small and layout.replicas([weight]) > 1]


def _logits(layout: Layout) -> Blocks:
    """A chunk of logits, the head's gradient, and a product on its way into it."""
    if layout.is_classifier:
        return Blocks()
    model, b = layout.config.model, layout.bytes
    rows, head = min(CHUNK, layout.tokens), model.vocab_size * model.hidden_size
    trained = layout.trains("lm_head.weight") or (model.tie_word_embeddings and layout.trains("embed_tokens"))
    wide = [rows * model.vocab_size * FP32] * 2 if layout.on_gpu else []  # of a processor's only a few rows at a time
    held = [rows * model.vocab_size * b, *wide]
    held += [FP32 * head, b * head] if trained else []  # the product of a chunk to the sum, which is rounded later
    return Blocks.of(held) + Blocks.of([b * layout.tokens * model.hidden_size])
