"""What the planner's arithmetic says of published runs, beside what was published.

usage: python -m bench.published

The trainer here has no tensor or pipeline parallelism. What others did with it is composed of the planner's own parts:
the compute of a pass, with the efficiencies of conf/hardware.yaml, and bytes over bandwidths. No number is fitted to a
row; where a source leaves something open, `assumed` says what was taken.
"""

from typing import Any, NamedTuple

from train.plan.hardware import Device, Efficiency, device_of, table
from train.plan.kept import kept_of_layer
from train.plan.layout import Layout
from train.plan.load import Skew
from train.plan.seconds import compute, flops_per_token
from train.plan.verb import compose_plan

V5P: dict[str, Any] = {
    "memory": 95e9,
    "bf16": 459e12,
    "fp32": 459e12 / 8,
    "fp8": None,
    "bandwidth": 2.765e12,
    "inside": 300e9,
    "between": 300e9,
    "host": 32e9,
    "per_host": 256,
    "host_memory": 112e9,
    "source": "Google Cloud TPU v5p page: 4,800 Gb/s between chips, in both directions together",
}


class Mapping(NamedTuple):
    """How a run shares the work out.

    Attributes:
        devices: in all.
        rows: of a step, over all devices.
        length: tokens of a row.
        tensor, expert, pipeline: degrees.
        expert_tensor: devices that share each expert's matrices.
        stages: virtual ones of a device, which interleave.
        sharded: whether weights are brought together for each pass and gradients shared out, in fp32, beside computing.
        micro: rows of a pass.
        one_at_a_time: whether devices wait for each other, as layers that lie on several without a pipeline do.
    """

    devices: int
    rows: int
    length: int = 4096
    tensor: int = 1
    expert: int = 1
    pipeline: int = 1
    expert_tensor: int = 1
    stages: int = 1
    sharded: bool = False
    micro: int = 1
    one_at_a_time: bool = False


class Published(NamedTuple):
    """A published figure, the mapping it came from, and what its source leaves open."""

    name: str
    model: str
    gpu: str
    mapping: Mapping
    mfu: float
    assumed: str


FOLDED = Mapping(128, 256, tensor=2, expert=8, pipeline=8, stages=7)
ROWS = (
    Published("Megatron-Core, folded", "mixtral_8x22b", "h100-80g", FOLDED, 0.493, "a layer a virtual stage"),
    Published("the same, 1024 rows a step", "mixtral_8x22b", "h100-80g", FOLDED._replace(rows=1024), 0.522, "the same"),
    Published(
        "FSDP", "mixtral_8x22b", "h100-80g", Mapping(128, 256, sharded=True), 0.043, "a row a pass, sums in fp32"
    ),
    Published(
        "FSDP + EP", "mixtral_8x22b", "h100-80g", Mapping(128, 256, expert=8, sharded=True), 0.234, "the same; EP 8"
    ),
    Published(
        "TP + EP + DP",
        "mixtral_8x22b",
        "h100-80g",
        Mapping(128, 256, tensor=8, expert=8, expert_tensor=8),
        0.366,
        "TP 8 of attention and experts, EP 8 over hosts",
    ),
    Published(
        "Megatron-Core 0.9",
        "mixtral_8x7b",
        "h100-80g",
        Mapping(64, 256, expert=8, pipeline=4, stages=8),
        468 / 989,
        "64 GPUs, EP 8, PP 4, 8 virtual stages, 256 rows",
    ),
    Published("MaxText", "mixtral_8x7b", "v5p", Mapping(256, 2048, sharded=True, micro=8), 0.526, "8 rows a chip"),
    Published(
        "BioNeMo, transformers",
        "mixtral_8x7b",
        "b300-288g",
        Mapping(8, 48, 8192, one_at_a_time=True, micro=48),
        0.036,
        "layers over 8 devices, one at work",
    ),
    Published(
        "BioNeMo, TE, EP 2",
        "mixtral_8x7b",
        "b300-288g",
        Mapping(8, 48, 8192, expert=2, sharded=True, micro=6),
        0.146,
        "6 rows a pass",
    ),
)


def device(name: str) -> Device:
    """Gives a device of the table, or the TPU that is in none of the trainer's plans."""
    if name == "v5p":
        return Device(name=name, efficiency=Efficiency(**table()["efficiency"]), **V5P)
    return device_of(
        compose_plan(["model=mixtral_8x7b", "data.path=x", "train.max_steps=1", f"plan.gpu={name}"]).config.plan
    )


