"""The map between the hub's tensor names and this package's parameters.

On disk, one matrix per expert:  `...block_sparse_moe.experts.E.{w1,w3,w2}.weight` (gate, up, down).
In memory, all experts stacked:  `...mlp.experts.{gate_up_proj,down_proj}`, gate above up.
"""

import re
from collections.abc import Iterable

from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from mixtral.configuration import MixtralConfig

STACKED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}  # in memory: on disk, from top to bottom
_STACKED_NAME = re.compile(r"(.*layers\.\d+\.)mlp\.experts\.(gate_up_proj|down_proj)")


def hub_layout() -> list[WeightRenaming | WeightConverter]:
    """Returns the transforms from disk to memory; `save_pretrained` reverses them."""
    sources = {name: [f".experts.*.{matrix}.weight" for matrix in matrices] for name, matrices in STACKED.items()}
    return [
        WeightRenaming(".block_sparse_moe.", ".mlp."),
        WeightConverter(
            source_patterns=sources["gate_up_proj"],
            target_patterns=".experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns=sources["down_proj"],
            target_patterns=".experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


def register() -> None:
    """Makes `from_pretrained` and `save_pretrained` of our models speak the hub's layout.

    transformers applies its own map, which equals this one, to its own classes only; a registered
    one serves every class of the model type.
    """
    register_checkpoint_conversion_mapping("mixtral", hub_layout(), overwrite=True)


def is_stacked(name: str) -> bool:
    """Says whether a parameter holds all experts of a layer; what an adapter adds to them is stacked alike."""
    return ".mlp.experts." in name


def unwrapped(name: str) -> str:
    """Names a parameter of a model that PEFT has wrapped parts of as if nothing were wrapped."""
    return name.replace(".base_layer.", ".").replace(".default.", ".")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of a model that are not frozen, by their unwrapped names."""
    return {unwrapped(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def layer_of(name: str) -> int | None:
    """Returns the decoder layer of a tensor, in memory or on the hub; None outside of the layers."""
    found = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def on_hub(name: str, experts: Iterable[int]) -> list[list[str]]:
    """Names the hub's tensors that make up a parameter.

    Args:
        name: of the parameter.
        experts: the experts wanted of a stacked parameter, in this order.

    Returns:
        For a stacked parameter a row per expert: its matrices from top to bottom. Else one row with one name.
    """
    found = _STACKED_NAME.fullmatch(name)
    if found is None:
        return [[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")]]
    layer, stacked = found.groups()
    return [
        [f"{layer}block_sparse_moe.experts.{expert}.{matrix}.weight" for matrix in STACKED[stacked]]
        for expert in experts
    ]


def shapes(config: MixtralConfig, head: str | None = "lm_head") -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every parameter, in the order of the model.

    Args:
        config: the architecture.
        head: `lm_head`, `score` of a sequence classifier, or None for the decoder alone, whose names lack `model.`.
    """
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    query, key_value = (
        heads * config.attention_head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate.weight": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, 2 * inner, hidden),
        "mlp.experts.down_proj": (experts, hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    prefix = "" if head is None else "model."
    found: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        found |= {f"{prefix}layers.{index}.{name}": shape for name, shape in layer.items()}
    found[f"{prefix}norm.weight"] = (hidden,)
    if head == "score":
        found["score.weight"] = (config.num_labels, hidden)
    elif head == "lm_head" and not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, hidden)
    return found


def hub_shapes(config: MixtralConfig, head: str | None = "lm_head") -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor on the hub, in the order of the model; `head` as in `shapes`."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes(config, head).items():
        rows = on_hub(name, range(config.num_local_experts))
        if is_stacked(name):
            shape = (shape[1] // len(rows[0]), shape[2])
        found |= {hub_name: shape for row in rows for hub_name in row}
    return found
