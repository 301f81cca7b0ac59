"""The documented arguments and returns of the three classes, and what comes with transformers' base classes."""

import copy
import inspect
import re
import warnings

import pytest
import torch
import transformers

from mixtral import MixtralConfig, MixtralForCausalLM, MixtralForSequenceClassification, MixtralModel
from tests.conftest import SIZES, skew_router

COMMON = ["input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds"]
OPTIONS = ["use_cache", "output_attentions", "output_hidden_states"]
DOCUMENTED = {  # the documentation page's signatures, in its order
    MixtralModel: [*COMMON, *OPTIONS, "output_router_logits", "return_dict"],
    MixtralForCausalLM: [*COMMON, "labels", *OPTIONS, "output_router_logits", "return_dict"],
    MixtralForSequenceClassification: [*COMMON, "labels", *OPTIONS, "return_dict"],
}

PUBLISHED_ORDER = [
    *("loss", "aux_loss", "last_hidden_state", "logits", "past_key_values"),
    *("hidden_states", "attentions", "router_logits"),
]


def ids(rows=2, length=12):
    return torch.randint(3, 128, (rows, length))


def pair(name, **changes):
    """One of transformers' classes and ours, with the same weights."""
    sizes = SIZES | {"num_labels": 3, "pad_token_id": 0, "attn_implementation": "eager", **changes}
    theirs = getattr(transformers, name)(transformers.MixtralConfig(**sizes))
    skew_router(theirs)
    classes = {documented.__name__: documented for documented in DOCUMENTED}
    ours = classes[name](MixtralConfig(**sizes))
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def same(mine, other):
    """Whether two returned values, of any nesting, are equal to 1e-5."""
    if isinstance(other, tuple):
        return len(mine) == len(other) and all(same(*both) for both in zip(mine, other, strict=True))
    if isinstance(other, transformers.Cache):
        layers = zip(mine.layers, other.layers, strict=True)
        return all(same((a.keys, a.values), (b.keys, b.values)) for a, b in layers)
    return mine.shape == other.shape and (mine - other).abs().max() <= 1e-5


@pytest.mark.parametrize("model", DOCUMENTED)
def test_arguments_are_the_documented_ones_in_their_order(model):
    parameters = list(inspect.signature(model.forward).parameters)[1:]
    assert parameters[: len(DOCUMENTED[model])] == DOCUMENTED[model]


@pytest.mark.parametrize("name", [model.__name__ for model in DOCUMENTED])
def test_every_documented_return_equals_transformers_as_object_and_as_tuple(name):
    theirs, ours = pair(name)
    arguments = {
        "input_ids": ids(),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
        "use_cache": True,
        "output_attentions": True,
        "output_hidden_states": True,
    }
    if name != "MixtralForSequenceClassification":  # where the page has no router logits
        arguments["output_router_logits"] = True
    if name != "MixtralModel":
        arguments["labels"] = torch.tensor([0, 2]) if "Sequence" in name else arguments["input_ids"]
    expected, got = theirs(**arguments), ours(**arguments)
    assert set(got.keys()) == set(expected.keys())
    assert list(got.keys()) == [field for field in PUBLISHED_ORDER if field in expected]
    assert len(expected.keys()) >= 5
    assert all(same(got[key], expected[key]) for key in expected)
    as_tuple = ours(**arguments, return_dict=False)
    assert type(as_tuple) is tuple
    assert same(as_tuple, tuple(expected[key] for key in got))
    ours.config.return_dict = False
    assert type(ours(**arguments)) is tuple


def test_another_mixtral_configuration_is_refused_by_name():
    with pytest.raises(TypeError, match=r"transformers\..*MixtralConfig, expected a mixtral.MixtralConfig"):
        MixtralForCausalLM(transformers.MixtralConfig(**SIZES))


def test_options_follow_the_configuration_where_they_are_not_given():
    _, ours = pair("MixtralForCausalLM")
    for option in ("output_hidden_states", "output_attentions", "output_router_logits"):
        setattr(ours.config, option, True)
    output = ours(ids())
    assert [len(output.hidden_states), len(output.attentions), len(output.router_logits)] == [4, 3, 3]
    assert output.aux_loss is not None
    off = ours(ids(), output_hidden_states=False, output_attentions=False, output_router_logits=False, use_cache=False)
    assert list(off.keys()) == ["logits"]


