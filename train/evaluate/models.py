"""Which models the verb `evaluate` is asked for. Nothing here imports torch."""

import json
from collections.abc import Sequence
from pathlib import Path

from train.compose import Composed, compose
from train.errors import ConfigError

ABSENT = ("rank=0", "dropout=0.0", "dora=false", "rslora=false", "quantize=none")
BARE = tuple(f"lora.{word}" for word in ABSENT)  # whatever the recipe trains
OF_MODEL = ("model.init_from", "lora.init_from")


def find_models(words: Sequence[str]) -> dict[str, Composed]:
    """Composes the configuration of each model: of those in `evaluate.compare`, or of the one in `model.init_from`.

    Args:
        words: `recipe=...` and `KEY=VALUE`, as for training; the number of steps may be missing.

    Returns:
        By the name that a model is shown with.

    Raises:
        ConfigError: when none is named, one twice, or one of them does not go with the rest.
    """
    keys = {word.partition("=")[0].lstrip("+") for word in words}
    if not keys & {"recipe", "train.max_steps", "train.epochs"}:
        words = ["train.max_steps=1", *words]
    composed = compose(words)
    config = composed.config
    compared = config.evaluate.compare
    if not compared and config.lora.init_from is not None:
        return {config.lora.init_from: composed}
    names = compared or ([config.model.init_from] if config.model.init_from else [])
    if not names:
        raise ConfigError("evaluate needs a model: name it in model.init_from, or several in evaluate.compare")
    if len(set(names)) < len(names):
        raise ConfigError(f"evaluate.compare={names} names a model twice")
    if len(names) > 1 and config.parallel.zero == 3:
        raise ConfigError("evaluate.compare holds one model after the other, whole: set parallel.zero to 2 or less")
    kept = [word for word in words if word.partition("=")[0].lstrip("+") not in OF_MODEL]
    return {name: compose([*kept, *words_of_model(name)]) for name in names}


def words_of_model(name: str) -> list[str]:
    """Gives the words that name a model, or an adapter and the weights that it was trained on.

    Raises:
        ConfigError: for an adapter that does not say which.
    """
    path = Path(name).expanduser() / "adapter_config.json"
    if not path.is_file():
        return [f"model.init_from={name}", *BARE]
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"evaluate.compare: {path} cannot be read ({error})") from None
    if not base:
        raise ConfigError(f"evaluate.compare: {path} does not say which weights it adapts: merge it by cierzo export")
    return [f"model.init_from={base}", f"lora.init_from={name}"]
