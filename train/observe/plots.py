"""Pictures of a run, drawn from metrics.jsonl."""

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from train.folder import RunFolder

BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "fontsize": 8, "frameon": False}
FEW = 8  # layers whose lines all have a name
MOST = 1000  # rows of a kind that are drawn, however long a run is


def draw(folder: RunFolder) -> None:
    """Draws into `plots/` what metrics.jsonl holds so far.

    `loss.png`, `expert_load.png` and `router.png`; `router_drift.png` where a run started from given weights.
    """
    rows = read_metrics(folder.metrics_path)
    target = folder.path / "plots"
    target.mkdir(exist_ok=True)
    draw_loss(rows, target / "loss.png")
    if any("expert_load" in row for row in rows):
        draw_expert_load(rows, target / "expert_load.png")
        draw_router(rows, target / "router.png")
    if any("router_agreement" in row for row in rows):
        draw_router_drift(rows, target / "router_drift.png")


class _Thinned:
    """Lines of a file, at most `MOST` of them and the last: all at first, then every second, every fourth, ..."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, bytes]] = []
        self._last: tuple[int, bytes] | None = None
        self._seen, self._every = 0, 1

    def add(self, number: int, line: bytes) -> None:
        """Takes a line, of which the file's number is known."""
        self._last = (number, line)
        if self._seen % self._every == 0:
            if len(self._kept) == MOST:
                self._kept, self._every = self._kept[::2], self._every * 2
            if self._seen % self._every == 0:
                self._kept.append(self._last)
        self._seen += 1

    def lines(self) -> dict[int, bytes]:
        """Gives what is left, by number."""
        return dict(self._kept if self._last is None else [*self._kept, self._last])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a metrics.jsonl; of very many a part, evenly, as well as of those that hold an evaluation."""
    trained, evaluated = _Thinned(), _Thinned()
    with path.open("rb") as file:
        for number, line in enumerate(file):
            (evaluated if b'"eval_loss"' in line else trained).add(number, line)
    return [json.loads(line) for _, line in sorted(chain(trained.lines().items(), evaluated.lines().items()))]


def _save(figure: Any, target: Path) -> None:
    """Writes a picture whole, or leaves the one that is there."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        figure.savefig(partial, dpi=110, format="png")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**grid)


def draw_loss(rows: list[dict[str, Any]], target: Path) -> None:
    """Draws training and held-out cross-entropy, and the router loss below them."""
    figure, (upper, lower) = _figure(8, 6, nrows=2, sharex=True, height_ratios=(3, 1))
    trained = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in trained]
    upper.plot(steps, [row["loss"] for row in trained], color="tab:blue", linewidth=1.2, label="training")
    evaluated = [row for row in rows if "eval_loss" in row]
    upper.plot(
        [row["step"] for row in evaluated],
        [row["eval_loss"] for row in evaluated],
        "o-",
        color="tab:orange",
        label="held-out",
    )
    is_classifier = evaluated and "eval_perplexity" not in evaluated[-1]
    upper.set_ylabel("loss (a row)" if is_classifier else "cross-entropy (nats per token)")
    upper.legend(loc="upper right")
    lower.plot(steps, [row["router_loss"] for row in trained], color="tab:green", linewidth=1.2)
    lower.set_ylabel("router loss")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    _save(figure, target)


