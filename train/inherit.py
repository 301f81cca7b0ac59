"""A run that starts from given weights inherits their architecture. Nothing here imports torch."""

import dataclasses
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from train.config import PROBLEMS, TARGETS, Config, DataConfig, LoraConfig, ModelConfig, words_of
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
    _inherit_labels(config.data, described)


def _inherit_labels(data: DataConfig, described: dict[str, Any]) -> None:
    """Sets `data.labels`, where a classifier is trained, to those of another, as its `config.json` says.

    Raises:
        ConfigError: where others are given; names such as LABEL_0 are none.
    """
    problem = PROBLEMS.get(data.format)
    named = described.get("id2label") or {}
    theirs = [str(named[number]) for number in sorted(named, key=int)]
    if problem in (None, "regression") or described.get("problem_type", problem) not in (problem, None):
        return
    is_named = theirs != [f"LABEL_{number}" for number in range(len(theirs))]
    if not described.get("problem_type") and not (is_named and _is_classifier(described)):
        return
    if data.labels and data.labels != theirs and (is_named or len(theirs) != len(data.labels)):
        raise ConfigError(
            f"data.labels={data.labels}, but the classifier to go on from has {theirs}: leave the key out"
        )
    data.labels = data.labels or theirs


def _is_classifier(described: dict[str, Any]) -> bool:
    """Whether a `config.json` is a classifier's, which need not say of which kind."""
    return any(str(name).endswith("ForSequenceClassification") for name in described.get("architectures") or [])


def inherit_adapter_labels(config: Config) -> None:
    """Sets `data.labels` to those of a classifier's adapter in `lora.init_from`, which has a `config.json`."""
    if config.data.format not in PROBLEMS:
        return
    path = _file_of(config.lora.init_from or "", "config.json", "lora.init_from")
    if path.is_file():
        _inherit_labels(config.data, _read(str(path.parent)))


def inherit_adapter_tokenizer(config: Config, explicit: Collection[str]) -> None:
    """Sets `data.tokenizer`, where none is named, to that of `lora.init_from`: the base's, with a template perhaps."""
    source = config.lora.init_from or ""
    if "data.tokenizer" in explicit:
        return
    if _file_of(source, "tokenizer_config.json", "lora.init_from").is_file():
        config.data.tokenizer = source


def inherit_adapter(lora: LoraConfig, explicit: Collection[str], *, classifier: bool = True) -> None:
    """Sets `lora.*` to what `lora.init_from` says.

    Args:
        lora: to be completed.
        explicit: keys that the recipe or the command line gives.
        classifier: whether it may be a classifier's.

    Raises:
        ConfigError: for an explicit key that differs from the adapter's.
        CheckpointError: when the folder holds no adapter that can be trained here.
    """
    assert lora.init_from is not None
    source = lora.init_from = str(Path(lora.init_from).expanduser())
    theirs = _read_adapter(source, classifier=classifier)
    scale = scale_of(theirs)
    for name in ("rank", "dora", "targets", "experts"):
        mine = getattr(lora, name)
        same = (
            set(words_of(mine)) == set(words_of(theirs.targets)) if name == "targets" else mine == getattr(theirs, name)
        )
        if f"lora.{name}" in explicit and not same:
            raise ConfigError(
                f"lora.{name}={mine}, but lora.init_from={source} has {getattr(theirs, name)}: leave the key out"
            )
    mine = dataclasses.replace(theirs, alpha=lora.alpha, rslora=lora.rslora)
    is_scaled = "lora.alpha" in explicit or ("lora.rslora" in explicit and lora.rslora != theirs.rslora)
    if is_scaled and not math.isclose(scale_of(mine), scale):
        raise ConfigError(
            f"lora.alpha={lora.alpha}{' with lora.rslora' * lora.rslora} scales adapters by {scale_of(mine):g}, but "
            f"lora.init_from={source} has {scale:g}: leave the key{'s' * lora.rslora} out"
        )
    for name in ("rank", "alpha", "rslora", "dora", "targets", "experts"):
        setattr(lora, name, getattr(theirs, name))


