"""Makes transformers' Auto classes build our models, for those who ask for it."""

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from mixtral.configuration import MixtralConfig
from mixtral.heads import MixtralForCausalLM, MixtralForSequenceClassification
from mixtral.modeling import MixtralModel

OURS = {
    AutoModel: MixtralModel,
    AutoModelForCausalLM: MixtralForCausalLM,
    AutoModelForSequenceClassification: MixtralForSequenceClassification,
}


def register_auto_classes() -> None:
    """Makes `AutoConfig` and these three `AutoModel*` return our classes for the model type "mixtral".

    In this process, until `unregister_auto_classes`; importing the package alone changes nothing. Tokenizers, and what
    is built from transformers' own configuration, stay transformers'; so do the heads that we do not have, around our
    decoder.
    """
    AutoConfig.register(MixtralConfig.model_type, MixtralConfig, exist_ok=True)
    for auto, model in OURS.items():
        auto.register(MixtralConfig, model, exist_ok=True)


def unregister_auto_classes() -> None:
    """Gives the model type "mixtral" back to transformers; does nothing where it was not taken."""
    if CONFIG_MAPPING._extra_content.get(MixtralConfig.model_type) is MixtralConfig:
        del CONFIG_MAPPING._extra_content[MixtralConfig.model_type]
    for auto in OURS:
        auto._model_mapping._extra_content.pop(MixtralConfig, None)