def draw_expert_load(rows: list[dict[str, Any]], target: Path) -> None:
    """Draws each layer's load per expert over the steps; an equal share is white."""
    logged = [row for row in rows if "expert_load" in row]
    load_SLE = np.asarray([row["expert_load"] for row in logged])
    _, layers, experts = load_SLE.shape
    columns = min(layers, 4)
    figure, axes = _figure(
        3.2 * columns + 1,
        2.2 * math.ceil(layers / columns) + 0.6,
        nrows=math.ceil(layers / columns),
        ncols=columns,
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    edges = [row["step"] for row in logged]
    edges = [edges[0] - 1, *edges]
    for layer, panel in enumerate(axes.flat):
        if layer >= layers:
            panel.set_visible(False)
            continue
        image = panel.pcolormesh(
            edges, np.arange(experts + 1) - 0.5, load_SLE[:, layer].T * experts, cmap="RdBu_r", vmin=0, vmax=2
        )
        panel.set_title(f"layer {layer}", fontsize=9)
        panel.set_yticks(range(0, experts, max(1, experts // 8)))
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    figure.colorbar(image, ax=axes, label="load, 1 = an equal share", extend="max", shrink=0.9)
    _save(figure, target)


def draw_router(rows: list[dict[str, Any]], target: Path) -> None:
    """Draws each layer's entropy and its fullest expert, and the shares of rows that cross processes or are dropped."""
    logged = [row for row in rows if "expert_load" in row]
    steps = [row["step"] for row in logged]
    load_SLE = np.asarray([row["expert_load"] for row in logged])
    entropy_SL = np.asarray([row["router_entropy"] for row in logged])
    _, layers, experts = load_SLE.shape
    figure, (upper, middle, lower) = _figure(8, 7, nrows=3, sharex=True, height_ratios=(3, 3, 2))
    for layer in range(layers):
        look = _look(layer, layers)
        upper.plot(steps, entropy_SL[:, layer], **look)
        middle.plot(steps, load_SLE[:, layer].max(axis=1) * experts, **look)
    upper.axhline(math.log(experts), color="grey", linestyle=":", linewidth=1, label="no choice at all")
    upper.set_ylabel("router entropy (nats)")
    upper.legend(**BESIDE)
    middle.axhline(1, color="grey", linestyle=":", linewidth=1)
    middle.set_ylabel("fullest expert's load\n(1 = an equal share)")
    for figure_name, words in {"cross_rank_fraction": "cross processes", "dropped_fraction": "dropped"}.items():
        lower.plot(steps, [row[figure_name] for row in logged], linewidth=1.2, label=words)
    lower.set_ylim(-0.03, 1.03)
    lower.set_ylabel("share of rows")
    lower.legend(**BESIDE)
    lower.set_xlabel("step")
    for axes in (upper, middle, lower):
        axes.grid(alpha=0.3)
    _save(figure, target)


def draw_router_drift(rows: list[dict[str, Any]], target: Path) -> None:
    """Draws how much of each layer's routing is still that of the model the run started from, and how far it is off."""
    evaluated = [row for row in rows if "router_agreement" in row]
    steps = [row["step"] for row in evaluated]
    agreement_SL, kl_SL = (np.asarray([row[name] for row in evaluated]) for name in ("router_agreement", "router_kl"))
    layers = agreement_SL.shape[1]
    figure, (upper, lower) = _figure(8, 5.5, nrows=2, sharex=True)
    for layer in range(layers):
        upper.plot(steps, agreement_SL[:, layer], "o-", markersize=3, **_look(layer, layers))
        lower.plot(steps, kl_SL[:, layer], "o-", markersize=3, **_look(layer, layers))
    upper.set_ylabel("choices that are\nstill the base's (share)")
    upper.set_ylim(top=1.005)
    upper.legend(**BESIDE)
    lower.set_ylabel("KL(base || now)\n(nats per token)")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    _save(figure, target)


def _look(layer: int, layers: int) -> dict[str, Any]:
    """Gives a layer's line its colour, by depth, and a name: all where they are few, else three of them."""
    from matplotlib import colormaps

    look = {"color": colormaps["viridis"](0.9 * layer / max(1, layers - 1)), "linewidth": 1.2}
    return look | ({"label": f"layer {layer}"} if layers <= FEW or layer in {0, layers // 2, layers - 1} else {})


def draw_lengths(lengths: np.ndarray, sequence_length: int, target: Path) -> None:
    """Draws how many documents are how long, and where a row ends."""
    figure, axes = _figure(8, 4)
    axes.hist(lengths, bins=min(60, int(lengths.max())), color="tab:blue")
    axes.axvline(sequence_length, color="tab:orange", label=f"a row, {sequence_length:,} tokens")
    axes.set_xlabel("tokens")
    axes.set_ylabel("documents")
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    _save(figure, target)
