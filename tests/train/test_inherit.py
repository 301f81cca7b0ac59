"""A run that starts from given weights has their architecture, and says what it cannot take."""

import json

import pytest

from mixtral import MixtralConfig, MixtralForSequenceClassification
from tests.conftest import SIZES
from tests.train.helpers import read_json, run_small, write_corpus
from train.compose import compose
from train.errors import CheckpointError, ConfigError


@pytest.fixture
def weights(tmp_path, make_model):
    make_model(vocab_size=320, sliding_window=16, rope_theta=5e4).save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def inherited(weights, *words):
    words = [*words, "data.sequence_length=32", "evaluate.sample_tokens=4"]
    return compose(["recipe=pretrain_tiny", f"model.init_from={weights}", *words]).config


def test_the_architecture_and_the_tokenizer_are_those_of_the_weights(weights):
    config = inherited(weights)
    sizes = {name: getattr(config.model, name) for name in SIZES if name != "max_position_embeddings"}
    assert sizes == {name: SIZES[name] for name in sizes} | {"vocab_size": 320}
    assert (config.model.sliding_window, config.model.rope_theta) == (16, 5e4)
    assert config.data.tokenizer == str(weights)


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_the_tokenizer_beside_an_adapter_of_the_hub_is_taken_where_there_is_one(
    weights, tmp_path, monkeypatch, has_tokenizer
):
    hub = tmp_path / "hub"
    hub.mkdir()
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (hub / "adapter_config.json").write_text(json.dumps(adapter))
    if has_tokenizer:
        (hub / "tokenizer_config.json").write_text("{}")
    fetched = []
    monkeypatch.setattr("train.data.hub.download", lambda name, files, _: (fetched.append((name, *files)), hub)[1])
    name = "somebody/an-adapter@v2"
    config = inherited(weights, f"lora.init_from={name}")
    assert (config.lora.init_from, config.data.tokenizer) == (name, name if has_tokenizer else str(weights))
    assert fetched == [(name, "adapter_config.json"), (name, "tokenizer_config.json")]
    assert inherited(weights, f"lora.init_from={name}", "data.tokenizer=mixtral").data.tokenizer == "mixtral"


def test_an_explicit_size_that_differs_is_refused_and_one_that_agrees_is_not(weights):
    with pytest.raises(ConfigError, match="model.hidden_size=64, but model.init_from=.* has 32: leave the key out"):
        inherited(weights, "model.hidden_size=64")
    assert inherited(weights, "model.hidden_size=32").model.hidden_size == 32


def test_what_is_no_size_may_differ(weights):
    words = ["model.sliding_window=8", "model.router_aux_loss_coef=0.5", "model.attention_dropout=0.1"]
    model = inherited(weights, *words, "data.tokenizer=train_bpe").model
    assert (model.sliding_window, model.router_aux_loss_coef, model.attention_dropout) == (8, 0.5, 0.1)


BROKEN = {
    "no folder of weights": (None, "config.json cannot be read"),
    "another model": ({"model_type": "llama"}, "describes a 'llama' model"),
    "a word for a number": ({"num_hidden_layers": "3"}, "num_hidden_layers='3', expected int"),
    "nothing for a number": ({"rms_norm_eps": None}, "rms_norm_eps=None, expected float"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_config_that_cannot_be_used_is_named_before_torch_is_needed(weights, case):
    changes, message = BROKEN[case]
    path = weights / "config.json"
    if changes is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        inherited(weights)


def test_weights_that_cannot_be_used_end_with_four_and_no_step(weights, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    words = [f"data.path={corpus}", f"model.init_from={weights}", "data.tokenizer=train_bpe"]
    sizes = ["model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=3"]
    (weights / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes()[:-1])
    assert run_small(tmp_path / "cut", *words, *sizes) == 4
    assert "model.safetensors has" in capsys.readouterr().err
    MixtralForSequenceClassification(MixtralConfig(**SIZES | {"vocab_size": 320})).save_pretrained(weights)
    assert run_small(tmp_path / "classifier", *words, *sizes) == 4
    assert "holds a classifier, expected a causal language model" in capsys.readouterr().err
    assert read_json(tmp_path / "classifier" / "exit.json")["reason"] == "checkpoint"
    assert not (tmp_path / "classifier" / "export").exists()


@pytest.mark.parametrize(("name", "key"), [("config.json", "model"), ("adapter_config.json", "lora")])
def test_a_runs_folder_in_place_of_its_export_is_told_where_that_is(weights, tmp_path, name, key):
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="cannot be read") as plain:
        inherited(run)
    assert "export" not in str(plain.value)
    (run / "export" / name).write_text("{}")
    for words in ([run], [weights, f"lora.init_from={run}"]):
        with pytest.raises(CheckpointError, match=f"export is meant perhaps: set {key}.init_from={run}/export$"):
            inherited(*words)