def scale_of(lora: LoraConfig) -> float:
    """Gives the factor of what an adapter adds."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


READ = {
    *("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "bias"),
    *("use_rslora", "use_dora", "modules_to_save", "init_lora_weights"),
}
MEANINGLESS = {  # for what a finished adapter adds
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "peft_version"),
    *("revision", "runtime_config", "megatron_config", "megatron_core", "qalora_group_size", "eva_config"),
}
PLAIN_STARTS = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal")
"""What `init_lora_weights` may be; others, such as pissa and olora, change the adapted weights when PEFT reads one."""


def _read_adapter(source: str, *, classifier: bool) -> LoraConfig:
    """Reads the `adapter_config.json` of a folder, or of a hub id."""
    path = _file_of(source, "adapter_config.json", "lora.init_from")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        modules = [str(module).rpartition(".")[2] for module in described.get("target_modules") or []]
        parameters = [".".join(str(name).split(".")[-2:]) for name in described.get("target_parameters") or []]
        rank, alpha = int(described["r"]), float(described["lora_alpha"])
        if rank < 1:
            raise ValueError(f"r={rank}")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"lora.init_from={source}: {path} is no adapter's ({error!r}){_export_of(source)}"
        ) from None
    if not classifier and described.get("task_type") == "SEQ_CLS":
        raise CheckpointError(
            f"lora.init_from={source} is a classifier's adapter: give its data.format, {', '.join(PROBLEMS)}, or name "
            "an adapter of a language model"
        )
    unsupported = [name for name, value in described.items() if value and name not in READ | MEANINGLESS]
    if described.get("modules_to_save") not in (None, [], ["score"]):  # a classifier's head
        unsupported.append("modules_to_save")
    if described.get("init_lora_weights", True) not in PLAIN_STARTS:
        unsupported.append(f"init_lora_weights={described['init_lora_weights']}")
    if described.get("peft_type") != "LORA" or described.get("bias", "none") != "none" or unsupported:
        raise CheckpointError(
            f"lora.init_from={source}: {path} describes {described.get('peft_type')} with "
            f"{unsupported[0] if unsupported else 'bias'} set, expected plain LORA of one rank on unchanged weights"
        )
    experts = {"w1", "w2", "w3"}, {"experts.gate_up_proj", "experts.down_proj"}
    targets = [name for name in TARGETS if name in modules or f"{name}.weight" in parameters]
    unknown = {*modules, *parameters} - {*TARGETS, "gate.weight", *experts[0], *experts[1]}
    adapts_experts = experts[0] <= set(modules) or experts[1] <= set(parameters)
    if not adapts_experts:
        unknown |= {*modules, *parameters} & (experts[0] | experts[1])
    if unknown:
        raise CheckpointError(
            f"lora.init_from={source}: {path} adapts {', '.join(sorted(unknown))}, expected {', '.join(TARGETS)}, and "
            f"of the experts {sorted(experts[0])} or {sorted(experts[1])}"
        )
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        rslora=bool(described.get("use_rslora")),
        dora=bool(described.get("use_dora")),
        targets=",".join(targets),
        experts=adapts_experts,
    )


def _file_of(source: str, name: str, key: str) -> Path:
    """Says where a file of a folder is, or of a hub id, from which it is fetched; it may not be there."""
    if Path(source).is_dir():
        return Path(source) / name
    from train.data.hub import download

    return download(source, [name], key) / name


def _export_of(source: str) -> str:
    """Says, of a run's folder, where what it exported is, and by which key it is named; else nothing."""
    export = Path(source) / "export"
    for name, key in (("adapter_config.json", "lora.init_from"), ("config.json", "model.init_from")):
        if (export / name).is_file():
            return f"; it is a run's folder, whose export is meant perhaps: set {key}={export}"
    return ""


def _read(source: str) -> dict[str, Any]:
    """Reads the `config.json` of a folder, or of a hub id."""
    path = _file_of(source, "config.json", "model.init_from")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model.init_from={source}: {path} cannot be read ({error}){_export_of(source)}"
        ) from None
    if not isinstance(described, dict) or described.get("model_type") != "mixtral":
        found = described.get("model_type") if isinstance(described, dict) else None
        raise CheckpointError(
            f"model.init_from={source}: {path} describes a {found!r} model, expected 'mixtral'; "
            "cierzo convert brings other weights into its form"
        )
    if described.get("auto_map"):
        raise CheckpointError(
            f"model.init_from={source}: {path} wants code of its own to be run (auto_map), which never is: remove "
            "auto_map where the weights are a plain Mixtral's"
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
