"""How unequally the experts of a layer are loaded: assumed, or seen in a run."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import Config
from train.errors import ConfigError

MEDIAN_SHARE = 1 / 3
"""What the fullest rank takes beyond an even share at the median, over what it does at the 99th percentile."""
EXPERT_SHARE = 3.0
"""What the fullest expert takes beyond an even share, over what the layers of the fullest rank do on average."""
LAYER_SHARE = 2.0
"""What the worst layer takes beyond an even share, over what the layers of that rank do on average."""


@dataclass(frozen=True)
class Skew:
    """Rows over an even share.

    Attributes:
        mean: of the rank with the most rows in all, over the layers.
        layer: of any rank in any layer at most.
        expert: of any expert in any layer at most.
        source: where it comes from.
    """

    mean: float = 1.0
    layer: float = 1.0
    expert: float = 1.0
    source: str = "even"

    def bounded(self, ranks: int, experts: float) -> "Skew":
        """The same with no rank above all rows, and no expert above one of every token."""
        return Skew(min(self.mean, ranks), min(self.layer, ranks), min(self.expert, experts), self.source)


@dataclass(frozen=True)
class Skews:
    """The median, and what one step in a hundred exceeds."""

    median: Skew
    high: Skew


def skews_of(config: Config, ranks: int) -> Skews:
    """Gives what a plan is to assume.

    Args:
        config: of the run, and of the plan.
        ranks: over which a layer's experts are split.

    Raises:
        ConfigError: where the run to read it from has no load, or one of other experts.
    """
    plan, model = config.plan, config.model
    if plan.load_from is not None:
        return seen(plan.load_from, ranks, model.num_local_experts)
    found = []
    for name, beyond in (("median", (plan.skew - 1) * MEDIAN_SHARE), ("p99", plan.skew - 1)):
        shares = (1 + beyond, 1 + LAYER_SHARE * beyond, 1 + EXPERT_SHARE * beyond)
        skew = Skew(*shares, f"plan.skew={plan.skew:g}, {name}")
        found.append(skew.bounded(ranks, model.num_local_experts / model.num_experts_per_tok))
    return Skews(*found)


def seen(folder: str, ranks: int, experts: int) -> Skews:
    """Reads the load of a run's experts, of which it must have so many, as if they were split over so many ranks.

    Raises:
        ConfigError: where there is none to read.
    """
    path = Path(folder).expanduser() / "metrics.jsonl"
    rows: list[dict[str, Any]] = []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"plan.load_from={folder}: {path} cannot be read ({error})") from None
    loads = [row["expert_load"] for row in rows if "expert_load" in row]
    if not loads or len(loads[0][0]) != experts:
        found = f"{len(loads[0][0])} experts" if loads else "no expert_load"
        raise ConfigError(
            f"plan.load_from={folder}: {path} has {found}, expected that of model.num_local_experts={experts}: name a "
            "run of such a model, or give plan.skew"
        )
    steps = [skew_of_step(load, ranks) for load in loads]
    median, high = (
        Skew(
            _percentile([step.mean for step in steps], share),
            _percentile([step.layer for step in steps], share),
            _percentile([step.expert for step in steps], share),
            f"{path.parent.name}, {name}",
        )
        for share, name in ((0.5, "median"), (0.99, "p99"))
    )
    return Skews(median, high)


def skew_of_step(load_LE: list[list[float]], ranks: int) -> Skew:
    """Reads the skew of one step.

    Args:
        load_LE: the share of a layer's rows that each expert took.
        ranks: over which the experts are split.
    """
    each = len(load_LE[0]) // ranks
    share_LP = [[ranks * sum(load[rank * each : (rank + 1) * each]) for rank in range(ranks)] for load in load_LE]
    mean = max(sum(column) / len(share_LP) for column in zip(*share_LP, strict=True))
    return Skew(mean, max(map(max, share_LP)), len(load_LE[0]) * max(map(max, load_LE)), "one step")


def _percentile(values: list[float], share: float) -> float:
    """Gives the smallest value that at least such a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(round(share * len(ordered), 9)) - 1]
