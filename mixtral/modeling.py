"""The Mixtral decoder.

Shape letters, here and in every file of this package:
    B batch, S sequence, T = B*S tokens, H hidden, I intermediate, E experts, K experts per token,
    N heads, G key/value heads, D head dimension, V vocabulary, L layers, R routed rows (T*K).
Tensors carry them as a suffix: `hidden_BSH`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mixtral import attention as backends
from mixtral import cache as caches
from mixtral.configuration import MixtralConfig
from mixtral.moe import Experts, Router, Routing, SparseMoeBlock
from mixtral.ops import attention as attention_op
from mixtral.ops.linear import Linear
from mixtral.ops.norm import rms_norm
from mixtral.ops.rope import apply_rope
from mixtral.weights import names

names.register()
backends.register()


@dataclass
class ModelOutput(MoeModelOutputWithPast):
    """What the decoder returns.

    Attributes:
        last_hidden_state: (B, S, H), after the final norm.
        past_key_values: the cache, when one is used.
        hidden_states: L + 1 tensors (B, S, H): what enters each layer, and `last_hidden_state`.
        attentions: L tensors (B, N, S, keys), with eager attention only.
        router_logits: L tensors (T, E), raw.
        expert_indices: L tensors (T, K): the experts each token was routed to.
    """

    expert_indices: tuple[torch.Tensor, ...] | None = None


class RMSNorm(nn.Module):
    """Scales to unit root mean square; see `rms_norm`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        return rms_norm(x, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """Cosine and sine of position times frequency.

    It holds no buffer: the frequencies follow from the configuration, so none can be lost on the way
    through a checkpoint or a meta device.
    """

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = (config.rope_parameters or {})["rope_type"]

    def forward(self, x_BSH: Tensor, position_ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosine and sine, each (B, S, D) in the dtype of `x_BSH`."""
        dim, factor = self.config.attention_head_dim, 1.0
        if self.rope_type == "default":
            exponent = torch.arange(0, dim, 2, device=x_BSH.device, dtype=torch.float32) / dim
            frequency = 1.0 / self.config.rope_theta**exponent
        else:
            frequency, factor = ROPE_INIT_FUNCTIONS[self.rope_type](self.config, x_BSH.device)
        angle_BSD = (position_ids_BS[..., None].float() * frequency).repeat(1, 1, 2)
        return (angle_BSD.cos() * factor).to(x_BSH.dtype), (angle_BSD.sin() * factor).to(x_BSH.dtype)


class Attention(nn.Module):
    """Grouped-query attention through transformers' attention interface. Source: arXiv 2305.13245."""

    def __init__(self, config: MixtralConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.attention_head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        query, key_value = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, query, bias=False)
        self.k_proj = Linear(config.hidden_size, key_value, bias=False)
        self.v_proj = Linear(config.hidden_size, key_value, bias=False)
        self.o_proj = Linear(query, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_BSH: Tensor,
        rope: tuple[Tensor, Tensor],
        attention_mask: Any,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (B, S, H) and, with eager attention, the probabilities."""
        query_BNSD, key_BGSD, value_BGSD = (
            projection(hidden_BSH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query_BNSD, key_BGSD = apply_rope(query_BNSD, key_BGSD, *rope)
        if past_key_values is not None:
            key_BGSD, value_BGSD = past_key_values.update(key_BGSD, value_BGSD, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attention_op.reference)
        out_BSND, probabilities = attend(
            self,
            query_BNSD,
            key_BGSD,
            value_BGSD,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.sliding_window,
            **kwargs,
        )
        return self.o_proj(out_BSND.flatten(2)), probabilities


class DecoderLayer(GradientCheckpointingLayer):
    """Attention and mixture of experts, each normed before and added to the residual."""

    def __init__(self, config: MixtralConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = SparseMoeBlock(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_BSH: Tensor, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """Returns the hidden states, the attention probabilities if formed, and the fields of the layer's routing.

        Flat, since reentrant checkpointing loses the gradient of a tensor inside a tuple.
        """
        attended_BSH, probabilities = self.self_attn(self.input_layernorm(hidden_BSH), **kwargs)
        hidden_BSH = hidden_BSH + attended_BSH
        routed_BSH, routing = self.mlp(self.post_attention_layernorm(hidden_BSH))
        return hidden_BSH + routed_BSH, probabilities, *routing


class MixtralPreTrainedModel(PreTrainedModel):
    """Ties the models to transformers' loading, saving and initialisation."""

    config_class = MixtralConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MixtralConfig, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, MixtralConfig):
            raise TypeError(
                f"config is a {type(config).__module__}.{type(config).__name__}, expected a mixtral.MixtralConfig: "
                "MixtralConfig.from_dict(config.to_dict())"
            )
        super().__init__(config, *args, **kwargs)

    def _flash_attn_can_dispatch(self, *args: Any, **kwargs: Any) -> bool:
        """Says all that flash attention needs where transformers misses the first of it."""
        try:
            return super()._flash_attn_can_dispatch(*args, **kwargs)
        except ImportError as error:
            raise ImportError(
                f"attn_implementation={self.config._attn_implementation!r} needs flash-attn (>= 2.3 for a "
                f"sliding_window), a GPU and half precision (dtype=torch.bfloat16): {error}"
            ) from None

    def get_correct_experts_implementation(self, requested: str | None) -> str:
        """Accepts what stands in a configuration that a head of transformers' shares; the experts here have one way.

        Raises:
            ValueError: for any other.
        """
        if requested not in (None, "eager", "grouped_mm"):
            raise ValueError(f"experts_implementation={requested!r} is not supported: leave it out")
        return "eager"

    def _returned(self, output: Any, return_dict: bool | None) -> Any:
        """Returns the output, or a tuple of what it holds, as asked or configured."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=std)


class Decoded(NamedTuple):
    """The normed output of the layers, and of each layer its input and attentions, if kept, and its routing."""

    output_BSH: Tensor
    inputs: list[Tensor]
    attentions: list[Tensor | None]
    routings: list[Routing]


class MixtralModel(MixtralPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        backends.check(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple[caches.LayerPast, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Runs the decoder; an option that is None follows the configuration.

        Args:
            input_ids: (B, S) token ids; exactly one of this and `inputs_embeds`.
            attention_mask: (B, positions seen and S), 1 for tokens and 0 for padding.
            position_ids: (B, S) or (1, S). Without a mask or a given cache, a position that does not follow the one
                before it begins a new document, which sees none of the others in its row.
            past_key_values: a cache to extend, or a tuple of (key, value) per layer, and then such is returned.
            inputs_embeds: (B, S, H) in place of `input_ids`.
            use_cache: whether to return a cache; by default not in training, nor for packed documents.
            output_attentions: whether to return attention probabilities; needs eager attention.
            output_hidden_states: whether to return every layer's input and the final output.
            output_router_logits: whether to return the router logits.
            return_dict: whether to return a `ModelOutput`, or a tuple of what it holds.
            output_routing: whether to return router logits and routed indices.
            **kwargs: passed to the attention backend.

        Raises:
            ValueError: for both or none of `input_ids` and `inputs_embeds`, what the backend cannot do, a past that
                does not fit, or a cache where packed documents or gradient checkpointing allow none.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_BSH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        packed = attention_mask is None and past_key_values is None and position_ids is not None
        cache = self._cache(past_key_values, use_cache, hidden_BSH, attention_mask, position_ids if packed else None)
        if position_ids is None:
            position_ids = self._next_positions(hidden_BSH, cache)
        keep_hidden = self._wanted("output_hidden_states", output_hidden_states)
        keep_attentions = self._wanted("output_attentions", output_attentions)
        keep_logits = output_routing or self._wanted("output_router_logits", output_router_logits)
        mask, arguments = backends.prepare(self.config, hidden_BSH, attention_mask, position_ids, cache, packed=packed)
        arguments |= {"attention_mask": mask, "past_key_values": cache, **kwargs}
        layers = self._decode(hidden_BSH, position_ids, keep_hidden, keep_attentions, arguments)
        if isinstance(past_key_values, tuple):
            cache = caches.to_tuples(cache)
        output = ModelOutput(
            last_hidden_state=layers.output_BSH,
            past_key_values=cache,
            hidden_states=(*layers.inputs, layers.output_BSH) if keep_hidden else None,
            attentions=tuple(layers.attentions) if keep_attentions else None,
            router_logits=tuple(routing.logits_TE for routing in layers.routings) if keep_logits else None,
            expert_indices=tuple(routing.experts_TK for routing in layers.routings) if output_routing else None,
        )
        return self._returned(output, return_dict)

    def _cache(
        self,
        past: Cache | tuple[caches.LayerPast, ...] | None,
        wanted: bool | None,
        hidden_BSH: Tensor,
        attention_mask: Tensor | None,
        packed_positions: Tensor | None,
    ) -> Cache | None:
        """Returns the cache to fill, if any; refuses one that would be filled wrongly."""
        if self.training and self.gradient_checkpointing and (wanted or past is not None):
            raise ValueError("gradient checkpointing runs layers twice, which no cache allows: set use_cache=False")
        if isinstance(past, tuple):
            return caches.from_tuples(past, self.config, attention_mask, hidden_BSH.shape[1])
        if past is not None:
            caches.roll(past)
            return past
        use = (self.config.use_cache and not self.training) if wanted is None else wanted
        if use and packed_positions is not None and bool((packed_positions.diff(dim=-1) != 1).any()):
            if wanted:
                raise ValueError("position_ids hold packed documents, which no cache keeps apart: set use_cache=False")
            return None
        return caches.new(self.config) if use else None

    @staticmethod
    def _next_positions(hidden_BSH: Tensor, cache: Cache | None) -> Tensor:
        seen = 0 if cache is None else cache.get_seq_length()
        return torch.arange(hidden_BSH.shape[1], device=hidden_BSH.device).unsqueeze(0) + seen

    def _wanted(self, option: str, given: bool | None) -> bool:
        wanted = getattr(self.config, option) if given is None else given
        implementation = self.config._attn_implementation
        if option == "output_attentions" and wanted and implementation != "eager":
            raise ValueError(
                f"output_attentions needs attn_implementation='eager', not {implementation!r}, "
                "which never forms the probabilities"
            )
        return wanted

    def _decode(
        self,
        hidden_BSH: Tensor,
        position_ids: Tensor,
        keep_hidden: bool,
        keep_attentions: bool,
        arguments: dict[str, Any],
    ) -> Decoded:
        """Runs the layers, and keeps of each what is asked for."""
        rope = self.rotary_emb(hidden_BSH, position_ids)
        inputs: list[Tensor] = []
        attentions: list[Tensor | None] = []
        routings: list[Routing] = []
        for layer in self.layers:
            if keep_hidden:
                inputs.append(hidden_BSH)
            hidden_BSH, probabilities, *routing = layer(hidden_BSH, rope=rope, **arguments)
            if keep_attentions:
                attentions.append(probabilities)
            routings.append(Routing(*routing))
        return Decoded(self.norm(hidden_BSH), inputs, attentions, routings)
