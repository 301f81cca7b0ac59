"""Time of an optimizer step, part by part, by what each part computes, moves or sends; train/plan/README.md says why.

Shape letters: see `mixtral/modeling.py`; P ranks share a layer's experts out, b is the bytes of a number.
"""

from dataclasses import dataclass

from train.plan.hardware import Device
from train.plan.kept import FP32
from train.plan.layout import NF4, Layout
from train.plan.load import Skew

BACKWARD = 2  # a product's gradients are two products: that of its input, and that of its weight
ATTENTION_BACKWARD = 2.5  # the probabilities are computed again
ADAM_BYTES = 28  # of an element: four fp32 numbers are read, three written
WIDENED_BYTES = 24  # both moments are read in bf16 and written in fp32, and then the other way round
NORM_BYTES = 8  # its gradient is read for the norm, and again to be scaled
LAUNCHES = 80  # kernels of a layer forward, its experts aside
EXPERT_LAUNCHES = 12  # kernels of one expert forward


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step on the process with the most rows.

    Attributes:
        parts: of each part.
        hidden: of communication that takes place while others compute; it is in no part.
        tokens: of all processes.
        flops: of the step by the PaLM convention, over all processes.
    """

    parts: dict[str, float]
    hidden: float
    tokens: int
    flops: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Over all processes."""
        return self.tokens / self.seconds

    def mfu(self, device: Device, layout: Layout) -> float:
        """The share of all devices' peak that the model's own work is."""
        return self.flops / self.seconds / layout.processes / device.peak(layout.config.train.precision)


def flops_per_token(layout: Layout) -> int:
    """Floating-point operations of a token, as `MixtralConfig.training_flops_per_token` counts them."""
    model, data = layout.config.model, layout.config.data
    share = model.num_experts_per_tok / model.num_local_experts
    matrices: int = 0 if layout.is_classifier or not model.tie_word_embeddings else model.vocab_size * model.hidden_size
    for weight in layout.weights:
        if weight.is_matrix and "lora_" not in weight.name and "embed_tokens" not in weight.name:
            matrices += round(weight.elements * (share if weight.is_expert else 1))
    seen = min(data.sequence_length, model.sliding_window or data.sequence_length)
    return 6 * matrices + 12 * model.num_hidden_layers * model.num_attention_heads * layout.head_dim * seen


def step_of(layout: Layout, device: Device, skew: Skew) -> Step:
    """Computes the time of a step.

    Args:
        layout: of the run.
        device: that each process has.
        skew: rows of the rank with the most; the others wait for it in every layer.
    """
    passes = layout.config.train.gradient_accumulation_steps
    parts = {name: passes * seconds for name, seconds in compute(layout, device, skew).items()}
    travel, computing, hidden = passes * all_to_all(layout, device, skew), sum(parts.values()), 0.0
    if device.is_gpu:  # the first part goes out, and the last one comes back, while nothing is computed
        hidden = (1 - 1 / layout.config.parallel.overlap_degree) * min(travel, parts["experts"])
    parts["all-to-all"] = travel - hidden
    reduced, gathered = zero_traffic(layout, device)
    parts["ZeRO traffic"] = reduced + gathered
    if layout.zero in (0, 3) and device.is_gpu:  # at 3 behind all that is computed; else behind the last pass backward
        behind = min(reduced + gathered, computing - hidden if layout.zero == 3 else 2 / 3 * computing / passes)
        parts["ZeRO traffic"] -= behind
        hidden += behind
    parts["gradients"] = gradients(layout, device)
    parts["optimizer"], parts["offload"] = optimizer(layout, device)
    return Step(parts, hidden, layout.tokens_of_step, flops_per_token(layout) * layout.tokens_of_step)


