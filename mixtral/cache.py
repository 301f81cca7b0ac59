"""Key/value caches: one that rolls with the sliding window, and the tuples of the published interface."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer

from mixtral.configuration import MixtralConfig

LayerPast = tuple[Tensor, Tensor]


class RollingLayer(DynamicSlidingWindowLayer):
    """Holds the last W - 1 positions, which with a query itself are all that it sees.

    transformers' layer keeps a view, and by it the memory of a whole long prompt; and everything where W is 1.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds new positions; returns all that their queries may see: those held before, and the new ones."""
        keys_BGSD, values_BGSD = super().update(key_states, value_states, *args, **kwargs)
        if not self.record_past:
            self.keys, self.values = self._last(keys_BGSD), self._last(values_BGSD)
        return keys_BGSD, values_BGSD

    def _last(self, states_BGSD: Tensor) -> Tensor:
        length = states_BGSD.shape[2]
        last = states_BGSD[:, :, max(length - self.sliding_window + 1, 0) :]
        return last.clone() if length > self.sliding_window else last


class Tuples(tuple[LayerPast, ...]):
    """A (key, value) per layer, each (B, G, positions, D), that knows how many positions were seen in all."""

    seen: int


def roll(cache: Cache) -> None:
    """Makes the sliding layers of a cache that nothing was written to rolling ones."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
            cache.layers[index] = RollingLayer(layer.sliding_window)
            cache.layers[index].record_past = layer.record_past


def new(config: MixtralConfig) -> DynamicCache:
    """Returns an empty cache that grows, and rolls where the model has a window."""
    cache = DynamicCache(config=config)
    roll(cache)
    return cache


def from_tuples(
    past: tuple[LayerPast, ...], config: MixtralConfig, attention_mask: Tensor | None, new_positions: int
) -> DynamicCache:
    """Makes a cache of the published tuples.

    Args:
        past: a (key, value) per layer, each (B, G, positions, D); none at all is an empty past.
        config: of the model.
        attention_mask: (B, positions seen and new), which says how many there were where a window dropped some.
        new_positions: number of positions about to be added.

    Raises:
        ValueError: when the tuples do not fit the model, or do not tell the position that they end at.
    """
    cache = new(config)
    if not past:
        return cache
    held = past[0][0].shape[2]
    expected = (config.num_key_value_heads, held, config.attention_head_dim)
    fits = len(past) == config.num_hidden_layers and all(
        len(layer) == 2 and all(states.shape[1:] == expected for states in layer) for layer in past
    )
    if not fits:
        raise ValueError(
            f"past_key_values must be {config.num_hidden_layers} tuples (key, value) of shape "
            f"(batch, {', '.join(map(str, expected))})"
        )
    seen = held
    if isinstance(past, Tuples):
        seen = past.seen
    elif config.sliding_window is not None and held == config.sliding_window - 1:
        if attention_mask is None:
            raise ValueError(
                f"past_key_values hold sliding_window - 1 = {held} positions and may have lost earlier ones: "
                "give the attention_mask of all positions, or the tuples that the model returned, as they are"
            )
        seen = attention_mask.shape[1] - new_positions
    for layer, (key_BGSD, value_BGSD) in zip(cache.layers, past, strict=True):
        layer.update(key_BGSD, value_BGSD)
        if seen != held:
            layer.cumulative_length = seen
    return cache


def to_tuples(cache: DynamicCache) -> Tuples:
    """Returns what a cache holds as the published tuples."""
    tuples = Tuples((layer.keys, layer.values) for layer in cache.layers)
    tuples.seen = int(cache.get_seq_length())
    return tuples


def holds_nothing(cache: Cache | None) -> bool:
    """Whether the keys that queries see are the new ones alone, as they come."""
    return cache is None or (isinstance(cache, DynamicCache) and cache.get_seq_length() == 0)
