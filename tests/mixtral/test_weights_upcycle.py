"""Upcycling: the Mixtral computes what transformers' dense model does, or says why it cannot."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mixtral import MixtralForCausalLM
from mixtral.weights import WeightsError
from mixtral.weights.upcycle import DenseFolder
from tests.conftest import SIZES
from train.convert import main

DENSE_SIZES = {key: value for key, value in SIZES.items() if key != "num_local_experts"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 7}),
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, gelu": ("Llama", {"hidden_act": "gelu"}),
    "llama, llama3 rope, head_dim": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama, linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
}


def save_dense(folder, kind, changes):
    config = getattr(transformers, f"{kind}Config")(**DENSE_SIZES | {"initializer_range": 0.2} | changes)
    dense = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    dense.save_pretrained(folder)
    return dense


def upcycle(source, target, *words):
    return main(["--input_dir", str(source), "--output_dir", str(target), "--upcycle", "4", *words])


@pytest.mark.parametrize("name", MODELS)
def test_copies_compute_what_the_dense_model_does(tmp_path, name):
    dense = save_dense(tmp_path / "dense", *MODELS[name])
    assert upcycle(tmp_path / "dense", tmp_path / "moe", "--top_k", "3") == 0
    input_ids = torch.randint(0, 128, (2, 40))
    for family in (transformers.AutoModelForCausalLM, MixtralForCausalLM):
        model = family.from_pretrained(tmp_path / "moe").eval()
        assert model.config.num_experts_per_tok == 3
        with torch.no_grad():
            assert (model(input_ids).logits - dense(input_ids).logits).abs().max() <= 1e-5


def test_routers_follow_the_seed_and_choose_among_all_experts(tmp_path):
    save_dense(tmp_path / "dense", *MODELS["llama"])
    gates = {}
    for name, words in {"a": [], "again": [], "b": ["--seed", "1"]}.items():
        assert upcycle(tmp_path / "dense", tmp_path / name, *words) == 0
        tensors = load_file(tmp_path / name / "model.safetensors")
        gates[name] = torch.stack([tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(3)])
    assert torch.equal(gates["a"], gates["again"])
    assert not torch.equal(gates["a"], gates["b"])
    assert not torch.equal(gates["a"][0], gates["a"][1])
    assert gates["a"].std() == pytest.approx(0.2, rel=0.1)


def test_noise_makes_experts_differ_by_its_share_of_their_own_spread(tmp_path):
    save_dense(tmp_path / "dense", *MODELS["llama"])
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert upcycle(tmp_path / "dense", tmp_path / "moe", "--noise", "0.5") == 0
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    added = [
        tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"]
        - dense["model.layers.1.mlp.down_proj.weight"]
        for expert in range(4)
    ]
    for first, second in ((0, 1), (2, 3)):
        assert torch.stack([added[first].flatten(), added[second].flatten()]).corrcoef()[0, 1].abs() < 0.1
    expected = 0.5 * dense["model.layers.1.mlp.down_proj.weight"].std()
    assert all(noise.std() == pytest.approx(expected.item(), rel=0.1) for noise in added)
    for name, tensor in tensors.items():
        assert ".experts." in name or "gate" in name or torch.equal(tensor, dense[name])


def test_bf16_stays_bf16(tmp_path):
    dense = save_dense(tmp_path / "dense", *MODELS["mistral"])
    dense.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert upcycle(tmp_path / "half", tmp_path / "moe", "--noise", "0.1") == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "moe" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "config.json: attention_bias=True cannot be represented by a Mixtral"),
        ({"mlp_bias": True}, "config.json: mlp_bias=True cannot be represented"),
        ({"quantization_config": {"bits": 4}}, "config.json: quantization_config=.*bits.* cannot be represented"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "config.json: rope_parameters.rope_type='dynamic' cannot be represented by a Mixtral, expected 'default'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4}},
            "partial_rotary_factor=0.5 cannot be represented",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            r"layer_types=\['full_attention', .* cannot be represented by a Mixtral, expected of one kind",
        ),
        ({"model_type": "qwen2"}, "config.json: model_type='qwen2', expected 'llama' or 'mistral'"),
        ({"intermediate_size": 40}, r"tensor model.layers.0.mlp.gate_proj.weight .*\[48, 32\], but .*\[40, 32\]"),
        ({"num_hidden_layers": 4}, r"tensor model.layers.3.self_attn.q_proj.weight is missing in .*dense"),
    ],
    ids=str,
)
def test_what_a_mixtral_cannot_represent_is_refused_by_its_key(tmp_path, changes, message):
    save_dense(tmp_path / "dense", *MODELS["llama"])
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(WeightsError, match=message):
        DenseFolder(tmp_path / "dense")


def test_a_bias_that_the_configuration_hides_is_refused(tmp_path):
    save_dense(tmp_path / "dense", "Llama", {"attention_bias": True})
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": False}))
    with pytest.raises(WeightsError, match=r"tensor model.layers.0.self_attn.k_proj.bias in .* is unknown"):
        DenseFolder(tmp_path / "dense")