def compute(layout: Layout, device: Device, skew: Skew) -> dict[str, float]:
    """Seconds of one forward and backward pass, without what is sent."""
    model, config = layout.config.model, layout.config
    peak, share, layers = device.peak(config.train.precision), device.efficiency, model.num_hidden_layers
    tokens, hidden = layout.tokens, model.hidden_size
    queries, keys = model.num_attention_heads * layout.head_dim, model.num_key_value_heads * layout.head_dim
    rows = tokens * model.num_experts_per_tok * skew.layer
    again = 1 if config.train.recompute == "layers" else 0  # passes forward besides the first
    projections = 2 * tokens * hidden * 2 * (queries + keys) * (again + _passes(layout, "_proj.weight"))
    core = 4 * tokens * _visible(layout, device) * queries * (1 + again + ATTENTION_BACKWARD)
    experts = 2 * rows * 3 * hidden * model.intermediate_size * (again + _passes(layout, ".experts.gate_up_proj"))
    if config.lora.rank and config.lora.experts:
        experts += 2 * rows * config.lora.rank * 3 * (hidden + model.intermediate_size) * (1 + again + BACKWARD)
    head = 0.0
    if not layout.is_classifier:
        head = 2 * tokens * hidden * model.vocab_size * _passes(layout, "lm_head.weight", "embed_tokens")
    found = {
        "attention": layers * (projections / share.matrices + core / share.attention) / peak,
        "experts": layers * experts / share.experts / peak,
        "logits": head / share.matrices / peak,
        "elementwise": (_moved(layout, rows, 1 + again + BACKWARD) + (2 + again) * _made(layout))
        / share.memory
        / device.bandwidth,
    }
    of_experts = EXPERT_LAUNCHES * config.parallel.overlap_degree * model.num_local_experts / layout.expert_ranks
    started = layers * (1 + again + BACKWARD) * share.launch * (LAUNCHES + of_experts)
    if device.is_gpu:  # which computes what was launched before, meanwhile
        started = max(0.0, started - sum(found.values()))
        crowd = 1.0
    else:  # processes beyond one for each group of cores wait for each other
        crowd = max(1.0, layout.processes / device.per_host)
    return {name: crowd * seconds for name, seconds in (found | {"launches": started}).items()}


def _visible(layout: Layout, device: Device) -> float:
    """Keys that a query is multiplied with, in time of SDPA: masked blocks are computed, or not.

    Tiles skip them too, but their products are as much slower than SDPA's, in bf16 on a processor aside.
    """
    model, length = layout.config.model, layout.config.data.sequence_length
    seen = min(length, model.sliding_window or length)
    pays = not device.is_gpu and layout.config.train.precision == "bf16"
    if model.attn_implementation in ("windowed", "flash_attention_2") or (
        model.attn_implementation == "tiled" and pays
    ):
        return min(length / 2, seen)
    return seen if model.attn_implementation == "tiled" else length


def _passes(layout: Layout, *names: str) -> int:
    """Products for each one of a forward pass: those of the weights' gradients only where they are trained."""
    return 1 + (BACKWARD if layout.trains(*names) else 1)


def _moved(layout: Layout, rows: float, passes: int) -> float:
    """Bytes that elementwise work reads and writes: norms, rotation, residuals; gathers, SwiGLU; softmax."""
    model, b, tokens = layout.config.model, layout.bytes, layout.tokens
    hidden, inner = model.hidden_size, model.intermediate_size
    heads = (model.num_attention_heads + model.num_key_value_heads) * layout.head_dim
    dense = tokens * (2 * (2 * FP32 + 3 * b) * hidden + 6 * b * heads + 6 * b * hidden)
    routed = rows * (b * (4 * hidden + 3 * inner) + FP32 * hidden)
    logits = 0.0 if layout.is_classifier else tokens * model.vocab_size * (4 * FP32 + b)
    return model.num_hidden_layers * passes * (dense + routed) + logits


def _made(layout: Layout) -> float:
    """Bytes of a pass in which weights are made of their four bits: these are read, the weights written."""
    parts = layout.config.parallel.overlap_degree
    made = [weight for weight in layout.weights if layout.is_quantized(weight)]
    return (NF4 + layout.bytes) * sum(layout.here(weight) * (parts if weight.is_expert else 1) for weight in made)


def link(layout: Layout, device: Device, ranks: int, stride: int) -> float:
    """Bytes/s that a process sends in a group of so many, so far apart; a group across hosts is as slow as these."""
    across = device.is_gpu and layout.processes > device.per_host and ranks * stride > device.per_host
    return device.efficiency.network * (device.between if across else device.inside)


