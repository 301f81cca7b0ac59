"""The map between the hub's tensor names and this package's parameters.

On disk, one matrix per expert:  `...block_sparse_moe.experts.E.{w1,w3,w2}.weight` (gate, up, down).
In memory, all experts stacked:  `...mlp.experts.{gate_up_proj,down_proj}`, gate above up.
"""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming


def hub_layout() -> list[WeightRenaming | WeightConverter]:
    """Returns the transforms from disk to memory; `save_pretrained` reverses them."""
    return [
        WeightRenaming(".block_sparse_moe.", ".mlp."),
        WeightConverter(
            source_patterns=[".experts.*.w1.weight", ".experts.*.w3.weight"],
            target_patterns=".experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns=[".experts.*.w2.weight"],
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
