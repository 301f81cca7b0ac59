"""All that a plan says of one layout: its memory, its time, and whether it fits."""

from dataclasses import dataclass
from typing import Any

from train.plan.hardware import Device
from train.plan.layout import Layout
from train.plan.load import Skews, skews_of
from train.plan.memory import Memory, memory_of
from train.plan.seconds import Step, step_of

ERROR = 0.05
"""Share of the memory by which this arithmetic may be wrong: more than at the mean, less than at worst, of what
bench/README.md records of processors; no GPU was measured."""


@dataclass(frozen=True)
class Figures:
    """Memory and time of a layout at the median of the load, and at its 99th percentile.

    Attributes:
        layout, device, skews: what they are of.
        median, high: the memory.
        step: the time, at the median.
        slow: the time of one step in a hundred.
    """

    layout: Layout
    device: Device
    skews: Skews
    median: Memory
    high: Memory
    step: Step
    slow: Step

    @property
    def held(self) -> int:
        """Parameters that a process holds between passes."""
        return round(sum(map(self.layout.held, self.layout.weights)))

    @property
    def capacity(self) -> float:
        """Bytes that a process has of its device, or its share of those that all have."""
        return self.device.memory_of_each(self.layout.processes)

    @property
    def spare(self) -> float:
        """Bytes of the device that are left, below 0 where it does not fit; of host memory where that is less."""
        return min(self.capacity - self.high.peak, self.device.host_memory - self.high.host)

    @property
    def fits(self) -> bool:
        """Whether device and host have the memory, one step in a hundred included."""
        return self.spare >= 0

    @property
    def is_tight(self) -> bool:
        """Whether it fits by less than what this arithmetic may be wrong by."""
        return self.fits and self.spare < ERROR * self.high.peak

    @property
    def steps(self) -> int | None:
        """Of the whole run, where its configuration says so."""
        return self.layout.config.train.max_steps

    def described(self) -> dict[str, Any]:
        """Describes the plan as plan.json does; bytes, seconds and counts."""
        layout, device, count = self.layout, self.device, self.layout.count
        hours = None if self.steps is None else self.steps * self.step.seconds / 3600
        return {
            "device": device.name,
            "devices": layout.processes,
            "hosts": device.hosts(layout.processes),
            "layout": {
                "expert": layout.expert_ranks,
                "overlap_degree": layout.config.parallel.overlap_degree,
                "zero": layout.zero,
                "micro_batch_size": layout.config.train.micro_batch_size,
                "gradient_accumulation_steps": layout.config.train.gradient_accumulation_steps,
                "recompute": layout.config.train.recompute,
                "offload_optimizer": layout.config.parallel.offload_optimizer,
                "offload_parameters": layout.config.parallel.offload_parameters,
                "lora_rank": layout.config.lora.rank,
            },
            "parameters": {
                "total": count.total,
                "active": count.active,
                "trained": count.trained,
                "per_process": self.held,
            },
            "memory": {
                name: {
                    "peak": memory.peak,
                    "moment": memory.moment,
                    "parts": memory.parts,
                    "moments": {moment: sum(parts.values()) for moment, parts in memory.moments.items()},
                    "host": memory.host,
                    "skew": {"mean": memory.skew.mean, "layer": memory.skew.layer, "source": memory.skew.source},
                }
                for name, memory in (("median", self.median), ("p99", self.high))
            },
            "left_out": layout.left_out,
            "fits": self.fits,
            "is_tight": self.is_tight,
            "spare": self.spare,
            "step": {
                "seconds": self.step.seconds,
                "seconds_p99": self.slow.seconds,
                "parts": self.step.parts,
                "hidden": self.step.hidden,
                "tokens": self.step.tokens,
                "tokens_per_second": self.step.tokens_per_second,
                "mfu": self.step.mfu(device, layout),
            },
            "run": {"steps": self.steps, "hours": hours, "device_hours": hours and hours * layout.processes},
        }


def figures_of(layout: Layout, device: Device, skews: Skews | None = None) -> Figures:
    """Computes the figures of a layout.

    Raises:
        ConfigError: where `plan.load_from` cannot be used.
    """
    skews = skews or skews_of(layout.config, layout.expert_ranks)
    return Figures(
        layout,
        device,
        skews,
        memory_of(layout, skews.median),
        memory_of(layout, skews.high),
        step_of(layout, device, skews.median),
        step_of(layout, device, skews.high),
    )
