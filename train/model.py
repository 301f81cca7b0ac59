"""The model of a run, built from its configuration: empty, with values that any layout draws alike."""

import dataclasses
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mixtral import MixtralConfig, MixtralForCausalLM
from train.config import ModelConfig
from train.errors import ConfigError, MachineError


def model_config(config: ModelConfig, bos_token_id: int | None, eos_token_id: int | None) -> MixtralConfig:
    """Translates the run's keys; the special tokens are its tokenizer's."""
    sizes = {name: value for name, value in dataclasses.asdict(config).items() if name != "attn_implementation"}
    return MixtralConfig(
        **sizes,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=None,  # a padding id would freeze that row of the embedding
        attn_implementation=config.attn_implementation,
    )


def empty_model(config: MixtralConfig) -> MixtralForCausalLM:
    """Builds a model without values, on the meta device.

    Raises:
        ConfigError, MachineError: when the attention backend cannot run here.
    """
    if config._attn_implementation == "flash_attention_2" and not torch.cuda.is_available():
        raise ConfigError("model.attn_implementation=flash_attention_2 needs a GPU: use sdpa")
    try:
        with torch.device("meta"):
            return MixtralForCausalLM(config)
    except ImportError as error:
        raise MachineError(f"model.attn_implementation={config._attn_implementation}: {error}") from None


def initial_weights(config: MixtralConfig, seed: int, experts: range) -> Iterator[tuple[str, Tensor]]:
    """Draws a new model's values in fp32: matrices from a normal distribution, norms of one.

    Every parameter, and every expert of one, has a generator of its own: a process that draws some gets what one
    that draws all of them gets.

    Args:
        config: of the model; `initializer_range` is the standard deviation.
        seed: of the run.
        experts: those to draw.
    """
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in MixtralForCausalLM(config).named_parameters()}

    def draw(name: str, shape: torch.Size) -> Tensor:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        return torch.empty(shape).normal_(std=config.initializer_range, generator=generator)

    for name, shape in shapes.items():
        if len(shape) == 3:
            yield name, torch.stack([draw(f"{name}/{expert}", shape[1:]) for expert in experts])
        elif len(shape) == 2:
            yield name, draw(name, shape)
        else:
            yield name, torch.ones(shape)
