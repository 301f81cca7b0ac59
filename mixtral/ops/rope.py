"""Rotary position embedding in the half-rotated layout of the hub's weights."""

import torch
from torch import Tensor


def rotate_half(x: Tensor) -> Tensor:
    """Maps (a, b), the two halves of the last dimension, to (-b, a)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rope(query_BNSD: Tensor, key_BGSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions.

    Args:
        query_BNSD: queries, heads before positions.
        key_BGSD: keys, likewise.
        cos_BSD: cosine of position times frequency, the D/2 frequencies repeated twice.
        sin_BSD: sine of the same.

    Returns:
        The rotated queries and keys, same shapes.

    Source: arXiv 2104.09864, equation 34, with dimension i paired with i + D/2.
    """
    cos, sin = cos_BSD.unsqueeze(1), sin_BSD.unsqueeze(1)
    return (
        query_BNSD * cos + rotate_half(query_BNSD) * sin,
        key_BGSD * cos + rotate_half(key_BGSD) * sin,
    )
