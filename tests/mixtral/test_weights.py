"""Files on disk: the hub's layout, both ways."""

import torch
import transformers
from safetensors.torch import load_file
from transformers import conversion_mapping

from mixtral import MixtralConfig, MixtralForCausalLM
from mixtral.weights.names import hub_layout
from tests.conftest import SIZES


def described(transforms):
    return [
        (
            list(t.source_patterns),
            list(t.target_patterns),
            [(type(op).__name__, vars(op)) for op in getattr(t, "operations", [])],
        )
        for t in transforms
    ]


def test_our_names_are_those_of_transformers():
    theirs = conversion_mapping._build_checkpoint_conversion_mapping()["mixtral"]
    assert described(hub_layout()) == described(theirs), (
        "transformers changed its map between the hub's tensor names and Mixtral's parameters: "
        "mixtral/weights/names.py must follow"
    )


def test_a_saved_model_loads_in_transformers_with_the_same_logits(make_model, tmp_path):
    model = make_model().eval()
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs) is transformers.MixtralForCausalLM
    input_ids = torch.randint(0, 128, (2, 20))
    with torch.no_grad():
        assert (theirs(input_ids).logits - model(input_ids).logits).abs().max() <= 1e-6


def test_a_model_saved_by_transformers_loads_in_ours(make_pair, tmp_path):
    theirs, _ = make_pair()
    theirs.save_pretrained(tmp_path)
    ours = MixtralForCausalLM.from_pretrained(tmp_path)
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


def test_every_expert_lands_under_its_own_name(tmp_path):
    """A distinct constant per layer, expert and matrix, read back from the file alone."""
    model = MixtralForCausalLM(MixtralConfig(**SIZES))
    inner = SIZES["intermediate_size"]
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for expert in range(8):
                base = 100 * index + 10 * expert
                layer.mlp.experts.gate_up_proj[expert, :inner] = base + 1
                layer.mlp.experts.down_proj[expert] = base + 2
                layer.mlp.experts.gate_up_proj[expert, inner:] = base + 3
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for index in range(3):
        for expert in range(8):
            for matrix in (1, 2, 3):
                tensor = tensors[f"model.layers.{index}.block_sparse_moe.experts.{expert}.w{matrix}.weight"]
                assert (tensor == 100 * index + 10 * expert + matrix).all()
