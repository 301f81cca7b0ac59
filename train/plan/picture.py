"""The picture of a plan: memory at each moment of a step, and where its time goes."""

from pathlib import Path
from typing import Any

from train.plan.figures import Figures
from train.plan.memory import KINDS

GB = 1e9
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#eeca3b", "#72b7b2", "#9d755d", "#bab0ac")


def draw_plan(figures: Figures, target: Path) -> None:
    """Draws a plan, its memory at the 99th percentile of the load."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(nrows=2, height_ratios=(2.4, 1))
    _draw_memory(figures, upper)
    _draw_time(figures, lower)
    figure.savefig(target, dpi=110)


def _draw_memory(figures: Figures, axes: Any) -> None:
    moments = list(reversed(figures.high.moments.items()))
    ends = [0.0] * len(moments)
    for kind, colour in zip(KINDS, COLOURS, strict=True):
        sizes = [parts.get(kind, 0.0) / GB for _, parts in moments]
        if any(sizes):
            axes.barh([moment for moment, _ in moments], sizes, left=ends, color=colour, label=kind, height=0.7)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    capacity = figures.capacity / GB
    axes.axvline(capacity, color="black", linestyle="--", linewidth=1)
    axes.text(capacity, len(moments) - 0.4, f" {figures.device.name}", va="bottom", ha="center", fontsize=9)
    axes.set_xlim(0, 1.08 * max(capacity, *ends))
    axes.set_xlabel("memory of the process with the most rows (GB), at the 99th percentile of the load")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    axes.grid(axis="x", alpha=0.3)


def _draw_time(figures: Figures, axes: Any) -> None:
    parts = {part: seconds for part, seconds in figures.step.parts.items() if seconds > 0}
    names = list(reversed(parts))
    axes.barh(names, [parts[name] for name in names], color=COLOURS[0], height=0.7)
    for place, name in enumerate(names):
        axes.text(parts[name], place, f" {parts[name] / figures.step.seconds:.0%}", va="center", fontsize=8)
    axes.set_xlabel(f"time of a step (s), {figures.step.seconds:.3g} in all, at the median of the load")
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
