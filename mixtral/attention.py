"""What each attention backend needs, and our own, "windowed" and "tiled", in transformers' interface."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sdpa_mask
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
from transformers.utils.generic import is_flash_attention_requested

from mixtral.cache import holds_nothing
from mixtral.configuration import MixtralConfig
from mixtral.ops.tiled import Spans, spans, tiled_attention
from mixtral.ops.windowed import block_mask, blockwise_attention

WINDOWED, TILED = "windowed", "tiled"
HALF = (torch.float16, torch.bfloat16)


def register() -> None:
    """Makes our backends known by their names; given SDPA's mask, as where a cache holds keys, they are SDPA."""
    for name, forward in ((WINDOWED, windowed_forward), (TILED, tiled_forward)):
        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, sdpa_mask)


def check(config: MixtralConfig) -> None:
    """Refuses what the configured backend would ignore.

    Raises:
        ValueError: for windowed attention without a window, or dropout where the backend has none.
    """
    name = config._attn_implementation
    if name == WINDOWED and config.sliding_window is None:
        raise ValueError("attn_implementation='windowed' needs a sliding_window")
    if name in (WINDOWED, TILED, "flex_attention") and config.attention_dropout:
        raise ValueError(f"attn_implementation={name!r} has no attention_dropout: set it to 0")


def check_flash(config: MixtralConfig, hidden_BSH: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> None:
    """Refuses, in one error, what flash attention cannot compute or its installed version would ignore.

    Raises:
        ValueError: naming everything that is missing.
    """
    kernel = lazy_import_flash_attention(config._attn_implementation)[0][1]
    known = inspect.signature(kernel).parameters
    needs = []
    if hidden_BSH.dtype not in HALF and not torch.is_autocast_enabled(hidden_BSH.device.type):
        needs.append(f"half precision, not {hidden_BSH.dtype} (dtype=torch.bfloat16, or torch.autocast)")
    if config.sliding_window is not None and "window_size" not in known:
        needs.append(f"flash-attn >= 2.3 for sliding_window={config.sliding_window} (pip install -U flash-attn)")
    if config.attention_dropout and "dropout_p" not in known:
        needs.append(f"attention_dropout=0, not {config.attention_dropout}, which this version does not have")
    if cache is not None and cache.is_compileable and attention_mask is None:
        needs.append("an attention_mask beside a static cache, to tell which of its positions are filled")
    if needs:
        raise ValueError(f"attn_implementation={config._attn_implementation!r} needs {'; and '.join(needs)}")


def prepare(
    config: MixtralConfig,
    hidden_BSH: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    cache: Cache | None,
    *,
    packed: bool,
) -> tuple[Any, dict[str, Any]]:
    """Makes, once for all layers, the mask that the backend takes, and its further arguments.

    Args:
        config: of the model.
        hidden_BSH: what enters the first layer.
        attention_mask: (B, positions seen and new), 1 for tokens and 0 for padding, or a mask that is ready (4-D).
        position_ids: (B, S) or (1, S).
        cache: what was seen before.
        packed: whether positions that do not follow each other part the documents of a row.

    Raises:
        ValueError: when the backend cannot do what is asked.
    """
    check(config)
    flash = is_flash_attention_requested(config)
    if flash and not torch.compiler.is_compiling():
        check_flash(config, hidden_BSH, attention_mask, cache)
    if flash and packed:
        return None, _varlen(position_ids.expand(hidden_BSH.shape[:2]))
    ready = attention_mask is not None and attention_mask.dim() == 4
    if config._attn_implementation in (WINDOWED, TILED) and holds_nothing(cache) and not ready:
        documents_BS = _documents(hidden_BSH, attention_mask, position_ids)
        if config._attn_implementation == WINDOWED:
            assert config.sliding_window is not None
            return block_mask(documents_BS, config.sliding_window, hidden_BSH.dtype), {}
        found = spans(documents_BS)
        if found is not None:
            return found, {}
    make_mask = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
    mask = make_mask(
        config=config,
        inputs_embeds=hidden_BSH,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
    )
    return mask, {}


def _starts(position_ids: Tensor) -> Tensor:
    """Marks the positions that do not follow the one before them: (B, S), false in the first column."""
    return F.pad(position_ids.diff(dim=-1) != 1, (1, 0))


def _documents(hidden_BSH: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
    """Numbers the documents of each row, (B, S): -1 for padding; positions that restart begin a new one."""
    if attention_mask is not None:
        return attention_mask.long() - 1
    return _starts(position_ids).cumsum(dim=-1).expand(hidden_BSH.shape[:2])


def _varlen(position_ids_BS: Tensor) -> dict[str, Any]:
    """Tells flash attention where the documents of all rows begin, the rows laid end to end."""
    starts_BS = _starts(position_ids_BS)
    starts_BS[:, 0] = True
    borders = F.pad(starts_BS.flatten().nonzero().flatten(), (0, 1), value=starts_BS.numel()).int()
    longest = int(borders.diff().max())
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


def windowed_forward(
    module: nn.Module,
    query_BNSD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends in blocks, given the mask of `block_mask`; given any other, through SDPA. Returns (B, S, N, D)."""
    if attention_mask is None or attention_mask.dim() == 4:
        return sdpa_attention_forward(module, query_BNSD, key_BGSD, value_BGSD, attention_mask, **kwargs)
    out = blockwise_attention(query_BNSD, key_BGSD, value_BGSD, attention_mask)
    return out.transpose(1, 2).contiguous(), None


def tiled_forward(
    module: nn.Module,
    query_BNSD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Tensor | Spans | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends in tiles, given where documents are; given a mask, through SDPA. Returns (B, S, N, D)."""
    if attention_mask is None or isinstance(attention_mask, Tensor):
        return sdpa_attention_forward(module, query_BNSD, key_BGSD, value_BGSD, attention_mask, **kwargs)
    out = tiled_attention(query_BNSD, key_BGSD, value_BGSD, attention_mask, sliding_window)
    return out.transpose(1, 2), None