def test_the_classifier_returns_router_logits_when_asked():
    _, ours = pair("MixtralForSequenceClassification")
    assert [tuple(layer.shape) for layer in ours(ids(), output_router_logits=True).router_logits] == [(24, 8)] * 3


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5])], ids=str)
def test_logits_to_keep_equals_transformers(keep):
    theirs, ours = pair("MixtralForCausalLM")
    input_ids = ids()
    expected = theirs(input_ids, logits_to_keep=keep).logits
    assert same(ours(input_ids, logits_to_keep=keep).logits, expected)
    assert expected.shape[1] < 12


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_dropout_equals_transformers_drop_for_drop(make_pair, implementation):
    theirs, ours = make_pair(attention_dropout=0.4, attn_implementation=implementation, initializer_range=0.2)
    input_ids = ids()
    without = ours.eval()(input_ids).logits
    outputs = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(3)
        outputs.append(model(input_ids, use_cache=False).logits)
    assert (outputs[1] - outputs[0]).abs().max() <= 1e-5
    assert (outputs[1] - without).abs().max() > 1e-2


@pytest.mark.parametrize("implementation", ["windowed", "tiled", "flex_attention"])
def test_backends_without_dropout_refuse_it_when_built_and_when_chosen_later(make_model, implementation):
    changes = {"sliding_window": 4, "attention_dropout": 0.1}
    message = f"attn_implementation='{implementation}' has no attention_dropout"
    with pytest.raises(ValueError, match=message):
        make_model(attn_implementation=implementation, **changes)
    model = make_model(**changes)
    model.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match=message):
        model(ids())


@pytest.mark.parametrize("implementation", ["sdpa", "windowed", "tiled", "flex_attention"])
def test_attentions_are_refused_where_the_backend_never_forms_them(make_model, implementation):
    model = make_model(attn_implementation=implementation, sliding_window=4)
    with pytest.raises(
        ValueError, match=f"output_attentions needs attn_implementation='eager', not '{implementation}'"
    ):
        model(ids(), output_attentions=True)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_equals_eager(make_model, window):
    model = make_model(sliding_window=window, initializer_range=0.2).eval()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    inputs = [{"attention_mask": mask}, {"position_ids": torch.cat([torch.arange(7), torch.arange(5)]).expand(2, -1)}]
    input_ids = ids()
    exact = copy.deepcopy(model).double()  # rounded, eager is further off than flex on some processors
    exact.set_attn_implementation("eager")
    model.set_attn_implementation("flex_attention")
    for arguments in inputs:
        with torch.no_grad():
            results = [one(input_ids, **arguments, use_cache=False).logits for one in (exact, model)]
        real = arguments.get("attention_mask", torch.ones(2, 12)).bool()
        # the exponential that torch compiles is rougher on processors without AVX-512
        bound = 1e-5 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 5e-5
        assert (results[1] - results[0])[real].abs().max() <= bound * results[0].abs().max()


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_the_embeddings_equals_transformers(make_pair, tied):
    theirs, ours = make_pair(tie_word_embeddings=tied)
    input_ids = ids()
    with torch.no_grad():  # a graph that is held would keep the old sizes
        before = ours(input_ids).logits
    for model in (theirs, ours):
        torch.manual_seed(1)
        model.resize_token_embeddings(131)
    got = ours(input_ids + 3).logits
    assert got.shape == (2, 12, 131)
    assert (got - theirs(input_ids + 3).logits).abs().max() <= 1e-5
    with torch.no_grad():
        assert torch.equal(ours(input_ids).logits[..., :128], before)
    assert ours.config.vocab_size == 131
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    ours(input_ids, labels=input_ids).loss.backward()
    assert ours.lm_head.weight.grad.shape == (131, 32)


