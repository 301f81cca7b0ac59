"""What is minimised: cross-entropy, router loss, router z-loss and the routers' drift, as parts that add up.

The cross-entropy is a mean over tokens; in its place a classifier has the loss of its problem, a mean over rows.

Each part below is one process's and one micro-step's share of a value of the whole optimizer step: their
plain sum over processes and micro-steps is that value, and so with gradients. No mean of means is taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixtral import MixtralConfig
from mixtral.heads import CausalLMOutput, SequenceClassifierOutput
from mixtral.losses import (
    RouterStatistics,
    document_load_balancing_loss,
    load_balancing_loss,
    pooled_load_balancing_loss,
    router_divergence,
    router_statistics,
    router_z_loss,
)
from train.config import Config
from train.data.labelled import AnyBatch, LabelledBatch

Output = CausalLMOutput | SequenceClassifierOutput
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepSize:
    """What every process knows of an optimizer step before its first forward pass.

    Attributes:
        tokens: tokens of all rows that are no padding.
        trained_tokens: those whose label is trained; of a classifier, labelled rows.
        parts: processes times micro-steps.
    """

    tokens: Tensor
    trained_tokens: Tensor
    parts: int


@dataclass(frozen=True)
class Coefficients:
    """How the router terms weigh, and over which tokens the load is balanced."""

    router_loss: float
    router_z_loss: float
    scope: str
    router_drift: float = 0.0

    @classmethod
    def of(cls, config: Config) -> "Coefficients":
        """Reads them from a run's configuration."""
        train = config.train
        return cls(
            config.model.router_aux_loss_coef,
            train.router_z_loss_coef,
            train.router_loss_scope,
            train.router_drift_coef,
        )


@dataclass
class Parts:
    """Shares of a step's values; adding two of them gives the share of both.

    Attributes:
        cross_entropy: of the token-mean cross-entropy, or of a classifier's loss.
        router_objective: of the router loss that is optimised.
        router_z_loss: of the router z-loss.
        statistics: sums over tokens, from which the exact router loss follows.
        router_drift: of the routers' divergence from others; None where there are none.
    """

    cross_entropy: Tensor
    router_objective: Tensor
    router_z_loss: Tensor
    statistics: RouterStatistics
    router_drift: Tensor | None = None

    def loss(self, coefficients: Coefficients) -> Tensor:
        """The share of the loss to differentiate."""
        loss = (
            self.cross_entropy
            + coefficients.router_loss * self.router_objective
            + coefficients.router_z_loss * self.router_z_loss
        )
        return loss if self.router_drift is None else loss + coefficients.router_drift * self.router_drift

    def detached(self) -> "Parts":
        """The same values without their graph."""
        return Parts.of([tensor.detach() for tensor in self.tensors()])

    def tensors(self) -> list[Tensor]:
        """Every value, in a fixed order."""
        drift = [] if self.router_drift is None else [self.router_drift]
        return [self.cross_entropy, self.router_objective, self.router_z_loss, *self.statistics, *drift]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> "Parts":
        """Gives the parts whose `tensors` these are."""
        cross_entropy, objective, z_loss, *rest = tensors
        count = len(RouterStatistics._fields)
        return Parts(cross_entropy, objective, z_loss, RouterStatistics(*rest[:count]), *rest[count:])

    @staticmethod
    def total(parts: "list[Parts]", reduce: Reduce) -> "Parts":
        """Adds up parts, then over the processes in one reduction, in fp64."""
        columns = zip(*(part.tensors() for part in parts), strict=True)
        sums = [torch.stack([tensor.double() for tensor in column]).sum(dim=0) for column in columns]
        flat = reduce(torch.cat([tensor.flatten() for tensor in sums]))
        pieces = flat.split([tensor.numel() for tensor in sums])
        return Parts.of([piece.view_as(tensor) for piece, tensor in zip(pieces, sums, strict=True)])


def predict(model: nn.Module, batch: AnyBatch, divisor: Tensor | int, *, routing: bool = False) -> Output:
    """Runs a model on packed rows; its `loss` is the summed cross-entropy over the divisor, its logits never formed.

    On labelled rows it is a classifier, with logits; no row attends to its padding, which is on the right.
    """
    if isinstance(batch, LabelledBatch):
        return model(
            input_ids=batch.input_ids,
            labels=batch.labels,
            num_items_in_batch=divisor,
            output_routing=routing,
            use_cache=False,
        )
    return model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        shifted_labels=batch.shifted_labels,
        num_items_in_batch=divisor,
        skip_logits=True,
        output_routing=routing,
        use_cache=False,
    )


def objective_parts(
    output: Output,
    batch: AnyBatch,
    step: StepSize,
    reduce: Reduce,
    coefficients: Coefficients,
    previous_load_LE: Tensor,
    base_logits: Sequence[Tensor] | None = None,
) -> Parts:
    """Computes this process's shares for one micro-step.

    Args:
        output: of `predict` with the divisor `step.trained_tokens` and `routing=True`.
        batch: what it was predicted on.
        step: the size of the whole step.
        reduce: sums a tensor over the processes; called once with scope `global_batch`, else never.
        coefficients: weights and scope.
        previous_load_LE: routed rows per token of each expert in the step before; see `uniform_load`.
        base_logits: what other routers say of the same hidden states, L tensors (T, E); None where none are asked.
    """
    assert output.loss is not None
    assert output.router_logits is not None
    assert output.expert_indices is not None
    statistics = router_statistics(output.router_logits, output.expert_indices, batch.token_mask)
    tokens = batch.token_mask.sum().to(statistics.counts_LE.dtype)
    if coefficients.scope == "global_batch":
        load = reduce(torch.cat([statistics.counts_LE.flatten(), tokens[None]]))
        counts_LE, micro_batch_tokens = load[:-1].view_as(statistics.counts_LE), load[-1]
        router = load_balancing_loss(counts_LE, statistics.probability_LE, micro_batch_tokens)
        router = router * (micro_batch_tokens / step.tokens)
    elif coefficients.scope == "previous_step":
        router = load_balancing_loss(previous_load_LE * step.tokens, statistics.probability_LE, step.tokens)
    elif coefficients.scope == "document":
        document_T = (batch.position_ids == 0).flatten().cumsum(dim=0) - 1
        mask_T = batch.token_mask.flatten()
        per_token = document_load_balancing_loss(output.router_logits, output.expert_indices, document_T, mask_T)
        router = per_token / step.tokens
    else:
        router = pooled_load_balancing_loss(statistics, tokens) / step.parts
    drift = None
    if base_logits is not None:
        drift = router_divergence(output.router_logits, base_logits, batch.token_mask).mean() / step.tokens
    return Parts(
        cross_entropy=output.loss,
        router_objective=router,
        router_z_loss=router_z_loss(statistics.squared_lse_L, step.tokens),
        statistics=statistics,
        router_drift=drift,
    )


def uniform_load(config: MixtralConfig, device: torch.device) -> Tensor:
    """The load, in routed rows per token, that `previous_step` starts from: (L, E), all alike."""
    shape = (config.num_hidden_layers, config.num_local_experts)
    return torch.full(shape, config.num_experts_per_tok / config.num_local_experts, device=device)
