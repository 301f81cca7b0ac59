"""Reading weights tensor by tensor: only what is asked for, each straight to where it stays."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtral.configuration import MixtralConfig
from mixtral.weights import names
from mixtral.weights.files import Stored, WeightsError, read_json, scan

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok"),
    *("max_position_embeddings", "sliding_window"),
)
MAX_EXPERTS = 1_000_000  # in all layers: a file that says more would be answered by running out of memory


class WeightFolder:
    """A folder of weights in the hub's layout, opened and checked against its config.json; nothing is loaded yet.

    Args:
        folder: holds `config.json` and the weights: safetensors or PyTorch files, single or sharded.

    Attributes:
        config: the architecture.
        head: `lm_head`, `score`, or None for the decoder alone.
        tensors: the files' tensors by their names in the files.

    Raises:
        WeightsError: for a folder without weights, or a missing, unknown or misshapen tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.tensors = scan(self.folder)
        if not self.tensors:
            raise WeightsError(f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin")
        self.head = None if "norm.weight" in self.tensors else "score" if "score.weight" in self.tensors else "lm_head"
        expected = names.hub_shapes(self.config, self.head)
        ignored = ignorable(self.config.tie_word_embeddings, self.tensors, self.folder)
        check_tensors(expected, self.tensors, ignored, self.folder, "config.json")

    def dtypes(self) -> dict[str, torch.dtype]:
        """Returns the dtype of each hub tensor."""
        return {name: self.tensors[name].dtype for name in names.hub_shapes(self.config, self.head)}

    def piece(self, name: str) -> Tensor:
        """Reads one hub tensor."""
        return whole(self.tensors[name])

    def dtype(self, name: str, experts: Sequence[int]) -> torch.dtype:
        """Returns the dtype that a parameter has in the files.

        Raises:
            WeightsError: when its parts differ.
        """
        parts = [hub_name for row in names.on_hub(name, experts) for hub_name in row]
        first = self.tensors[parts[0]]
        for hub_name in parts:
            if (stored := self.tensors[hub_name]).dtype != first.dtype:
                raise WeightsError(
                    f"tensor {hub_name} in {stored.path} is {stored.dtype}, {parts[0]} is {first.dtype}: give the dtype"
                )
        return first.dtype

    def fill(self, name: str, out: Tensor, experts: Sequence[int]) -> None:
        """Fills `out` with a parameter, or with the given experts of a stacked one; other bytes are not read."""
        rows = names.on_hub(name, experts)
        for index, row in enumerate(rows):
            target = out[index] if names.is_stacked(name) else out
            for hub_name, part in zip(row, target.chunk(len(row)), strict=True):
                self.tensors[hub_name].read_into(part)

    def tensor(self, name: str, experts: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Reads a parameter, or the given experts of a stacked one, into a new tensor."""
        shape = names.shapes(self.config, self.head)[name]
        if names.is_stacked(name):
            shape = (len(experts), *shape[1:])
        out = torch.empty(shape, dtype=dtype or self.dtype(name, experts))
        self.fill(name, out, experts)
        return out

    def select_experts(self, experts: Iterable[int] | None) -> list[int]:
        """Lists the experts asked for, all by default.

        Raises:
            ValueError: for one that the model does not have.
        """
        count = self.config.num_local_experts
        chosen = list(range(count) if experts is None else experts)
        if not chosen or not all(0 <= expert < count for expert in chosen):
            raise ValueError(f"experts={experts}: the model in {self.folder} has experts 0 to {count - 1}")
        return chosen


def whole(stored: Stored) -> Tensor:
    """Reads a stored tensor."""
    out = torch.empty(stored.shape, dtype=stored.dtype)
    stored.read_into(out)
    return out


def same(one: Stored, other: Stored) -> bool:
    """Says whether two stored tensors are equal in dtype, shape and values."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(whole(one), whole(other))


def read_config(folder: Path) -> MixtralConfig:
    """Reads the `config.json` of a Mixtral folder.

    Raises:
        WeightsError: when it is missing, not a Mixtral's, wants code to be run, or contradicts itself.
    """
    path = folder / "config.json"
    if not path.exists() and (folder / "params.json").exists():
        raise WeightsError(f"{folder} holds Mistral's raw files: `cierzo convert` brings them into the hub's layout")
    content = read_json(path)
    if content.get("model_type") != "mixtral":
        raise WeightsError(
            f"{path}: model_type={content.get('model_type')!r}, expected 'mixtral'; "
            "a dense mistral or llama can be upcycled to one"
        )
    if content.get("auto_map"):
        raise WeightsError(
            f"{path} wants code of its own to be run (auto_map), which never is: remove auto_map where the weights are "
            "a plain Mixtral's"
        )
    return build_config(path, content)


def build_config(path: Path, fields: Mapping[str, Any], spelling: Mapping[str, str] | None = None) -> MixtralConfig:
    """Builds the configuration that a file describes.

    Args:
        path: of the file, for errors.
        fields: of the configuration.
        spelling: how the file calls those that it calls otherwise.

    Raises:
        WeightsError: when a value cannot be used.
    """

    def called(key: str) -> str:
        return (spelling or {}).get(key, key)

    for key in SIZES:
        if (value := fields.get(key)) is not None and (type(value) is not int or value < 1):
            raise WeightsError(f"{path}: {called(key)}={value!r}, expected a whole number above 0")
    for key in ("rms_norm_eps", "rope_theta"):
        if (value := fields.get(key)) is not None and (type(value) not in (int, float) or value <= 0):
            raise WeightsError(f"{path}: {called(key)}={value!r}, expected a number above 0")
    if type(fields.get("tie_word_embeddings", False)) is not bool:
        raise WeightsError(f"{path}: tie_word_embeddings={fields['tie_word_embeddings']!r}, expected true or false")
    if fields.get("quantization_config"):
        raise WeightsError(f"{path}: quantization_config is set, expected weights that are not quantized")
    try:
        config = MixtralConfig.from_dict(dict(fields))
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise WeightsError(f"{path}: {' '.join(str(error).split())}") from None
    if config.num_hidden_layers * config.num_local_experts > MAX_EXPERTS:
        raise WeightsError(
            f"{path}: {called('num_hidden_layers')}={config.num_hidden_layers} times "
            f"{called('num_local_experts')}={config.num_local_experts}, expected at most {MAX_EXPERTS:,} experts in all"
        )
    return config


def ignorable(tied: bool, tensors: Mapping[str, Stored], folder: Path) -> set[str]:
    """Returns the tensors that say nothing new: frequencies in old files, and a head equal to the embedding it shares.

    Raises:
        WeightsError: when such a head differs.
    """
    found = {name for name in tensors if name.endswith(".rotary_emb.inv_freq")}
    head, embedding = (tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if not tied or head is None or embedding is None:
        return found
    if not same(head, embedding):
        raise WeightsError(
            f"tensor lm_head.weight in {head.path} differs from model.embed_tokens.weight, but config.json in {folder} "
            "says tie_word_embeddings=true, expected equal ones: set it to false"
        )
    return {*found, "lm_head.weight"}


def check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Stored],
    ignored: Iterable[str],
    folder: Path,
    config_name: str,
) -> None:
    """Compares what a folder holds with what its configuration expects.

    Raises:
        WeightsError: for the first missing, unknown or misshapen tensor.
    """
    for name, shape in expected.items():
        stored = tensors.get(name)
        if stored is None:
            raise WeightsError(
                f"tensor {name} is missing in {folder}: {config_name} expects it, of shape {list(shape)}"
            )
        if stored.shape != shape:
            raise WeightsError(
                f"tensor {name} in {stored.path} has shape {list(stored.shape)}, "
                f"but {config_name} expects {list(shape)}"
            )
    for name in sorted(tensors.keys() - expected.keys() - set(ignored)):
        raise WeightsError(f"tensor {name} in {tensors[name].path} is unknown: {config_name} expects no such tensor")


def read(
    folder: str | Path,
    *,
    experts: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Reads a folder of weights as our model's parameters, one at a time; bytes not asked for are never read.

    Args:
        folder: with `config.json` and weights in the hub's layout.
        experts: which experts, in this order, the stacked parameters hold; by default all. All other tensors,
            the routers among them, are whole.
        layers: which decoder layers; by default all, and with them what lies outside of the layers.
        dtype: of the tensors; by default as in the files.

    Yields:
        Name and tensor, in the order of the model: `model.layers.L.mlp.experts.gate_up_proj` (experts, 2I, H),
        `...down_proj` (experts, H, I), `lm_head.weight` (V, H).

    Raises:
        WeightsError: when the folder cannot be used; before the first tensor but for a file that ends early.
        ValueError: for experts or layers that the model does not have.
    """
    source = WeightFolder(folder)
    chosen = source.select_experts(experts)
    wanted: set[int | None] | None = None if layers is None else set(layers)
    count = source.config.num_hidden_layers
    if wanted is not None and not wanted <= set(range(count)):
        raise ValueError(f"layers={layers}: the model in {folder} has layers 0 to {count - 1}")
    for name in names.shapes(source.config, source.head):
        if wanted is None or names.layer_of(name) in wanted:
            yield name, source.tensor(name, chosen, dtype)


def load(model: nn.Module, folder: str | Path, *, experts: Iterable[int] | None = None) -> None:
    """Fills a model's parameters in place from a folder, in their own dtypes.

    A parameter on the meta device becomes a real one on the CPU, one after the other, so a model built under
    `torch.device("meta")` never exists twice.

    Args:
        model: whose parameters have the names of our models.
        folder: as for `read`.
        experts: which experts the model's stacked parameters hold; by default all.

    Raises:
        WeightsError: when the folder cannot be used, or names or shapes differ from the model's. Nothing is
            changed then.
        ValueError: for experts that the folder does not have.
    """
    source = WeightFolder(folder)
    chosen = source.select_experts(experts)
    expected = names.shapes(source.config, source.head)
    parameters = dict(model.named_parameters())
    for name in [*expected, *parameters]:
        found = tuple(parameters[name].shape) if name in parameters else None
        shape = expected.get(name)
        if shape is not None and names.is_stacked(name):
            shape = (len(chosen), *shape[1:])
        if found != shape:
            raise WeightsError(f"tensor {name}: {_size(shape)} in {folder}, {_size(found)} in the model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.is_meta:
                parameter = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, parameter)
            source.fill(name, parameter.data, chosen)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()  # a head that shares the embedding's matrix was on the meta device too


def _size(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"shape {list(shape)}"
