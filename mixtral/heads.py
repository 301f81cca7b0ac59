"""Mixtral with a head. Shape letters: see `mixtral/modeling.py`."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, SequenceClassifierOutputWithPast

from mixtral.cache import LayerPast
from mixtral.configuration import MixtralConfig
from mixtral.losses import classification_loss_sum, pooled_load_balancing_loss, router_statistics, shift_labels
from mixtral.modeling import MixtralModel, MixtralPreTrainedModel, ModelOutput
from mixtral.ops.cross_entropy import IGNORE_INDEX, cross_entropy_sum, head_cross_entropy, linear_cross_entropy
from mixtral.ops.linear import Linear


@dataclass
class CausalLMOutput(MoeCausalLMOutputWithPast):
    """What the causal language model returns.

    Attributes:
        loss: the published loss: cross-entropy, plus the weighted `aux_loss` with `output_router_logits`.
        aux_loss: the published load-balancing loss, with `output_router_logits`.
        logits: (B, S, V); None with `skip_logits`.
        past_key_values: the cache, when one is used.
        hidden_states, attentions, router_logits, expert_indices: as in `mixtral.modeling.ModelOutput`.
    """

    expert_indices: tuple[torch.Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """What the sequence classifier returns.

    Attributes:
        loss: the published loss of the configuration's `problem_type`, where labels are given.
        logits: (B, num_labels).
        past_key_values: the cache, when one is used.
        hidden_states, attentions, router_logits, expert_indices: as in `mixtral.modeling.ModelOutput`.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    expert_indices: tuple[torch.Tensor, ...] | None = None


