"""A run that starts from given weights inherits their architecture. Nothing here imports torch."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from train.config import Config, ModelConfig
from train.errors import CheckpointError, ConfigError

FREE = ("sliding_window", "attention_dropout", "router_aux_loss_coef", "router_jitter_noise")
OWN = ("init_from", "attn_implementation")


def inherit(config: Config, explicit: Collection[str]) -> None:
    """Sets `model.*` to what `model.init_from` says, and its tokenizer where none is named.

    Args:
        config: to be completed.
        explicit: keys that the recipe or the command line gives.

    Raises:
        ConfigError: for an explicit key that differs from the weights', `FREE` ones aside.
        CheckpointError: when the folder cannot be used.
    """
    source = config.model.init_from
    assert source is not None
    if Path(source).expanduser().is_dir():
        config.model.init_from = source = str(Path(source).expanduser())
    described = _read(source)
    for item in dataclasses.fields(ModelConfig):
        name, given = item.name, getattr(config.model, item.name)
        if name in OWN or (name in FREE and f"model.{name}" in explicit):
            continue
        theirs = _value(source, described, name, item.default)
        if f"model.{name}" in explicit and given != theirs:
            raise ConfigError(f"model.{name}={given}, but model.init_from={source} has {theirs}: leave the key out")
        setattr(config.model, name, theirs)
    if "data.tokenizer" not in explicit:
        config.data.tokenizer = source


def _read(source: str) -> dict[str, Any]:
    """Reads the `config.json` of a folder, or of a hub id."""
    path = Path(source) / "config.json"
    if not Path(source).is_dir():
        from train.data.hub import download

        path = download(source, ["config.json"], "model.init_from") / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model.init_from={source}: {path} cannot be read ({error})") from None
    if not isinstance(described, dict) or described.get("model_type") != "mixtral":
        found = described.get("model_type") if isinstance(described, dict) else None
        raise CheckpointError(
            f"model.init_from={source}: {path} describes a {found!r} model, expected 'mixtral'; "
            "cierzo convert brings other weights into its form"
        )
    return described


def _value(source: str, described: dict[str, Any], name: str, default: Any) -> Any:
    """Gives a key of config.json, the published default where it is missing.

    Raises:
        CheckpointError: for a value of another type.
    """
    value = described.get(name, default)
    if name == "rope_theta":
        value = (described.get("rope_parameters") or {}).get(name, value)
    if isinstance(default, float) and type(value) in (int, float):
        return float(value)
    expected = int if default is None else type(default)
    if type(value) is not expected and not (default is None and value is None):
        raise CheckpointError(
            f"model.init_from={source}: config.json has {name}={value!r}, expected {expected.__name__}"
        )
    return value
