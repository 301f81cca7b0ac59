"""What may differ between the run that was saved and the one that goes on."""

import dataclasses
import fnmatch
import json
from collections.abc import Mapping
from typing import Any

from train.config import Config, keys
from train.errors import ConfigError

ALLOWED = (
    *("run.dir", "run.plots", "train.max_steps", "train.epochs", "train.log_every", "data.workers", "lora.format"),
    *("train.recompute", "train.max_skipped_steps", "train.spike_zscore", "train.on_spike"),
    *("train.check_replicas_every", "train.hang_seconds"),
    *("train.micro_batch_size", "train.gradient_accumulation_steps"),  # as long as a step has as many rows
    *("parallel.expert", "parallel.zero", "parallel.offload_*", "parallel.persistent_elements"),
    "parallel.overlap_degree",
    *("parallel.meeting_seconds", "evaluate.*", "generate.*", "checkpoint.*", "tracker.*", "verify.*", "plan.*"),
)


def described(config: Config) -> dict[str, Any]:
    """Writes a configuration as JSON would give it back."""
    content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return content


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Finds the keys that differ; a key that was not there before had its default.

    Args:
        before: see `described`.
        now: see `described`.
    """
    found, defaults = {}, described(Config())
    for item in keys():
        section, name = item.name.split(".")
        then, today = before.get(section, {}).get(name, defaults[section][name]), now[section][name]
        if then != today:
            found[item.name] = (then, today)
    return found


def allowed_changes(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[str]:
    """Lists the differences between two configurations.

    Args:
        before: of the run that was saved, see `described`.
        now: of the run that goes on.
        where: the former is written.

    Raises:
        ConfigError: listing those that would make it another run.
    """
    found = changes(before, now)
    refused = [name for name in found if not any(fnmatch.fnmatch(name, pattern) for pattern in ALLOWED)]
    lines = {name: f"{name}={_word(then)} -> {_word(today)}" for name, (then, today) in found.items()}
    if refused:
        raise ConfigError(
            f"{where} is of a run with other settings: {', '.join(lines[name] for name in refused)}; go on with those "
            "it had, or begin a run of its own, in another run.dir and without checkpoint.resume"
        )
    return list(lines.values())


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