def all_to_all(layout: Layout, device: Device, skew: Skew) -> float:
    """Seconds that rows travel in a pass: there and back, forward and backward.

    Recomputing stops where nothing more is wanted, before the rows come back; with overlap it does not.
    """
    ranks, model = layout.expert_ranks, layout.config.model
    if ranks == 1:
        return 0.0
    rows = layout.tokens * model.num_experts_per_tok * skew.layer * (1 - 1 / ranks)
    again = 1 if layout.config.parallel.overlap_degree == 1 else 2
    times = 4 + (again if layout.config.train.recompute == "layers" else 0)
    sent = times * model.num_hidden_layers * rows * model.hidden_size * layout.bytes
    return sent / link(layout, device, ranks, 1)


def zero_traffic(layout: Layout, device: Device) -> tuple[float, float]:
    """Seconds of a step in which gradients are summed, and in which weights are brought together."""
    passes, reduced, gathered = layout.config.train.gradient_accumulation_steps, 0.0, 0.0
    for experts in (False, True):
        apart = experts and layout.expert_ranks > 1
        ranks = layout.processes // layout.expert_ranks if apart else layout.processes
        if ranks == 1:
            continue
        speed = link(layout, device, ranks, layout.expert_ranks if apart else 1)
        chosen = [weight for weight in layout.weights if weight.is_expert == experts]
        trained = sum(layout.here(weight) for weight in chosen if weight.trained)
        once = (ranks - 1) / ranks / speed  # a byte from every process to one, or from one to every
        times = passes if layout.zero >= 2 else 1
        reduced += times * FP32 * trained * once * (1 if layout.zero == 3 else 2)
        if layout.zero == 3:
            gathered += 2 * passes * layout.bytes * sum(map(layout.here, chosen)) * once
        elif layout.zero:
            gathered += layout.bytes * trained * once
    return reduced, gathered


def gradients(layout: Layout, device: Device) -> float:
    """Seconds of a step in which gradients are copied within a process, each copy being read and written.

    DeepSpeed copies them into its bucket, divides that, and takes it into pieces to be summed; then it copies what a
    process owns out of it, twice, and takes its norm in fp64. DistributedDataParallel copies them into buckets once,
    and `MasterWeights` to fp32. Those of the parts that `parallel.overlap_degree` makes are added up before.
    """
    passes, several = layout.config.train.gradient_accumulation_steps, layout.processes > 1
    parts = layout.config.parallel.overlap_degree
    added = 3 * layout.bytes * sum(layout.here(weight) for weight in layout.trained if weight.is_expert)
    copies = {0: 2 if several else 0, 1: 2 + several, 2: 2 + several, 3: 2 + 2 * several}[layout.zero]
    once = 2 * FP32 * copies * layout.trained_here + (2 * 2 * FP32 + 12) * layout.trained_owned * (layout.zero > 0)
    crowd = 1.0 if device.is_gpu else max(1.0, layout.processes / device.per_host)
    moved = (passes if layout.zero > 1 else 1) * once + passes * (parts - 1) * added
    return crowd * moved / (device.efficiency.memory * device.bandwidth)


def optimizer(layout: Layout, device: Device) -> tuple[float, float]:
    """Seconds of the update, and of what travels to and from host memory."""
    owned, moments = layout.trained_owned, layout.moments
    update = ADAM_BYTES * (1 + moments) / 3 + (WIDENED_BYTES if layout.config.optim.moments == "bf16" else 0)
    moved = (NORM_BYTES + update + layout.bytes) * owned
    if not (device.is_gpu and layout.config.parallel.offload_optimizer):
        crowd = 1.0 if device.is_gpu else max(1.0, layout.processes / device.per_host)
        return crowd * moved / (device.efficiency.update * device.bandwidth), _offloaded_weights(layout, device)
    travels = (FP32 + layout.bytes) * owned / (device.efficiency.network * device.host)
    return moved / HOST_BANDWIDTH, travels + _offloaded_weights(layout, device)


HOST_BANDWIDTH = 25e9
"""Bytes/s of host memory that one device's process gets: eight channels of DDR5 of two sockets, shared by eight."""


def _offloaded_weights(layout: Layout, device: Device) -> float:
    if not (device.is_gpu and layout.config.parallel.offload_parameters):
        return 0.0
    passes = layout.config.train.gradient_accumulation_steps
    mine = layout.bytes * layout.count.total / layout.processes
    return 2 * passes * mine / (device.efficiency.network * device.host)