class MixtralForCausalLM(MixtralPreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head.

    `forward` takes what `MixtralModel.forward` takes, and besides:
        labels: (B, S) target ids aligned with the inputs; -100 is not trained. Shifted here.
        output_router_logits: whether to return router logits and add the published auxiliary loss.
        logits_to_keep: number of last positions to form logits for, or their indices; 0 is all.
        skip_logits: whether to compute the loss without ever forming the logits; they are then None.
        shifted_labels: (B, S) targets already moved to the position that predicts them, in place of `labels`.
        num_items_in_batch: divisor of the summed cross-entropy; None is the number of trained tokens here.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        self.model = MixtralModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple[LayerPast, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        shifted_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Runs the decoder and its head, and refuses what its arguments exclude (ValueError).

        Where every label is -100 the loss is zero, not NaN.
        """
        shifted_labels = _one_target(labels, shifted_labels, logits_to_keep)
        with_aux_loss = self.config.output_router_logits if output_router_logits is None else output_router_logits
        output: ModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=with_aux_loss,
            output_routing=output_routing or with_aux_loss,
            return_dict=True,
            **kwargs,
        )
        loss = aux_loss = logits = None
        if not skip_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(output.last_hidden_state[:, keep])
        if shifted_labels is not None:
            loss = self._cross_entropy(output, logits, shifted_labels, num_items_in_batch)
        if with_aux_loss:
            aux_loss = self._published_aux_loss(output, attention_mask)
            loss = None if loss is None else loss + self.config.router_aux_loss_coef * aux_loss
        result = CausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            router_logits=output.router_logits,
            expert_indices=output.expert_indices if output_routing else None,
        )
        return self._returned(result, return_dict)

    def _cross_entropy(
        self, output: ModelOutput, logits_BSV: Tensor | None, labels_BS: Tensor, divisor: int | Tensor | None
    ) -> Tensor:
        labels_T = labels_BS.flatten()
        if logits_BSV is None:
            assert output.last_hidden_state is not None
            hidden_TH = output.last_hidden_state.flatten(0, 1)
            if isinstance(self.lm_head, nn.Linear):
                total = linear_cross_entropy(hidden_TH, self.lm_head.weight, labels_T)
            else:  # a head with an adapter is more than its weight
                total = head_cross_entropy(hidden_TH, self.lm_head, labels_T)
        else:
            total = cross_entropy_sum(logits_BSV.flatten(0, 1), labels_T)
        return total / ((labels_T != IGNORE_INDEX).sum().clamp(min=1) if divisor is None else divisor)

    def _published_aux_loss(self, output: ModelOutput, attention_mask: Tensor | None) -> Tensor:
        assert output.router_logits is not None
        assert output.expert_indices is not None
        if attention_mask is not None:  # it covers what a cache has seen, too
            attention_mask = attention_mask[:, -output.last_hidden_state.shape[1] :]
        statistics = router_statistics(output.router_logits, output.expert_indices, attention_mask)
        tokens = len(output.router_logits[0]) if attention_mask is None else attention_mask.sum()
        return pooled_load_balancing_loss(statistics, tokens)


class MixtralForSequenceClassification(MixtralPreTrainedModel):
    """The decoder with a linear layer on the last token of each row.

    That is the last one that is no padding, wherever the padding is; the last position where the
    configuration has no `pad_token_id`, or where `inputs_embeds` hide which tokens are padding.

    `forward` takes what `MixtralModel.forward` takes, and besides:
        labels: (B,) class indices, or real numbers with one label; (B, num_labels) of 0 and 1 for
            `problem_type="multi_label_classification"`, real numbers for `"regression"`.
        num_items_in_batch: divisor of the loss summed over rows, of which those labelled -100 or NaN are left out;
            needs a `problem_type`. None is the published mean.
    """

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MixtralModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple[LayerPast, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Runs the decoder and scores each row.

        Raises:
            ValueError: for an unknown `problem_type`, or labels that do not fit it.
        """
        output: ModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            output_routing=output_routing,
            return_dict=True,
            **kwargs,
        )
        hidden_BSH = output.last_hidden_state
        assert hidden_BSH is not None
        rows = torch.arange(len(hidden_BSH), device=hidden_BSH.device)
        logits = self.score(hidden_BSH[rows, self._last_token(input_ids)])
        result = SequenceClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels, num_items_in_batch),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            router_logits=output.router_logits,
            expert_indices=output.expert_indices,
        )
        return self._returned(result, return_dict)

    def _last_token(self, input_ids: Tensor | None) -> Tensor | int:
        if input_ids is None or self.config.pad_token_id is None:
            return -1
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return (positions * (input_ids != self.config.pad_token_id)).argmax(dim=-1)

    def _loss(self, logits: Tensor, labels: Tensor, divisor: int | Tensor | None) -> Tensor:
        """The published losses: squared error, cross-entropy, or binary cross-entropy per label."""
        problem = self.config.problem_type
        if problem is not None and divisor is not None:
            return classification_loss_sum(logits, labels, problem) / divisor
        if problem is None:
            whole = labels.dtype in (torch.long, torch.int)
            problem = "single_label_classification" if whole else "multi_label_classification"
            problem = "regression" if self.num_labels == 1 else problem
        if problem == "regression":
            if labels.numel() != logits.numel():
                raise ValueError(
                    f"labels of shape {tuple(labels.shape)} do not fit {self.num_labels} real numbers a row"
                )
            return F.mse_loss(logits, labels.view_as(logits).to(logits.dtype))
        if problem == "single_label_classification":
            if labels.is_floating_point():
                raise ValueError(f"labels of {labels.dtype} are no class indices")
            return F.cross_entropy(logits, labels.view(-1).long())
        if problem == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        raise ValueError(
            f"problem_type={problem!r}: expected regression, single_label_classification or multi_label_classification"
        )


def _one_target(labels: Tensor | None, shifted: Tensor | None, logits_to_keep: int | Tensor) -> Tensor | None:
    """Returns the shifted labels, from whichever of the two is given."""
    some_logits = not (isinstance(logits_to_keep, int) and logits_to_keep == 0)
    if (labels is not None) + (shifted is not None) + some_logits > 1:
        raise ValueError("labels, shifted_labels and logits_to_keep exclude each other")
    return shifted if labels is None else shift_labels(labels)
