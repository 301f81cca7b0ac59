"""Every parameter of a run's model, named and sized from the configuration alone, in the model's own order.

Shape letters: see `mixtral/modeling.py`; r is the rank of an adapter.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from train.config import PROBLEMS, Config, trained_names, words_of


@dataclass(frozen=True)
class Weight:
    """A parameter of the whole model.

    Attributes:
        name: as of a model that nothing wraps.
        shape: with all experts.
        trained: whether it has a gradient.
    """

    name: str
    shape: tuple[int, ...]
    trained: bool

    @functools.cached_property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @functools.cached_property
    def layer(self) -> int | None:
        """The number of the layer that it is in."""
        return int(self.name.split(".")[2]) if ".layers." in self.name else None

    @functools.cached_property
    def is_expert(self) -> bool:
        """Whether it is stacked over the experts, which expert parallelism splits."""
        return ".mlp.experts." in self.name

    @property
    def is_matrix(self) -> bool:
        """Whether it has weight decay: the optimizer keeps such ones in a group of their own."""
        return len(self.shape) >= 2


def weights_of(config: Config) -> list[Weight]:
    """Lists the parameters of a run's model, its adapters among them, in the order of `named_parameters`."""
    chosen = trained_names(config) if config.lora.rank == 0 else {"score.weight"}
    shapes = dict(_shapes(config))
    return [Weight(name, shape, name in chosen or "lora_" in name) for name, shape in shapes.items()]


def _shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    model, rank = config.model, config.lora.rank
    targets = words_of(config.lora.targets) if rank else ()
    hidden, width = model.hidden_size, model.head_dim or model.hidden_size // model.num_attention_heads
    queries, keys = model.num_attention_heads * width, model.num_key_value_heads * width
    attention = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}

    def adapted(name: str, shape: tuple[int, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", shape
        if name.rpartition(".")[2] in targets:
            yield f"{name}.lora_A.weight", (rank, shape[1])
            yield f"{name}.lora_B.weight", (shape[0], rank)
            if config.lora.dora:
                yield f"{name}.lora_magnitude_vector.weight", (shape[0],)

    yield "model.embed_tokens.weight", (model.vocab_size, hidden)
    for layer in range(model.num_hidden_layers):
        stem = f"model.layers.{layer}."
        for letter, shape in attention.items():
            yield from adapted(f"{stem}self_attn.{letter}_proj", shape)
        yield from adapted(f"{stem}mlp.gate", (model.num_local_experts, hidden))
        yield from _experts(f"{stem}mlp.experts.", config)
        yield f"{stem}input_layernorm.weight", (hidden,)
        yield f"{stem}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if config.data.format in PROBLEMS:
        yield "score.weight", (labels_of(config), hidden)
    elif not model.tie_word_embeddings:
        yield from adapted("lm_head", (model.vocab_size, hidden))


def _experts(stem: str, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    model, rank = config.model, config.lora.rank
    experts, hidden, inner = model.num_local_experts, model.hidden_size, model.intermediate_size
    projections = {"gate_up": (experts, 2 * inner, hidden), "down": (experts, hidden, inner)}
    for name, shape in projections.items():
        yield f"{stem}{name}_proj", shape
    for name, shape in projections.items():
        if rank and config.lora.experts:
            yield f"{stem}{name}_lora_A", (experts, rank, shape[2])
            yield f"{stem}{name}_lora_B", (experts, shape[1], rank)


def labels_of(config: Config) -> int:
    """How many outputs a classifier has; two where only its data would tell, which changes nothing that counts."""
    return len(config.data.labels) or (1 if config.data.format == "regression" else 2)


@dataclass(frozen=True)
class Count:
    """Numbers of parameters.

    Attributes:
        total: of all.
        experts: of the experts, with what adapts them.
        others: of all else.
        active: that a token passes through.
        trained: that are updated.
    """

    total: int
    experts: int
    others: int
    active: int
    trained: int


def count(config: Config, weights: list[Weight]) -> Count:
    """Counts parameters."""
    experts = sum(weight.elements for weight in weights if weight.is_expert)
    others = sum(weight.elements for weight in weights if not weight.is_expert)
    share = config.model.num_experts_per_tok / config.model.num_local_experts
    trained = sum(weight.elements for weight in weights if weight.trained)
    return Count(experts + others, experts, others, others + round(experts * share), trained)
