"""The windowed attention backend, `attn_implementation="windowed"`, in transformers' attention interface."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mixtral.configuration import MixtralConfig
from mixtral.ops.windowed import windowed_attention

NAME = "windowed"


def register() -> None:
    """Makes the backend known by its name; with a cache it is SDPA, whose mask it then takes."""
    AttentionInterface.register(NAME, windowed_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def check(config: MixtralConfig) -> None:
    """Refuses what the backend cannot do.

    Raises:
        ValueError: without a window, or with attention dropout.
    """
    if config._attn_implementation != NAME:
        return
    if config.sliding_window is None:
        raise ValueError("attn_implementation='windowed' needs a sliding_window")
    if config.attention_dropout:
        raise ValueError("attn_implementation='windowed' has no attention_dropout: set it to 0")


def documents(hidden_BSH: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
    """Numbers the documents of each row, (B, S): -1 for padding; positions that restart begin a new one."""
    if attention_mask is not None:
        return attention_mask.long() - 1
    starts = torch.nn.functional.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    return starts.cumsum(dim=-1).expand(hidden_BSH.shape[:2])


def windowed_forward(
    module: nn.Module,
    query_BNSD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends in blocks, given `documents` for a mask; with a cache, through SDPA. Returns (B, S, N, D)."""
    if attention_mask is None or attention_mask.dim() == 4:
        return sdpa_attention_forward(
            module,
            query_BNSD,
            key_BGSD,
            value_BGSD,
            attention_mask,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    out = windowed_attention(query_BNSD, key_BGSD, value_BGSD, attention_mask, sliding_window)
    return out.transpose(1, 2).contiguous(), None
