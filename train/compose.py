"""From the command line to the typed configuration, through Hydra.

The order is: the schema's defaults, the groups of conf/, conf/config.yaml, the recipe, the command line.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from train.config import PROBLEMS, Config, SourceConfig, check, keys, nearest
from train.errors import ConfigError
from train.inherit import inherit, inherit_adapter, inherit_adapter_labels, inherit_adapter_tokenizer

SECTIONS: dict[str, set[str]] = {section.name: set() for section in dataclasses.fields(Config)}
for _key in keys():
    SECTIONS[_key.name.split(".")[0]].add(_key.name.split(".")[1])

LISTS = ("lora.targets", "train.only")  # words with commas between, which may be written as a list too
UNNAMED = "DATA"  # what a configuration reads where nothing was named
WRITTEN = "# Written by a run: every text is as it stands; without this line, ${...} is what it is in other recipes.\n"
_QUOTED = re.compile(r"""(['"])(?:\\.|(?!\1)[^\\])*\1""", re.DOTALL)  # by the user, as Hydra reads it
_ITEM = re.compile(r"""\s*("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,]*?)\s*,""", re.DOTALL)  # of a list or map


@dataclass(frozen=True)
class Composed:
    """A checked configuration and where it came from."""

    config: Config
    recipe: str | None
    overrides: list[str]


def _folder(name: str) -> Path:
    """Finds conf/ or recipes/: inside this package in a wheel, beside it in a checkout."""
    packaged = Path(__file__).parent / name
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / name


def conf_folder() -> Path:
    """The folder of Hydra groups."""
    return _folder("conf")


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(_folder("recipes").glob("*.yaml"))}


def groups() -> dict[str, list[str]]:
    """The groups of conf/ and their choices."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(conf_folder().iterdir())
        if folder.is_dir() and not folder.name.startswith("_")
    }


def compose(argv: Sequence[str]) -> Composed:
    """Composes and checks the configuration of a command line.

    Args:
        argv: `recipe=NAME_OR_PATH`, `GROUP=CHOICE` and `KEY=VALUE` words.

    Raises:
        ConfigError: for a word, key, type, value or combination that cannot be used.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    recipe_words = [word for word in argv if word.partition("=")[0].lstrip("+") == "recipe"]
    words = [word for word in argv if word not in recipe_words]
    if len(recipe_words) > 1:
        raise ConfigError(f"recipe is given {len(recipe_words)} times: {' '.join(recipe_words)}")
    words = _check_words(words)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    name, path = None, None
    if recipe_words:
        name, path = _find_recipe(recipe_words[0].partition("=")[2])
        store.store(group="recipe", name="chosen", node=_read_recipe(path), package="_global_")
    try:
        with initialize_config_dir(config_dir=str(conf_folder().resolve()), version_base="1.3"):
            tree = hydra_compose("config", overrides=[*words, *(["recipe=chosen"] if path else [])])
        config = OmegaConf.to_object(tree)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, path)) from None
    assert isinstance(config, Config)
    explicit = _explicit_keys(words, path)
    if config.model.init_from is not None:
        inherit(config, explicit)
    if config.lora.init_from is not None:
        inherit_adapter(config.lora, explicit, classifier=config.data.format in PROBLEMS)
        inherit_adapter_labels(config)
        inherit_adapter_tokenizer(config, explicit)
    check(config)
    return Composed(config=config, recipe=name, overrides=list(argv))


def compose_without_data(words: Sequence[str]) -> Composed:
    """Composes the configuration of what reads no data, so that none need be named; see `compose`."""
    try:
        return compose(words)
    except ConfigError as error:
        if not str(error).startswith("data.path is needed"):
            raise
        return compose([*words, f"data.path={UNNAMED}"])


def _explicit_keys(words: Sequence[str], recipe: Path | None) -> set[str]:
    """Names the keys that the command line or the recipe itself sets, groups aside."""
    tree = _read_recipe(recipe) if recipe else {}
    sections = {name: values for name, values in tree.items() if isinstance(values, dict)}
    return {word.partition("=")[0] for word in words} | {
        f"{name}.{leaf}" for name in sections for leaf in sections[name]
    }


