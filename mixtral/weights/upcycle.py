"""Upcycling: a dense Mistral or Llama becomes a Mixtral whose experts begin as copies of its feed-forward network.

The weights of the chosen experts sum to one, so without noise the new model computes what the dense one did.

Source: arXiv 2212.05055, section 3.
"""

import re
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import LlamaConfig, MistralConfig

from mixtral.configuration import ROPE_TYPES, MixtralConfig
from mixtral.weights import names
from mixtral.weights.files import WeightsError, read_json, scan
from mixtral.weights.read import build_config, check_tensors, ignorable, whole

DENSE_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig}
DENSE = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
CARRIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_dropout", "rope_parameters"),
    *("hidden_act", "rms_norm_eps", "initializer_range", "tie_word_embeddings", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)


class DenseFolder:
    """A dense Mistral or Llama in the hub's layout, seen as a Mixtral; nothing is loaded yet.

    Args:
        folder: with `config.json` and weights.
        experts: E, copies of each layer's feed-forward network.
        top_k: K, experts per token.
        noise: standard deviation of what is added to each expert's matrices, in units of the matrix's own; the
            function is preserved at 0 alone.
        seed: of the routers, normal with the configuration's `initializer_range`, and of the noise.

    Attributes:
        config: of the Mixtral.

    Raises:
        WeightsError: for an architecture that a Mixtral cannot represent, or a missing, unknown or misshapen tensor.
    """

    head: str | None = "lm_head"

    def __init__(self, folder: str | Path, experts: int = 8, top_k: int = 2, noise: float = 0.0, seed: int = 0) -> None:
        self.folder = Path(folder)
        self.config = upcycled_config(self.folder / "config.json", experts, top_k)
        self._noise, self._seed = noise, seed
        self._tensors = scan(self.folder)
        if not self._tensors:
            raise WeightsError(f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin")
        shapes = names.hub_shapes(self.config)
        self._position = {name: index for index, name in enumerate(shapes)}
        expected = {dense: shape for name, shape in shapes.items() if (dense := _dense_name(name))}
        ignored = ignorable(self.config.tie_word_embeddings, self._tensors, self.folder)
        check_tensors(expected, self._tensors, ignored, self.folder, "config.json")

    def dtypes(self) -> dict[str, torch.dtype]:
        """Returns the dtype of each hub tensor; a router has that of the embedding."""
        return {name: self._tensors[_dense_name(name) or "model.embed_tokens.weight"].dtype for name in self._position}

    def piece(self, name: str) -> Tensor:
        """Makes one hub tensor: a copy, or a router."""
        # of its seed, the generator uses 32 bits; no model has as many tensors as seeds lie apart here
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self._position[name]) % 2**32)
        dense = _dense_name(name)
        if dense is None:
            shape = (self.config.num_local_experts, self.config.hidden_size)
            return torch.randn(shape, generator=generator) * self.config.initializer_range
        tensor = whole(self._tensors[dense])
        if not self._noise or dense == name:
            return tensor
        scale = self._noise * tensor.float().std()
        return (tensor + scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


def _dense_name(name: str) -> str | None:
    """Names the dense tensor that a hub tensor of the Mixtral is a copy of; None for a router."""
    if name.endswith(".block_sparse_moe.gate.weight"):
        return None
    return re.sub(r"block_sparse_moe\.experts\.\d+\.(w[123])\.", lambda found: f"mlp.{DENSE[found[1]]}.", name)


def upcycled_config(path: Path, experts: int, top_k: int) -> MixtralConfig:
    """Turns the `config.json` of a dense model into a Mixtral's.

    Raises:
        WeightsError: for a model type or key that a Mixtral cannot represent.
    """
    content = read_json(path)
    if content.get("model_type") not in DENSE_CONFIGS:
        expected = " or ".join(repr(kind) for kind in DENSE_CONFIGS)
        raise WeightsError(f"{path}: model_type={content.get('model_type')!r}, expected {expected}")
    try:
        dense = DENSE_CONFIGS[content["model_type"]].from_dict(content)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise WeightsError(f"{path}: {' '.join(str(error).split())}") from None
    rope = dense.rope_parameters
    for key, value, allowed in (
        ("attention_bias", getattr(dense, "attention_bias", False), (False,)),
        ("mlp_bias", getattr(dense, "mlp_bias", False), (False,)),
        ("quantization_config", content.get("quantization_config"), (None,)),
        ("rope_parameters.rope_type", rope["rope_type"], ROPE_TYPES),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
        ("layer_types", len(set(content.get("layer_types") or [None])), (1,)),
    ):
        if value not in allowed:
            only = "of one kind" if key == "layer_types" else " or ".join(repr(value) for value in allowed)
            shown = content.get(key, value)
            raise WeightsError(f"{path}: {key}={shown!r} cannot be represented by a Mixtral, expected {only}")
    fields = {key: getattr(dense, key) for key in CARRIED}
    fields["sliding_window"] = getattr(dense, "sliding_window", None)
    return build_config(path, fields | {"num_local_experts": experts, "num_experts_per_tok": top_k})
