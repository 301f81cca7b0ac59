"""The published parameters, and the counts that follow from them."""

import inspect

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from mixtral import MixtralConfig, MixtralForCausalLM
from tests.conftest import SIZES

PUBLISHED = {  # the documentation page's signature
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def test_defaults_are_the_published_ones():
    config = MixtralConfig()
    assert {name: getattr(config, name) for name in PUBLISHED} == PUBLISHED


def test_every_parameter_of_transformers_exists_with_its_default():
    theirs, ours = transformers.MixtralConfig(), MixtralConfig()
    for name in inspect.signature(transformers.MixtralConfig).parameters:
        if name not in ("kwargs", "rope_parameters", "transformers_version", "architectures"):
            assert getattr(ours, name) == getattr(theirs, name), name


def test_rope_theta_is_read_and_written_in_both_forms(tmp_path):
    MixtralConfig(rope_theta=12345.0).save_pretrained(tmp_path)
    for config in (MixtralConfig.from_pretrained(tmp_path), transformers.MixtralConfig.from_pretrained(tmp_path)):
        assert config.rope_parameters["rope_theta"] == 12345.0
    assert MixtralConfig(rope_parameters={"rope_type": "default", "rope_theta": 5.0}).rope_theta == 5.0


def test_mixtral_8x7b_has_its_published_size():
    count = MixtralConfig().count_parameters()
    assert count.total == 46_702_792_704
    assert round(count.active / 1e9, 1) == 12.9


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 12, "num_key_value_heads": 1}])
def test_counts_equal_the_built_model(changes):
    config = MixtralConfig(**SIZES | changes)
    assert config.count_parameters().total == sum(p.numel() for p in MixtralForCausalLM(config).parameters())


def test_flops_equal_the_counted_ones():
    """Forward and backward are three times the forward's matrix products, attention counted without causality."""
    config = MixtralConfig(**SIZES)
    model = MixtralForCausalLM(config)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(0, 128, (1, 64)), use_cache=False)
    assert 3 * counter.get_total_flops() == 64 * config.training_flops_per_token(64)


def test_a_window_bounds_the_counted_keys():
    wide, narrow = MixtralConfig(**SIZES), MixtralConfig(**SIZES, sliding_window=16)
    assert narrow.training_flops_per_token(64) == wide.training_flops_per_token(16)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"hidden_size": 30}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ],
)
def test_contradicting_sizes_are_refused(changes, key):
    with pytest.raises(ValueError, match=key):
        MixtralConfig(**SIZES | changes)


def test_without_key_value_heads_every_query_head_has_its_own():
    assert MixtralConfig(**SIZES | {"num_key_value_heads": None}).num_key_value_heads == SIZES["num_attention_heads"]


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "nonsense"])
def test_rope_types_that_depend_on_length_or_do_not_exist_are_refused(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match=f"rope_type='{rope_type}'"):
        MixtralConfig(**SIZES, rope_parameters=rope)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_in_which_a_query_would_not_see_itself_is_refused(window):
    with pytest.raises(ValueError, match=f"sliding_window={window}: expected None, or a number above 0"):
        MixtralConfig(**SIZES, sliding_window=window)


def test_linear_rope_scaling_equals_transformers():
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, rope_parameters=dict(rope)))
    ours = MixtralForCausalLM(MixtralConfig(**SIZES, rope_parameters=dict(rope)))
    ours.load_state_dict(theirs.state_dict())
    input_ids = torch.randint(0, 128, (1, 40))
    assert (ours(input_ids).logits - theirs(input_ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "relu2"])
def test_any_registered_activation_equals_transformers(make_pair, activation):
    theirs, ours = make_pair(hidden_act=activation)
    silu, _ = make_pair()
    silu.load_state_dict(theirs.state_dict())
    input_ids = torch.randint(0, 128, (1, 12))
    assert (ours(input_ids).logits - theirs(input_ids).logits).abs().max() <= 1e-5
    assert (ours(input_ids).logits - silu(input_ids).logits).abs().max() > 1e-4


def test_a_function_as_activation_is_used_and_never_lost_on_the_way_to_a_file(tmp_path, make_pair):
    theirs, _ = make_pair(hidden_act="relu")
    config = MixtralConfig(**SIZES, hidden_act=torch.relu)
    ours = MixtralForCausalLM(config)
    ours.load_state_dict(theirs.state_dict())
    input_ids = torch.randint(0, 128, (1, 12))
    assert (ours(input_ids).logits - theirs(input_ids).logits).abs().max() <= 1e-5
    assert ours.generate(input_ids, max_new_tokens=2, do_sample=False).shape == (1, 14)
    assert "the function relu" in repr(config)
    for saved in (config, ours):
        with pytest.raises(ValueError, match="hidden_act=.* is a function"):
            saved.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.glob("saved/*.safetensors"))
    with pytest.raises(ValueError, match="hidden_act='the function relu' is neither"):
        MixtralConfig.from_dict(config.to_dict())
    config.hidden_act = "relu"
    ours.save_pretrained(tmp_path / "saved")
    assert MixtralConfig.from_pretrained(tmp_path / "saved").hidden_act == "relu"


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="hidden_act='sliu' is neither a function nor one of: .*silu"):
        MixtralConfig(**SIZES, hidden_act="sliu")
