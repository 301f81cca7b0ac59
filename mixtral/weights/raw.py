"""Mistral's raw release files: `params.json` and consolidated weights, read and written a tensor at a time.

Two layouts are around. `experts`, of the later releases: `consolidated.safetensors` with a matrix per expert,
`feed_forward.experts.E.w{1,2,3}.weight`. `fused`, of the first one: `consolidated.NN.pth` with a matrix per layer,
`block_sparse_moe.w{1,2,3}`, the experts one below the other, w2 transposed.

In both, the rotary embedding turns neighbouring rows of a head of wq and wk; the hub's layout turns the first half
against the second.

Source: https://github.com/mistralai/mistral-inference, and convert_mixtral_weights_to_hf.py of transformers 4.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral.configuration import MixtralConfig
from mixtral.weights import names
from mixtral.weights.files import Stored, WeightsError, inside, pickle_header, read_json, scan
from mixtral.weights.read import build_config, check_tensors, same
from mixtral.weights.write import Planned, TensorWriter, lay_out_pickled, lay_out_safetensors

OUTSIDE = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
IN_LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
PARAMS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
MOE_PARAMS = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"}
OPTIONAL = {"rope_theta", "sliding_window", "max_seq_len", "max_batch_size", "model_type", "moe"}
DEFAULT_LENGTH = 32_768  # the files do not say it; what transformers' script and the published Mixtral-8x7B have


@dataclass(frozen=True)
class Place:
    """Where a hub tensor lies in a raw file.

    Attributes:
        name: of the raw tensor.
        part: which of its equal row blocks, experts one below the other.
        parts: how many there are.
        heads: above 0, how many heads have their rotary rows interleaved.
        transposed: whether it lies there transposed.
    """

    name: str
    part: int = 0
    parts: int = 1
    heads: int = 0
    transposed: bool = False

    def shape(self, hub_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the raw tensor."""
        rows, *rest = reversed(hub_shape) if self.transposed else hub_shape
        return (rows * self.parts, *rest)

    def to_hub(self, tensor: Tensor) -> Tensor:
        """Turns what lies in the raw file into the hub's tensor."""
        return self._change(tensor, lambda w: w.unflatten(0, (self.heads, -1, 2)))

    def from_hub(self, tensor: Tensor) -> Tensor:
        """Turns the hub's tensor into what lies in the raw file."""
        return self._change(tensor, lambda w: w.unflatten(0, (self.heads, 2, -1)))

    def _change(self, tensor: Tensor, pairs: Callable[[Tensor], Tensor]) -> Tensor:
        if self.transposed:
            return tensor.T
        return pairs(tensor).transpose(1, 2).flatten(0, 2) if self.heads else tensor


def places(config: MixtralConfig, fused: bool) -> dict[str, Place]:
    """Says for each hub tensor where it lies in the raw files, in the order of the model."""
    block, heads = "block_sparse_moe" if fused else "feed_forward", config.num_attention_heads
    found = {}
    for name in names.hub_shapes(config):
        layer = names.layer_of(name)
        inner = name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight")
        if layer is None:
            found[name] = Place(OUTSIDE[name])
        elif expert := re.fullmatch(r"block_sparse_moe\.experts\.(\d+)\.(w[123])", inner):
            index, matrix = int(expert[1]), expert[2]
            found[name] = (
                Place(f"layers.{layer}.{block}.{matrix}", index, config.num_local_experts, transposed=matrix == "w2")
                if fused
                else Place(f"layers.{layer}.{block}.experts.{index}.{matrix}.weight")
            )
        elif inner == "block_sparse_moe.gate":
            found[name] = Place(f"layers.{layer}.{block}.gate.weight")
        else:
            rotary = {"self_attn.q_proj": heads, "self_attn.k_proj": config.num_key_value_heads}.get(inner, 0)
            found[name] = Place(f"layers.{layer}.{IN_LAYER[inner]}.weight", heads=rotary)
    return found


