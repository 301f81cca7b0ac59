"""Caches against a full recomputation, and the published tuples."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from mixtral import MixtralForSequenceClassification, MixtralModel
from tests.conftest import logits_in_parts

WINDOW = 9


def bytes_of(layer):
    return layer.keys.untyped_storage().nbytes(), layer.values.untyped_storage().nbytes()


@pytest.mark.parametrize("window", [1, 2, WINDOW])
def test_the_cache_never_holds_more_than_the_window(make_model, window):
    """Real memory, after every step of a generation whose prompt alone is longer; 2 key/value heads of 8, fp32."""
    model = make_model(sliding_window=window).eval()
    held = []

    def look(_module, _inputs, output):
        for layer in output.past_key_values.layers:
            held.append(layer.keys.shape[2])
            assert max(bytes_of(layer)) <= 3 * 2 * window * 8 * 4

    model.model.register_forward_hook(look)
    model.generate(torch.randint(3, 128, (3, 40)), min_new_tokens=30, max_new_tokens=30, do_sample=False)
    assert len(held) == 30 * 3
    assert set(held) == {window - 1}


@pytest.mark.parametrize("made", ["by the model", "by the user", "static"])
@pytest.mark.parametrize("window", [None, 1, WINDOW, 60])
def test_steps_with_a_cache_equal_a_full_recomputation(make_model, made, window):
    model = make_model(sliding_window=window).eval()
    ids = torch.randint(3, 128, (2, 40))
    expected = model(ids, use_cache=False).logits
    past = {
        "by the model": None,
        "by the user": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=40),
    }[made]
    parts = []
    for part in ids.split([17, *[1] * 23], dim=1):
        output = model(part, past_key_values=past, use_cache=True)
        past = output.past_key_values
        parts.append(output.logits)
    assert (torch.cat(parts, dim=1) - expected).abs().max() <= 1e-5


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chunks_through_any_window_equal_a_full_recomputation(make_model, data):
    torch.manual_seed(0)
    length = data.draw(st.integers(2, 40))
    window = data.draw(st.one_of(st.none(), st.integers(1, length + 2)))
    implementation = data.draw(st.sampled_from(["sdpa", "eager", "tiled", *(["windowed"] if window else [])]))
    padding = data.draw(st.integers(0, length - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1))))
    model = make_model(sliding_window=window, num_hidden_layers=2, attn_implementation=implementation).eval()
    ids, mask = torch.randint(3, 128, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[1, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    got = logits_in_parts(model, ids, mask, itertools.pairwise([0, *cuts, length]))
    assert (got - expected)[mask.bool()].abs().max() <= 1e-5


@pytest.mark.parametrize("window", [None, WINDOW])
def test_tuples_go_in_and_come_out_and_continue_as_a_cache_does(make_model, window):
    model = make_model(sliding_window=window).eval()
    ids = torch.randint(3, 128, (2, 40))
    expected = model(ids, use_cache=False).logits
    past, parts = (), []
    for part in ids.split([17, 3, *[1] * 20], dim=1):
        output = model(part, past_key_values=past, use_cache=True)
        past = output.past_key_values
        assert isinstance(past, tuple)
        assert {tuple(states.shape[:2]) for layer in past for states in layer} == {(2, 2)}
        parts.append(output.logits)
    assert (torch.cat(parts, dim=1) - expected).abs().max() <= 1e-5
    assert past[0][0].shape == past[2][1].shape == (2, 2, 40 if window is None else window - 1, 8)


def test_every_class_hands_tuples_back(make_model):
    config = make_model(num_labels=3).config
    ids = torch.randint(3, 128, (2, 6))
    for model in (make_model(), MixtralModel(config), MixtralForSequenceClassification(config)):
        first = model.eval()(ids, use_cache=True)
        past = tuple((layer.keys, layer.values) for layer in first.past_key_values.layers)
        output = model(ids[:, :1], past_key_values=past, return_dict=False)
        (returned,) = (part for part in output if isinstance(part, tuple))
        assert [[states.shape[2] for states in layer] for layer in returned] == [[7, 7]] * 3
        assert torch.equal(returned[1][0][:, :, :6], past[1][0])


def test_bare_tuples_of_a_full_window_take_their_position_from_the_mask(make_model):
    model = make_model(sliding_window=WINDOW).eval()
    ids = torch.randint(3, 128, (2, 21))
    expected = model(ids, use_cache=False).logits[:, -1:]
    cache = model(ids[:, :20], use_cache=True).past_key_values
    bare = tuple((layer.keys, layer.values) for layer in cache.layers)
    mask = torch.ones(2, 21, dtype=torch.long)
    got = model(ids[:, 20:], past_key_values=bare, attention_mask=mask).logits
    assert (got - expected).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="attention_mask of all positions"):
        model(ids[:, 20:], past_key_values=bare)


@pytest.mark.parametrize(
    "past",
    [
        ((torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8)),) * 2,
        ((torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5, 8)),) * 3,
        ((torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 4, 8)),) * 3,
        ((torch.zeros(2, 2, 5, 8),),) * 3,
    ],
    ids=["layers", "heads", "lengths", "no values"],
)
def test_tuples_that_do_not_fit_are_refused(make_model, past):
    with pytest.raises(
        ValueError, match=r"past_key_values must be 3 tuples \(key, value\) of shape \(batch, 2, 5, 8\)"
    ):
        make_model()(torch.randint(3, 128, (2, 1)), past_key_values=past)


def test_a_cache_under_gradient_checkpointing_is_refused(make_model):
    model = make_model().train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="use_cache=False"):
        model(torch.randint(3, 128, (2, 4)), use_cache=True)
    assert model(torch.randint(3, 128, (2, 4))).past_key_values is None