def test_resizing_the_classifier_keeps_its_scores():
    _, ours = pair("MixtralForSequenceClassification")
    input_ids = ids()
    with torch.no_grad():  # a graph that is held would keep the old sizes
        before = ours(input_ids).logits
    ours.resize_token_embeddings(200)
    with torch.no_grad():
        assert torch.equal(ours(input_ids).logits, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_neither_gradients_nor_router_logits(make_model, reentrant):
    model = make_model(torch.float64, router_aux_loss_coef=1.0).train()
    arguments = {"input_ids": ids(), "output_router_logits": True, "output_hidden_states": True}
    arguments["labels"] = arguments["input_ids"]
    plain = model(**arguments)
    plain.loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    runs = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: runs.append(1))
    got = model(**arguments)
    got.loss.backward()
    assert len(runs) == 2
    for mine, other in zip(got.router_logits, plain.router_logits, strict=True):
        assert torch.equal(mine, other)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-12, atol=1e-15), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_model_has_the_same_loss_and_gradients(make_model):
    model = make_model(num_hidden_layers=1, sliding_window=5)
    input_ids = ids()
    arguments = {"input_ids": input_ids, "labels": input_ids, "output_router_logits": True, "use_cache": False}
    plain = model(**arguments)
    plain.loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model)
    got = compiled(**arguments)
    got.loss.backward()
    assert (got.logits - plain.logits).abs().max() <= 1e-5
    assert abs(got.loss - plain.loss) <= 1e-6
    largest = max(gradient.norm() for gradient in expected.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 1e-5 * max(expected[name].norm(), 1e-4 * largest), name


@pytest.mark.parametrize("name", [model.__name__ for model in DOCUMENTED])
def test_every_class_loads_what_it_and_transformers_saved(tmp_path, name):
    theirs, ours = pair(name)
    input_ids = ids()
    (tmp_path / "ours").mkdir()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(input_ids)[0]
    for loaded in (
        type(ours).from_pretrained(tmp_path / "ours"),
        type(ours).from_pretrained(tmp_path / "theirs"),
        type(theirs).from_pretrained(tmp_path / "ours"),
    ):
        assert same(loaded(input_ids)[0], expected)


def test_a_language_model_loads_into_the_other_classes_and_says_what_is_new(tmp_path, make_model, caplog):
    model = make_model().eval()
    model.save_pretrained(tmp_path)
    input_ids = ids()
    hidden = model.model(input_ids).last_hidden_state
    before = transformers.logging.get_verbosity()  # a run in this process may have asked for silence
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    classifier = MixtralForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    transformers.logging.disable_propagation()
    transformers.logging.set_verbosity(before)
    assert re.search(r"score\.weight.*MISSING", caplog.text)
    assert classifier.score.weight.shape == (5, 32)
    assert 0 < classifier.score.weight.std() < 0.1
    assert same(classifier.model(input_ids).last_hidden_state, hidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(MixtralModel.from_pretrained(tmp_path)(input_ids).last_hidden_state, hidden)


@pytest.mark.parametrize("implementation", ["windowed", "tiled"])
def test_our_backends_take_a_mask_that_is_ready(make_model, implementation):
    model = make_model(attn_implementation=implementation, sliding_window=4).eval()
    seen = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12).clone()
    seen[0, :, 5:, :5] = False
    input_ids = ids()
    got = model(input_ids, attention_mask=seen).logits
    model.set_attn_implementation("sdpa")
    expected = model(input_ids, attention_mask=seen).logits
    assert (got - expected).abs().max() <= 1e-6
    assert (got - model(input_ids).logits).abs().max() > 1e-5


def test_a_compiled_model_runs_tiled_attention_as_it_is(make_model):
    model = make_model(attn_implementation="tiled", num_hidden_layers=1).eval()
    compiled = torch.compile(model, backend="eager")
    input_ids = ids()
    expected = model(input_ids, use_cache=False).logits
    assert (compiled(input_ids, use_cache=False).logits - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("use_cache", [False, True])
def test_windowed_attention_forms_no_square_mask_even_for_a_prompt(make_model, use_cache):
    model = make_model(attn_implementation="windowed", sliding_window=8).eval()
    sizes = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(kwargs["attention_mask"].numel()), with_kwargs=True
    )
    model(ids(rows=1, length=640), use_cache=use_cache)
    assert sizes == [10 * 64 * 128]  # ten blocks of 64 queries, each with its own keys and those before
