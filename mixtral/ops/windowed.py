"""Causal attention within a sliding window, at a cost that grows with S x W instead of S²."""

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_BLOCK = 64  # below this, a block's matrix products are too small to be fast


def visible(documents_BS: Tensor, window: int) -> Tensor:
    """Says which keys a query sees: (B, S, S), query before key.

    Those of its own document, itself and the `window` - 1 before it.

    Args:
        documents_BS: a number per document; negative for padding, which sees and is seen by itself alone.
        window: W.
    """
    positions = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    distance = positions[:, None] - positions[None, :]
    near = (distance >= 0) & (distance < window)
    same = documents_BS[:, :, None] == documents_BS[:, None, :]
    return near & same & ((documents_BS[:, :, None] >= 0) | (distance == 0))


def reference(query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, documents_BS: Tensor, window: int) -> Tensor:
    """Attends with the S x S mask of `visible`: the definition.

    Args:
        query_BNSD: queries.
        key_BGSD: keys; each serves N/G consecutive query heads.
        value_BGSD: values, likewise.
        documents_BS: as in `visible`.
        window: W, the keys each query sees, itself included.

    Returns:
        (B, N, S, D), scaled by D**-0.5.
    """
    mask = visible(documents_BS, window).unsqueeze(1)
    return F.scaled_dot_product_attention(query_BNSD, key_BGSD, value_BGSD, attn_mask=mask, enable_gqa=True)


def windowed_attention(
    query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, documents_BS: Tensor, window: int
) -> Tensor:
    """Equals `reference`, block by block: see `block_mask` and `blockwise_attention`."""
    mask = block_mask(documents_BS, window, query_BNSD.dtype)
    return blockwise_attention(query_BNSD, key_BGSD, value_BGSD, mask)


def block_mask(documents_BS: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """Cuts each row into blocks of queries, with as many blocks of keys before each as the window reaches back.

    Blocks of a quarter of the window: a query is multiplied with 1.25 W keys, and a key copied five times. The mask
    depends on no layer, so a model makes it once.

    Args:
        documents_BS: as in `visible`.
        window: W.
        dtype: of the queries.

    Returns:
        (B, blocks, 1, queries, keys), zero where a query sees a key, else minus infinity.
    """
    length = documents_BS.shape[1]
    size = min(max(-(-window // 4), SMALLEST_BLOCK), length)
    count = -(-length // size)
    before = min(-(-(window - 1) // size), count - 1)
    own = F.pad(documents_BS, (0, count * size - length), value=-1).unflatten(1, (count, size))
    seen = _with_blocks_before(own, before, dim=2, value=-1)
    query_at = torch.arange(size, device=own.device)[:, None] + before * size
    key_at = torch.arange((before + 1) * size, device=own.device)[None, :]
    near = (key_at <= query_at) & (key_at > query_at - window)
    same = own.unsqueeze(-1) == seen.unsqueeze(-2)
    real = (own >= 0).unsqueeze(-1) | (key_at == query_at)
    mask = torch.zeros(near.shape, dtype=dtype, device=own.device).expand(same.shape)
    return mask.masked_fill(~(near & same & real), float("-inf")).unsqueeze(2)


def blockwise_attention(query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, mask: Tensor) -> Tensor:
    """Attends block by block, given the mask of `block_mask`; otherwise as `reference`."""
    batch, _, length, _ = query_BNSD.shape
    count, _, size, keys = mask.shape[1:]

    def split(x_BNSD: Tensor) -> Tensor:
        """Cuts the sequence into blocks: (B, blocks, heads, queries, D)."""
        return F.pad(x_BNSD, (0, 0, 0, count * size - length)).unflatten(2, (count, size)).transpose(1, 2)

    def context(x_BGSD: Tensor) -> Tensor:
        return _with_blocks_before(split(x_BGSD), keys // size - 1, dim=3, value=0).flatten(0, 1)

    out = F.scaled_dot_product_attention(
        split(query_BNSD).flatten(0, 1),
        context(key_BGSD),
        context(value_BGSD),
        attn_mask=mask.flatten(0, 1),
        enable_gqa=True,
    )
    return out.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _with_blocks_before(blocks: Tensor, before: int, dim: int, value: int) -> Tensor:
    """Joins each block, of which dimension 1 has `count`, to the `before` that precede it, along `dim`."""
    count = blocks.shape[1]
    padded = F.pad(blocks, (0, 0) * (blocks.dim() - 2) + (before, 0), value=value)
    return torch.cat([padded[:, start : start + count] for start in range(before + 1)], dim=dim)