def layout_of(model: str, mapping: Mapping) -> Layout:
    """Gives one pass of a mapping on one device, whole layers of it."""
    words = [f"model={model}", "data.path=x", "train.max_steps=1", "model.attn_implementation=flash_attention_2"]
    words += [f"data.sequence_length={mapping.length}", f"train.micro_batch_size={mapping.micro}", "parallel.zero=1"]
    return Layout(compose_plan([*words, f"parallel.expert={mapping.expert}", "plan.gpus=64"]).config, mapping.devices)


def seconds_of(row: Published) -> float:
    """Computes the time of a step."""
    mapping, gpu = row.mapping, device(row.gpu)
    layout, ways = layout_of(row.model, mapping), mapping.tensor * mapping.pipeline
    passes = mapping.rows / (mapping.devices / ways) / mapping.micro
    if mapping.one_at_a_time:
        return sum(compute(layout, gpu, Skew()).values())
    working = sum(compute(layout, gpu, Skew()).values()) / ways
    working += (tensor_traffic(layout, gpu, mapping) + rows_traffic(layout, gpu, mapping)) / mapping.pipeline
    bubble = (mapping.pipeline - 1) / mapping.stages
    sharing = weights_traffic(layout, gpu, mapping)
    if mapping.sharded:
        return passes * max(working, sharing)
    return (passes + bubble) * working + sharing


def tensor_traffic(layout: Layout, gpu: Device, mapping: Mapping) -> float:
    """Seconds in which a pass gathers and scatters tokens between devices that share matrices: four times a block."""
    blocks = 2 if mapping.expert_tensor > 1 else 1
    model, ranks = layout.config.model, mapping.tensor
    sent = blocks * 4 * model.num_hidden_layers * layout.tokens * model.hidden_size * layout.bytes * (ranks - 1) / ranks
    return sent / (gpu.efficiency.network * gpu.inside)


def rows_traffic(layout: Layout, gpu: Device, mapping: Mapping) -> float:
    """Seconds in which a pass sends rows to experts and back, forward and backward."""
    model, ranks = layout.config.model, mapping.expert
    tokens = layout.tokens / mapping.tensor
    sent = 4 * model.num_hidden_layers * tokens * model.num_experts_per_tok * model.hidden_size * layout.bytes
    across = ranks * mapping.expert_tensor > gpu.per_host
    return sent * (ranks - 1) / ranks / (gpu.efficiency.network * (gpu.between if across else gpu.inside))


def weights_traffic(layout: Layout, gpu: Device, mapping: Mapping) -> float:
    """Seconds in which weights are gathered and gradients summed: of each pass if sharded, else once."""
    count = layout.count
    held = count.experts / mapping.expert / mapping.expert_tensor + count.others / mapping.tensor
    held /= mapping.pipeline
    link = gpu.efficiency.network * (gpu.between if mapping.devices > gpu.per_host else gpu.inside)
    return held * ((2 + 2 + 4) if mapping.sharded else (2 + 4)) / link


def main() -> None:
    """Prints the tables."""
    print(f"{'':30}{'published':>10}{'computed':>10}{'differs':>9}  assumed")
    for row in ROWS:
        layout, mapping = layout_of(row.model, row.mapping), row.mapping
        flops = flops_per_token(layout) * mapping.rows * mapping.length
        mfu = flops / seconds_of(row) / mapping.devices / device(row.gpu).bf16
        print(f"{row.name:30}{row.mfu:>10.1%}{mfu:>10.1%}{mfu / row.mfu - 1:>+9.0%}  {row.assumed}")
    layout = layout_of("mixtral_8x7b", Mapping(1, 1, length=16384))
    hidden, inner = 4096, 14336
    ours = kept_of_layer(layout, Skew()).routed.total / layout.tokens + 2 * hidden
    stored = ours + 2 * 2 * (inner + 2 * hidden)  # the activated rows, and those before and after the experts
    for name, figure, published in (("SonicMoE", ours, 123e3), ("what it compares itself with", stored, 213e3)):
        cells = f"{published / 1e3:>7.0f} KB{figure / 1e3:>7.0f} KB{figure / published - 1:>+9.0%}"
        print(f"{name:30}{cells}  kept of a token and layer")


if __name__ == "__main__":
    main()