def to_yaml(config: Config) -> str:
    """Writes a configuration as YAML, every key resolved: a recipe of the same run."""
    return WRITTEN + yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _check_words(words: Sequence[str]) -> list[str]:
    """Checks the key of every override, and strips Hydra's `+` and `++` once it is known to exist."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    checked = []
    for before, word in pairwise(["", *words]):
        if word.startswith("-") or "=" not in word:
            name, mark, _ = word.partition("=")  # the value may be a secret, meant for another program
            key, has_value, value = before.partition("=")
            is_cut = bool(has_value) and (value[-1:] in ("", ",") or value.count("[") > value.count("]"))
            hint = f"; if it belongs to {key}, write that without spaces or in quotes: '{key}=...'" if is_cut else ""
            raise ConfigError(f"{name + mark!r} is not KEY=VALUE{hint}; see --help")
        if word.startswith("~"):
            raise ConfigError(f"{word!r}: keys cannot be removed; set a value instead")
        word = word.lstrip("+")
        word = _quoted(word)
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            raise ConfigError(f"{word!r} cannot be read ({str(error).splitlines()[0]})") from None
        if override.is_sweep_override():
            raise ConfigError(f"{word!r} is a sweep of values; one run takes one")
        _check_key(override.key_or_group, override.value(), "on the command line")
        is_open = any(item.name == override.key_or_group and item.type == dict[str, str] for item in keys())
        checked.append(f"++{word}" if is_open else word)  # whose own keys Hydra does not know
    return checked


def _quoted(word: str) -> str:
    """Quotes the value of a key that holds text, or texts, so that no character of it means anything to Hydra."""
    name, _, value = word.partition("=")
    if name in LISTS and (listed := re.fullmatch(r"\[([^][]*)\]", value)):
        value = re.sub("[\"' ]", "", listed.group(1))
        word = f"{name}={value}"
    kind = next((item.type for item in keys() if item.name == name and not item.choices), None)
    if kind in (str, str | None) and value != "null":
        return f"{name}={_as_text(value)}"
    if kind == list[str] and (items := _items(value, "[]")):
        return f"{name}=[{','.join(map(_as_text, items))}]"
    pairs = [item.partition(":") for item in _items(value, "{}")] if kind == dict[str, str] else []
    if pairs and all(text.strip() for _, _, text in pairs):
        return f"{name}={{{','.join(f'{key}:{_as_text(text.strip())}' for key, _, text in pairs)}}}"
    return word


def _items(value: str, brackets: str) -> list[str]:
    """Parts what stands in brackets by the commas outside of quotes; gives nothing where there is no such thing."""
    found: list[str] = _ITEM.findall(value[1:-1] + ",") if value[:1] + value[-1:] == brackets else []
    return found if all(found) else []


def _as_text(value: str) -> str:
    """Quotes a text that the user has not."""
    if _QUOTED.fullmatch(value):
        return value
    escaped = re.sub(r'(\\+)(?="|\Z)', r"\1\1", _literal(value)).replace('"', '\\"')
    return f'"{escaped}"'


def _literal(value: Any) -> Any:
    """Escapes what would name another key, `${...}`, in every text of a value."""
    if isinstance(value, dict):
        return {name: _literal(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _check_key(name: str, value: Any, where: str) -> None:
    """Checks that a dotted name is a key, or a group with that choice."""
    choices = groups().get(name)
    if choices is not None and not isinstance(value, dict):
        if value not in choices:
            raise ConfigError(f"{name}={value} {where}: expected {' | '.join(choices)}{nearest(str(value), choices)}")
        return
    section, _, leaf = name.partition(".")
    if leaf in SECTIONS.get(section, ()):
        if name == "data.sources":
            _check_sources(value, where)
        return
    if name in SECTIONS:
        raise ConfigError(f"{name} {where} is a section: set its keys one by one, such as {name}.{min(SECTIONS[name])}")
    known = [item.name for item in keys()] + list(groups()) + ["recipe"]
    raise ConfigError(f"unknown key {name} {where}{nearest(name, known)}")


def _check_sources(value: Any, where: str) -> None:
    """Checks the keys of each source, which Hydra would name badly."""
    known = [item.name for item in dataclasses.fields(SourceConfig)]
    shape = f"data.sources {where}: expected a list such as [{{path: FILE, weight: 2}}, ...]"
    if not isinstance(value, list):
        raise ConfigError(shape)
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("path"), str):
            raise ConfigError(f"{shape}; found {item!r}")
        for name in item:
            if name not in known:
                raise ConfigError(f"unknown key {name} of a source in data.sources {where}{nearest(str(name), known)}")
        weight = item.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float | None):
            raise ConfigError(f"data.sources {where}: {item['path']}: weight={weight} is not a number")


def _find_recipe(choice: str) -> tuple[str, Path]:
    known = recipes()
    if choice in known:
        return choice, known[choice]
    path = Path(choice).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path.stem, path
    if path.suffix in (".yaml", ".yml") or "/" in choice:
        raise ConfigError(f"recipe={choice}: no such file")
    raise ConfigError(
        f"recipe={choice}: expected a path to a .yaml file or one of {' | '.join(known)}{nearest(choice, known)}"
    )


def _read_recipe(path: Path) -> dict[str, Any]:
    """Reads a recipe and checks its groups and keys.

    Raises:
        ConfigError: naming the file and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path} holds no keys")
    tree = _literal(tree) if text.startswith(WRITTEN) else tree
    where, may_be_empty = f"in recipe {path}", {"defaults", *SECTIONS}
    tree = {section: values for section, values in tree.items() if values is not None or section not in may_be_empty}
    for entry in tree.get("defaults", []):
        if entry == "_self_":
            continue
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ConfigError(f"`defaults` entry {entry!r} {where}: expected `override /GROUP: CHOICE`")
        word, choice = next(iter(entry.items()))
        group = str(word).removeprefix("override").strip().lstrip("/")
        if not str(word).startswith("override /") or group not in groups():
            raise ConfigError(
                f"`defaults` entry `{word}` {where}: expected `override /GROUP`, GROUP one of {' | '.join(groups())}"
            )
        _check_key(group, choice, where)
    for section, values in tree.items():
        if section == "defaults":
            continue
        if not all(isinstance(name, str) for name in (section, *(values if isinstance(values, dict) else ()))):
            raise ConfigError(f"a key {where} is not text (YAML reads on, off, yes and no as booleans): quote it")
        if section in groups() and isinstance(values, str):
            raise ConfigError(f"{section} {where} is a group: write `defaults:` with `- override /{section}: {values}`")
        if section not in SECTIONS or not isinstance(values, dict):
            _check_key(section, values if isinstance(values, dict) else {}, where)
        for leaf, value in values.items():
            _check_key(f"{section}.{leaf}", value, where)
            if f"{section}.{leaf}" in LISTS and isinstance(value, list):
                values[leaf] = ",".join(map(str, value))
    return tree


def _explain(error: BaseException, recipe: Path | None) -> str:
    """Turns a composition error into one line with the full key and what is allowed."""
    from omegaconf.errors import MissingMandatoryValue

    known = {item.name: item for item in keys()}
    where = f" (on the command line or in recipe {recipe})" if recipe else ""
    cause: BaseException | None = error
    while cause is not None:  # the key is named by whatever was raised first
        text = str(cause)
        found = re.search(r"full_key: (\S+)", text)
        if found and found.group(1) in known:
            key = known[found.group(1)]
            if isinstance(cause, MissingMandatoryValue):
                return f"{key.name} is needed: {key.help}"
            reason = [line.strip() for line in text[: found.start()].splitlines() if line.strip()][-1]
            return f"{key.name}: {reason}; expected {key.allowed}{where}"
        cause = cause.__cause__
    return " ".join(str(error).split()) + where