class RawFolder:
    """A folder of raw release files, opened and checked against its params.json; nothing is loaded yet.

    Args:
        folder: with `params.json` and `consolidated.safetensors`, its shards, or `consolidated.NN.pth`.

    Raises:
        WeightsError: for a folder without weights, a key of `params.json` that cannot be used, or a missing, unknown
            or misshapen tensor.
    """

    head: str | None = "lm_head"

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_params(self.folder / "params.json")
        self._tensors = _scan(self.folder)
        self._places = places(self.config, fused=any(".block_sparse_moe." in name for name in self._tensors))
        shapes = names.hub_shapes(self.config)
        expected = {place.name: place.shape(shapes[name]) for name, place in self._places.items()}
        check_tensors(expected, self._tensors, (), self.folder, "params.json")

    def dtypes(self) -> dict[str, torch.dtype]:
        """Returns the dtype of each hub tensor."""
        return {name: self._tensors[place.name].dtype for name, place in self._places.items()}

    def piece(self, name: str) -> Tensor:
        """Reads one hub tensor."""
        place = self._places[name]
        stored = self._tensors[place.name]
        raw = torch.empty((stored.shape[0] // place.parts, *stored.shape[1:]), dtype=stored.dtype)
        stored.read_into(raw, place.part)
        return place.to_hub(raw)


def _scan(folder: Path) -> dict[str, Stored]:
    found = scan(folder, stem="consolidated", pickled="consolidated.pth")
    if found:
        return found
    paths = sorted(path.name for path in folder.iterdir() if re.fullmatch(r"consolidated\.\d\d+\.(pth|pt)", path.name))
    if not paths:
        raise WeightsError(f"{folder} holds no weights: expected consolidated.safetensors or consolidated.00.pth")
    for name in paths:
        for tensor, stored in pickle_header(inside(folder, name)).items():
            other = found.setdefault(tensor, stored)
            if other is not stored and not same(other, stored):
                raise WeightsError(f"tensor {tensor} in {stored.path} differs from that in {other.path}")
    return found


class RawWriter:
    """Writes hub tensors as raw release files, one at a time in any order, and `params.json`.

    Args:
        folder: an existing one.
        config: the architecture.
        tensors: dtype and shape of each hub tensor.
        fused: whether in the layout of the first release.
        max_shard_bytes: bound on a file; by default one file, which is all that mistral-inference reads.

    Raises:
        WeightsError: for what the raw format cannot say.
    """

    def __init__(
        self,
        folder: Path,
        config: MixtralConfig,
        tensors: dict[str, Planned],
        fused: bool,
        max_shard_bytes: float = float("inf"),
    ) -> None:
        write_params(folder / "params.json", config)
        self._tied = config.tie_word_embeddings
        if self._tied:  # the raw format has no word for it: both are written
            config = MixtralConfig.from_dict(config.to_dict() | {"tie_word_embeddings": False})
            tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
        self._places = places(config, fused)
        raw: dict[str, Planned] = {}
        for name, place in self._places.items():
            planned = Planned(tensors[name].dtype, place.shape(tensors[name].shape))
            if raw.setdefault(place.name, planned) != planned:
                raise WeightsError(
                    f"tensor {name} is {planned.dtype}, others of {place.name} are {raw[place.name].dtype}: "
                    "give the dtype"
                )
        self._writer = TensorWriter(
            lay_out_pickled(folder, raw, max_shard_bytes)
            if fused
            else lay_out_safetensors(folder, raw, "consolidated", max_shard_bytes)
        )

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one hub tensor."""
        place = self._places[name]
        self._writer.add(place.name, place.from_hub(tensor), place.part)
        if self._tied and name == "model.embed_tokens.weight":
            self._writer.add(self._places["lm_head.weight"].name, tensor)

    def __enter__(self) -> "RawWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)


def read_params(path: Path) -> MixtralConfig:
    """Reads the architecture from `params.json`, in Mistral's spelling or in that of the hub's `config.json`.

    As in mistral-inference, `rope_theta` is by default 1e6, or 1e4 with a sliding window; in the hub's spelling 1e4,
    as in transformers' script.

    Raises:
        WeightsError: for a key that is missing or says what a Mixtral is not.
    """
    params = read_json(path)
    window = params.get("sliding_window")
    if isinstance(window, str) and window.isdecimal():  # as in some releases
        params["sliding_window"] = window = int(window)
    if "hidden_size" in params:
        return build_config(path, {"rope_theta": 1e4, "max_position_embeddings": DEFAULT_LENGTH} | params)
    moe = params.get("moe")
    if not isinstance(moe, dict):
        raise WeightsError(f"{path}: moe={moe!r}, expected an object with {' and '.join(MOE_PARAMS)}")
    for key in [*PARAMS, *MOE_PARAMS]:
        if key not in (params if key in PARAMS else moe):
            raise WeightsError(f"{path}: {key} is missing")
    for key, value in params.items():
        if value and key not in PARAMS and key not in OPTIONAL:
            raise WeightsError(f"{path}: {key}={value!r} is unknown, and a Mixtral without it would be another model")
    fields = {ours: params[theirs] for theirs, ours in PARAMS.items()}
    fields |= {ours: moe[theirs] for theirs, ours in MOE_PARAMS.items()}
    fields |= {"sliding_window": window, "rope_theta": params.get("rope_theta") or (1e4 if window else 1e6)}
    fields["max_position_embeddings"] = params.get("max_seq_len") or DEFAULT_LENGTH
    spelling = {ours: theirs for theirs, ours in (PARAMS | MOE_PARAMS).items()}
    return build_config(path, fields, spelling | {"max_position_embeddings": "max_seq_len"})


def write_params(path: Path, config: MixtralConfig) -> None:
    """Writes `params.json`.

    Raises:
        WeightsError: for settings that the raw format cannot say.
    """
    assert config.rope_parameters is not None
    for key, value, only in (
        ("hidden_act", config.hidden_act, "silu"),
        ("rope_parameters.rope_type", config.rope_parameters["rope_type"], "default"),
    ):
        if value != only:
            raise WeightsError(f"{key}={value!r} cannot be said in params.json, where it is always {only!r}")
    params: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in PARAMS.items()}
    params |= {"head_dim": config.attention_head_dim, "rope_theta": config.rope_theta}
    params |= {"max_seq_len": config.max_position_embeddings, "sliding_window": config.sliding_window}
    params["moe"] = {theirs: getattr(config, ours) for theirs, ours in MOE_PARAMS.items()}
    text = json.dumps({key: value for key, value in params.items() if value is not None}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
