"""Scaled dot-product attention with grouped key/value heads: the reference of every backend."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def reference(
    module: nn.Module,
    query_BNSD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attends by the definition, holding the S x S probabilities.

    Args:
        module: the attention module; only its `training` flag is read.
        query_BNSD: queries.
        key_BGSD: keys; each serves N/G consecutive query heads.
        value_BGSD: values, likewise.
        attention_mask: (B, 1, S, keys), added to the scores; None means that all is visible.
        scaling: factor on the scores, D**-0.5.
        dropout: dropout of the probabilities in training.

    Returns:
        The output (B, S, N, D) and the probabilities (B, N, S, keys).

    Source: arXiv 1706.03762, equation 1; grouped heads: arXiv 2305.13245.
    """
    queries_per_key = query_BNSD.shape[1] // key_BGSD.shape[1]
    key_BNSD = key_BGSD.repeat_interleave(queries_per_key, dim=1)
    value_BNSD = value_BGSD.repeat_interleave(queries_per_key, dim=1)
    scores = query_BNSD @ key_BNSD.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    probabilities = F.softmax(scores, dim=-1, dtype=softmax_dtype).to(scores.dtype)
    probabilities = F.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value_BNSD).transpose(1, 2).contiguous(), probabilities
