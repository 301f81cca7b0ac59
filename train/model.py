"""The model of a run, built from its configuration."""

import dataclasses

import torch
from transformers import PreTrainedTokenizerBase

from mixtral import MixtralConfig, MixtralForCausalLM
from train.config import ModelConfig
from train.errors import ConfigError, MachineError


def model_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> MixtralConfig:
    """Translates the run's keys; the special tokens are the tokenizer's."""
    sizes = {name: value for name, value in dataclasses.asdict(config).items() if name != "attn_implementation"}
    return MixtralConfig(
        **sizes,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # a padding id would freeze that row of the embedding
        attn_implementation=config.attn_implementation,
    )


def build_model(config: MixtralConfig, seed: int) -> MixtralForCausalLM:
    """Builds a model with new weights in fp32, the same for a seed on every process.

    Raises:
        ConfigError, MachineError: when the attention backend cannot run here.
    """
    if config._attn_implementation == "flash_attention_2" and not torch.cuda.is_available():
        raise ConfigError("model.attn_implementation=flash_attention_2 needs a GPU: use sdpa")
    torch.manual_seed(seed)
    try:
        return MixtralForCausalLM(config)
    except ImportError as error:
        raise MachineError(f"model.attn_implementation={config._attn_implementation}: {error}") from None
