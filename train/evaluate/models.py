"""Which models a verb is asked for that looks at trained ones. Nothing here imports torch."""

import json
from collections.abc import Sequence
from pathlib import Path

from train.compose import Composed, compose, compose_without_data
from train.errors import ConfigError

ABSENT = ("init_from=null", "rank=0", "dropout=0.0", "dora=false", "rslora=false", "quantize=none")
BARE = tuple(f"lora.{word}" for word in ABSENT)  # whatever the recipe trains
OF_MODEL = ("model.init_from", "lora.init_from")


def find_models(words: Sequence[str]) -> dict[str, Composed]:
    """Composes the configuration of each model to evaluate: of those in `evaluate.compare`, or of `find_model`'s.

    Args:
        words: `recipe=...` and `KEY=VALUE`, as for training; the number of steps may be missing.

    Returns:
        By the name that a model is shown with.

    Raises:
        ConfigError: when none is named, one twice, or one of them does not go with the rest.
    """
    words = _with_steps(words)
    config = compose(_named([word for word in words if not _key(word).startswith("lora.")])).config
    names, zero = config.evaluate.compare, config.parallel.zero
    if not names:
        name, named = _of_one(_named(words), "evaluate", ", or several in evaluate.compare")
        return {name: compose(named)}
    if len(set(names)) < len(names):
        raise ConfigError(f"evaluate.compare={names} names a model twice")
    if len(names) > 1 and zero == 3:
        raise ConfigError("evaluate.compare holds one model after the other, whole: set parallel.zero to 2 or less")
    return {name: compose(words_of_model(name, words)) for name in names}


def find_model(words: Sequence[str], verb: str) -> Composed:
    """Composes the configuration of one model: the adapter in `lora.init_from`, or what is in `model.init_from`.

    It needs no data.

    Args:
        words: see `find_models`.
        verb: that asks.

    Raises:
        ConfigError: when none is named.
    """
    return compose_without_data(_of_one(_named(_with_steps(words)), verb)[1])


def _with_steps(words: Sequence[str]) -> list[str]:
    """Adds what training alone needs."""
    keys = {_key(word) for word in words}
    return [*([] if keys & {"recipe", "train.max_steps", "train.epochs"} else ["train.max_steps=1"]), *words]


def _named(words: list[str]) -> list[str]:
    """Adds what else makes up a model that is named alone."""
    named = [word.partition("=")[2] for word in words if _key(word) == "model.init_from"]
    if named and "lora.init_from" not in map(_key, words):
        return words_of_model(named[-1], words)
    return words


def _of_one(words: list[str], verb: str, others: str = "") -> tuple[str, list[str]]:
    """Gives the name of the model that words are of, and the words for it with nothing of it trained."""
    config = compose_without_data(words).config
    name = config.lora.init_from or config.model.init_from
    if name is None:
        raise ConfigError(f"{verb} needs a model: name it in model.init_from{others}")
    if config.lora.init_from is None and not set(BARE) <= set(words):
        return name, _bare(name, words)
    return name, words


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _bare(name: str, words: Sequence[str]) -> list[str]:
    """Takes away from words what a recipe says of adapters.

    Raises:
        ConfigError: for what they say themselves, which would be lost.
    """
    taken = {_key(word) for word in BARE}
    for word in words:
        if _key(word) in taken and word.lstrip("+") not in BARE:
            raise ConfigError(
                f"{word} is of an adapter, and {name} has none: leave it out, or name an adapter's folder"
            )
    return [*words, *BARE]


def words_of_model(name: str, words: Sequence[str]) -> list[str]:
    """Adds to words those that name a model, or an adapter and the weights that it was trained on.

    Raises:
        ConfigError: for an adapter that does not say which, or a word of adapters for a model without.
    """
    words = [word for word in words if _key(word) not in OF_MODEL]
    path = Path(name).expanduser() / "adapter_config.json"
    if not path.is_file():
        return _bare(name, [*words, f"model.init_from={name}"])
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from None
    if not base:
        raise ConfigError(f"{path} does not say which weights it adapts: merge it by cierzo export")
    return [*words, f"model.init_from={base}", f"lora.init_from={name}"]
