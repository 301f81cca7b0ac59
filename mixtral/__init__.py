"""Mixtral: a sparse mixture-of-experts decoder that knows no rank, mesh or engine."""

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
]
