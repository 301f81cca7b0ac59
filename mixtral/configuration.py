"""The published Mixtral parameters, with parameter and FLOP counts."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not depend on the length seen


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters of each part; `active` counts what one token passes through."""

    embedding: int
    attention: int
    router: int
    experts: int
    norms: int
    head: int
    experts_active: int

    @property
    def total(self) -> int:
        """Every parameter of the model."""
        return self.embedding + self.attention + self.router + self.experts + self.norms + self.head

    @property
    def active(self) -> int:
        """Parameters used for one token: all but the experts it is not routed to."""
        return self.total - self.experts + self.experts_active


class MixtralConfig(PreTrainedConfig):
    """Architecture of a Mixtral model; the defaults are Mixtral-8x7B's.

    Args:
        vocab_size: V, rows of the embedding and of the head.
        hidden_size: H.
        intermediate_size: I, the inner width of one expert.
        num_hidden_layers: L.
        num_attention_heads: N.
        num_key_value_heads: G, key/value heads; N/G query heads share one. None means N.
        head_dim: D; None means H / N.
        hidden_act: the gate's activation: a name registered in `transformers.activations.ACT2FN`, or a function of a
            tensor, with which the configuration cannot be saved.
        max_position_embeddings: longest sequence the model is meant for.
        initializer_range: standard deviation of the initial weights.
        rms_norm_eps: epsilon of the RMS norms.
        use_cache: whether forward returns a key/value cache outside training.
        pad_token_id, bos_token_id, eos_token_id: special token ids.
        tie_word_embeddings: whether the head shares the embedding's matrix.
        rope_theta: base period of the rotary embedding.
        sliding_window: W, keys visible to each query, itself included; None means all before it.
        attention_dropout: dropout of the attention probabilities.
        num_experts_per_tok: K, experts per token.
        num_local_experts: E, experts per layer.
        output_router_logits: whether forward returns router logits and adds the auxiliary loss.
        router_aux_loss_coef: weight of the load-balancing loss.
        router_jitter_noise: width of the uniform noise on a block's input in training.
        rope_parameters: transformers' form of the rotary settings; wins over `rope_theta`.

    Raises:
        ValueError: for a value that cannot be, or sizes that contradict each other.

    Source: https://huggingface.co/docs/transformers/model_doc/mixtral and arXiv 2401.04088, table 1.
    """

    model_type = "mixtral"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}
    default_theta = 1_000_000.0

    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    hidden_act: str | Callable[[Tensor], Tensor] = "silu"
    max_position_embeddings: int = 4096 * 32
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_theta: float = 1_000_000.0
    sliding_window: int | None = None
    attention_dropout: float | int = 0.0
    num_experts_per_tok: int = 2
    num_local_experts: int = 8
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    rope_parameters: dict | None = None  # never None once built

    def __post_init__(self, **kwargs: Any) -> None:
        """Derives what is left open and refuses sizes that contradict each other."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        assert self.rope_parameters is not None
        self.rope_theta = self.rope_parameters["rope_theta"]
        if self.rope_parameters["rope_type"] not in ROPE_TYPES:
            raise ValueError(
                f"rope_parameters.rope_type={self.rope_parameters['rope_type']!r} is not supported: "
                f"expected one of {', '.join(ROPE_TYPES)}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window}: expected None, or a number above 0")
        if not callable(self.hidden_act) and self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is neither a function nor one of: {', '.join(ACT2FN)}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and "
                f"num_local_experts={self.num_local_experts}"
            )

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The function that `hidden_act` is or names."""
        return ACT2FN[self.hidden_act] if isinstance(self.hidden_act, str) else self.hidden_act

    def to_dict(self) -> dict[str, Any]:
        """Returns the parameters; a function in words, which is enough to be printed, and not to be built from."""
        parameters = super().to_dict()
        if callable(self.hidden_act):
            parameters["hidden_act"] = f"the function {getattr(self.hidden_act, '__name__', repr(self.hidden_act))}"
        return parameters

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes config.json.

        Raises:
            ValueError: when `hidden_act` is a function.
        """
        if callable(self.hidden_act):
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is a function, which no file holds: before saving, set it to a name "
                "registered in transformers.activations.ACT2FN"
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def attention_head_dim(self) -> int:
        """D, given or derived."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def count_parameters(self) -> ParameterCount:
        """Counts the parameters of the causal language model, part by part; with a `problem_type`, of a classifier."""
        hidden, layers = self.hidden_size, self.num_hidden_layers
        query, key_value = (
            heads * self.attention_head_dim for heads in (self.num_attention_heads, self.num_key_value_heads)
        )
        expert = 3 * hidden * self.intermediate_size
        return ParameterCount(
            embedding=self.vocab_size * hidden,
            attention=layers * 2 * hidden * (query + key_value),
            router=layers * hidden * self.num_local_experts,
            experts=layers * self.num_local_experts * expert,
            norms=(2 * layers + 1) * hidden,
            head=0 if self.tie_word_embeddings and self.problem_type is None else self._outputs * hidden,
            experts_active=layers * self.num_experts_per_tok * expert,
        )

    @property
    def _outputs(self) -> int:
        return self.vocab_size if self.problem_type is None else self.num_labels

    def training_flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of forward and backward per token, by the PaLM convention.

        Six per active matrix weight (the embedding is a look-up), plus twelve per layer, head
        dimension and visible key. Causality earns no discount; a sliding window does, since it
        bounds the keys. Recomputation is not counted. Source: arXiv 2204.02311, appendix B.
        """
        count = self.count_parameters()
        matrices = count.attention + count.router + count.experts_active + self._outputs * self.hidden_size
        keys = min(sequence_length, self.sliding_window or sequence_length)
        attention = 12 * self.num_hidden_layers * self.num_attention_heads * self.attention_head_dim * keys
        return 6 * matrices + attention
