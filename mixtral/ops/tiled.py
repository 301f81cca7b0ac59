"""Causal attention in tiles of matrix products, which is how a CPU attends fastest.

A tile is some queries of one document and the keys that any of them sees: what the window hides, or lies in other
documents, is not computed. Shape letters: see `mixtral/modeling.py`; g key/value heads of a tile and m queries of each.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 256
"""Most queries of a tile: twice as many compute more that is hidden, half as many make small products."""
SCORES = 2**21
"""Most scores of a tile, unless a few queries have more."""
FEWEST = 32
"""A tile of a long document has at least so many queries."""

Spans = tuple[tuple[tuple[int, int], ...], ...]
"""Of each row, where its documents begin and end."""


@torch.compiler.disable
def spans(documents_BS: Tensor) -> Spans | None:
    """Says where the documents of each row begin and end; padding, whose number is negative, is none.

    Returns None where a document goes on after a gap, which no span says.
    """
    rows = []
    for row in documents_BS:
        numbers, lengths = row.unique_consecutive(return_counts=True)
        found = numbers[numbers >= 0]
        if len(found.unique()) < len(found):
            return None
        stops = lengths.cumsum(dim=0)
        borders = zip(numbers.tolist(), (stops - lengths).tolist(), stops.tolist(), strict=True)
        rows.append(tuple((start, stop) for number, start, stop in borders if number >= 0))
    return tuple(rows)


@torch.compiler.disable
def tiled_attention(
    query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, documents: Spans, window: int | None
) -> Tensor:
    """Equals `windowed.reference` in documents, and is zero outside; scores are of at least fp32.

    Nothing but the inputs is kept for backward.

    Args:
        query_BNSD: queries.
        key_BGSD: keys; each serves N/G consecutive query heads.
        value_BGSD: values, likewise.
        documents: from `spans`.
        window: W, the keys each query sees, itself included; None means all before it.

    Returns:
        (B, N, S, D), scaled by D**-0.5; in memory (B, S, N, D).
    """
    device = query_BNSD.device.type
    inputs = [query_BNSD, key_BGSD, value_BGSD]
    if torch.is_autocast_enabled(device):
        inputs = [x.to(torch.get_autocast_dtype(device)) for x in inputs]
    with torch.autocast(device, enabled=False):
        out_BNSD: Tensor = _TiledAttention.apply(*inputs, documents, window)
    return out_BNSD


class _Tile(NamedTuple):
    """Queries from `start` to `stop` of a row, keys from `first` on, for some key/value heads.

    With `edge`, a query does not see the keys whose place among the tile's, less its own, is at most that.
    """

    row: int
    heads: slice
    start: int
    stop: int
    first: int
    edge: int | None


def _tiles(heads: int, groups: int, documents: Spans, window: int | None) -> Iterator[_Tile]:
    for row, borders in enumerate(documents):
        for begin, end in borders:
            keys = end - begin if window is None else min(end - begin, window + QUERIES)
            most = SCORES // (heads // groups * keys)
            size = min(QUERIES, end - begin, max(FEWEST, most))
            together = min(groups, max(1, most // size))
            for head in range(0, groups, together):
                for start in range(begin, end, size):
                    first = begin if window is None else max(begin, start - window + 1)
                    stop = min(start + size, end)
                    edge = None if window is None or stop - first <= window else start - first - window
                    yield _Tile(row, slice(head, min(head + together, groups)), start, stop, first, edge)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, documents: Spans, window: int | None
    ) -> Tensor:
        ctx.save_for_backward(query_BNSD, key_BGSD, value_BGSD)
        ctx.documents, ctx.window = documents, window
        (batch, heads, length, dim), groups = query_BNSD.shape, key_BGSD.shape[1]
        out_BNSD = query_BNSD.new_zeros(batch, length, heads, dim).transpose(1, 2)
        work = _Work(query_BNSD)
        for tile in _tiles(heads, groups, documents, window):
            query_gmD, out = (_queries(x, tile, groups) for x in (query_BNSD, out_BNSD))
            seen_gmk = work.probabilities(query_gmD.flatten(1, 2), _keys(key_BGSD, tile), tile)
            out.copy_(torch.bmm(work.rounded(seen_gmk), _keys(value_BGSD, tile)).view_as(out))
        return out_BNSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNSD: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_BNSD.device.type, enabled=False):
            return *_TiledAttention.gradients(ctx, grad_BNSD), None, None

    @staticmethod
    def gradients(ctx: Any, grad_BNSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiates tile by tile, by queries, keys and values."""
        query_BNSD, key_BGSD, value_BGSD = ctx.saved_tensors
        heads, groups, scale = query_BNSD.shape[1], key_BGSD.shape[1], query_BNSD.shape[-1] ** -0.5
        work = _Work(query_BNSD)
        grad_query = torch.zeros_like(query_BNSD)
        grad_key, grad_value = (torch.zeros_like(x, dtype=work.wide) for x in (key_BGSD, value_BGSD))
        for tile in _tiles(heads, groups, ctx.documents, ctx.window):
            query_gmD, grad_gmD = (_queries(x, tile, groups).flatten(1, 2) for x in (query_BNSD, grad_BNSD))
            key_gkD, value_gkD = _keys(key_BGSD, tile), _keys(value_BGSD, tile)
            seen_gmk = work.rounded(work.probabilities(query_gmD, key_gkD, tile))
            _keys(grad_value, tile).add_(torch.bmm(seen_gmk.mT, grad_gmD))
            grad_gmk = torch.bmm(grad_gmD, value_gkD.mT, out=work.space("gradient", seen_gmk.shape, work.dtype))
            torch.ops.aten._softmax_backward_data.out(grad_gmk, seen_gmk, -1, work.dtype, grad_input=grad_gmk)
            out = _queries(grad_query, tile, groups)
            out.copy_(torch.bmm(grad_gmk, key_gkD).view_as(out))
            _keys(grad_key, tile).add_(torch.bmm(grad_gmk.mT, query_gmD))
        grad_query, grad_key = grad_query.mul_(scale), grad_key.mul_(scale)
        return grad_query, grad_key.to(key_BGSD.dtype), grad_value.to(value_BGSD.dtype)


