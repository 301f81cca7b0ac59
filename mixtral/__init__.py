"""Mixtral: a sparse mixture-of-experts decoder that knows no rank, mesh or engine."""

from mixtral.auto import register_auto_classes, unregister_auto_classes
from mixtral.configuration import MixtralConfig
from mixtral.heads import (
    CausalLMOutput,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    SequenceClassifierOutput,
)
from mixtral.modeling import MixtralModel, ModelOutput

__all__ = [
    "CausalLMOutput",
    "MixtralConfig",
    "MixtralForCausalLM",
    "MixtralForSequenceClassification",
    "MixtralModel",
    "ModelOutput",
    "SequenceClassifierOutput",
    "register_auto_classes",
    "unregister_auto_classes",
]
