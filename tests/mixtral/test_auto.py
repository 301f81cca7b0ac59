"""transformers' Auto classes before, while and after ours are registered."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import mixtral
from tests.conftest import SIZES

AUTOS = {
    AutoModel: "MixtralModel",
    AutoModelForCausalLM: "MixtralForCausalLM",
    AutoModelForSequenceClassification: "MixtralForSequenceClassification",
}


@pytest.fixture
def folder(tmp_path, make_model):
    make_model().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def registered():
    mixtral.register_auto_classes()
    mixtral.register_auto_classes()  # once more does no harm
    yield
    mixtral.unregister_auto_classes()


def check_that_autos_give(package, folder):
    assert type(AutoConfig.from_pretrained(folder)) is package.MixtralConfig
    for auto, name in AUTOS.items():
        assert type(auto.from_pretrained(folder)) is getattr(package, name)


def test_by_default_the_auto_classes_stay_transformers(folder):
    check_that_autos_give(transformers, folder)


def test_registered_the_auto_classes_give_ours_and_unregistered_transformers_again(folder, registered):
    check_that_autos_give(mixtral, folder)
    assert type(AutoModelForCausalLM.from_config(mixtral.MixtralConfig(**SIZES))) is mixtral.MixtralForCausalLM
    mixtral.unregister_auto_classes()
    check_that_autos_give(transformers, folder)
    assert type(AutoModelForCausalLM.from_config(mixtral.MixtralConfig(**SIZES))) is transformers.MixtralForCausalLM
    mixtral.unregister_auto_classes()
    check_that_autos_give(transformers, folder)


def test_registered_all_else_works_as_before(folder, registered):
    theirs = transformers.MixtralConfig(**SIZES)
    assert type(AutoModelForCausalLM.from_config(theirs)) is transformers.MixtralForCausalLM
    ids = torch.randint(3, 128, (1, 5))
    expected = mixtral.MixtralModel.from_pretrained(folder)(ids).last_hidden_state
    for auto in (AutoModelForTokenClassification, AutoModelForQuestionAnswering):
        model = auto.from_pretrained(folder)
        assert type(model).__module__ == "transformers.models.mixtral.modeling_mixtral"
        assert type(model.base_model) is mixtral.MixtralModel
        assert (model(ids, output_hidden_states=True).hidden_states[-1] - expected).abs().max() <= 1e-6
    words = Tokenizer(WordLevel({"w0": 0, "a": 1}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).get_vocab()["a"] == 1
    llama = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    assert type(AutoModelForCausalLM.from_config(llama)) is transformers.LlamaForCausalLM


def test_another_implementation_of_the_experts_is_refused(folder):
    with pytest.raises(ValueError, match="experts_implementation='batched_mm' is not supported"):
        mixtral.MixtralModel.from_pretrained(folder, experts_implementation="batched_mm")