def _queries(x_BNSD: Tensor, tile: _Tile, groups: int) -> Tensor:
    """Views a tile's queries, of each key/value head N/G times as many."""
    return x_BNSD[tile.row].unflatten(0, (groups, -1))[tile.heads, :, tile.start : tile.stop]


def _keys(x_BGSD: Tensor, tile: _Tile) -> Tensor:
    """Views a tile's keys."""
    return x_BGSD[tile.row, tile.heads, tile.first : tile.stop]


class _Work:
    """What the tiles of one call share: memory, which each uses again, and what hides keys."""

    def __init__(self, query_BNSD: Tensor) -> None:
        self.dtype = query_BNSD.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self._spaces: dict[str, Tensor] = {}
        self._hidden = torch.full((QUERIES, QUERIES), float("-inf"), dtype=self.wide, device=query_BNSD.device)
        self._later = self._hidden.triu(1)

    def space(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Gives memory that keeps what is written until it is asked for again."""
        held = self._spaces.get(name)
        if held is None or held.numel() < shape.numel():
            held = self._spaces[name] = torch.empty(shape.numel(), dtype=dtype, device=self._hidden.device)
        return held[: shape.numel()].view(shape)

    def probabilities(self, query_gmD: Tensor, key_gkD: Tensor, tile: _Tile) -> Tensor:
        """Softmax of a tile's scores, (g, m, keys), in at least fp32."""
        shape = torch.Size((*query_gmD.shape[:2], key_gkD.shape[1]))
        scores = self.space("scores", shape, self.wide)
        with _rounding.allowed(self.dtype, query_gmD.device):
            query, key, scale = query_gmD.to(self.wide), key_gkD.to(self.wide), query_gmD.shape[-1] ** -0.5
            torch.baddbmm(scores, query, key.mT, beta=0, alpha=scale, out=scores)
        size, keys = tile.stop - tile.start, tile.stop - tile.first
        of_query = scores.view(-1, size, keys)
        of_query[..., keys - size :].add_(self._later[:size, :size])
        if tile.edge is not None:
            width = size + tile.edge
            of_query[..., :width].add_(self._hidden[:size, :width].tril(tile.edge))
        return torch.softmax(scores, dim=-1, out=scores)

    def rounded(self, wide: Tensor) -> Tensor:
        """Rounds to the dtype of the inputs."""
        if wide.dtype == self.dtype:
            return wide
        return self.space("rounded", wide.shape, self.dtype).copy_(wide)


class _Rounding:
    """Lets a CPU multiply fp32 numbers that came from bf16 as bf16; the products and their sums are those of fp32.

    The setting is one of the process, so that fp32 products of other threads would be rounded meanwhile. The last of
    several threads to leave puts back what the first found.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, "none"

    @contextlib.contextmanager
    def allowed(self, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
        """Lets it inside the block, if the numbers came from bf16."""
        if dtype != torch.bfloat16 or device.type != "cpu":
            yield
            return
        backend: Any = torch.backends.mkldnn
        with self._lock:
            if self._inside == 0:
                self._before = backend.matmul.fp32_precision
                backend.matmul.fp32_precision = "bf16"
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    backend.matmul.fp32_precision = self._before


_rounding = _Rounding()
