"""Causal attention within a sliding window, at a cost that grows with S x W instead of S²."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, documents_BS: Tensor | None, window: int
) -> Tensor:
    """Equals `reference` in blocks of W queries, each of which sees its own block and the one before.

    `documents_BS` may be None where all rows are one document without padding.
    """
    batch, heads, length, _ = query_BNSD.shape
    groups = heads // key_BGSD.shape[1]
    key_BNSD, value_BNSD = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key_BGSD, value_BGSD))
    if documents_BS is None:
        documents_BS = torch.zeros(batch, length, dtype=torch.long, device=query_BNSD.device)
    blocks = -(-length // window)
    padding = blocks * window - length

    def split(x_BNSD: Tensor) -> Tensor:
        """Cuts the sequence into blocks, which join the batch."""
        return F.pad(x_BNSD, (0, 0, 0, padding)).unflatten(2, (blocks, window)).transpose(1, 2)

    def with_previous(x_BNSD: Tensor) -> Tensor:
        """Puts before each block the one that precedes it; before the first, nothing that is seen."""
        split_x = split(x_BNSD)
        return torch.cat((F.pad(split_x, (0, 0) * 3 + (1, 0))[:, :-1], split_x), dim=3).flatten(0, 1)

    own = F.pad(documents_BS, (0, padding), value=-1).unflatten(1, (blocks, window))
    before = F.pad(own, (0, 0, 1, 0), value=-1)[:, :-1]
    mask = _block_mask(own, torch.cat((before, own), dim=2), window)
    out = F.scaled_dot_product_attention(
        split(query_BNSD).flatten(0, 1), with_previous(key_BNSD), with_previous(value_BNSD), attn_mask=mask
    )
    return out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _block_mask(query_documents: Tensor, key_documents: Tensor, window: int) -> Tensor:
    """Says which of its 2W keys each of a block's W queries sees: (B * blocks, 1, W, 2W)."""
    query_at = torch.arange(window, device=query_documents.device)[:, None] + window
    key_at = torch.arange(2 * window, device=query_documents.device)[None, :]
    near = (key_at <= query_at) & (key_at > query_at - window)
    same = query_documents.unsqueeze(-1) == key_documents.unsqueeze(-2)
    real = (query_documents >= 0).unsqueeze(-1) | (key_at == query_at)
    return (near & same & real).flatten(0, 1).unsqueeze(1)
