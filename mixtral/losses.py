"""Pure loss functions; the caller reduces over ranks and passes in the load that it was given.

Shape letters: see `mixtral/modeling.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral.ops.cross_entropy import IGNORE_INDEX


def classification_loss_sum(logits: Tensor, labels: Tensor, problem: str) -> Tensor:
    """Sums over rows what the published losses average, in at least fp32: a row's mean over its labels.

    Args:
        logits: (B, labels).
        labels: class indices (B,), -100 where a row is none; else (B, labels) real numbers, NaN where it is none.
        problem: a `problem_type` of transformers.

    Returns:
        A scalar; zero, with zero gradient, when no row is labelled.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if problem == "single_label_classification":
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    labelled = ~labels.isnan()
    labels = torch.where(labelled, labels, 0).to(logits.dtype)
    if problem == "regression":
        losses = F.mse_loss(logits, labels, reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (losses * labelled).mean(dim=-1).sum()


class RouterStatistics(NamedTuple):
    """Sums over tokens, per layer, that every router loss and figure is made of.

    All of them add up over micro-batches and over ranks.

    Attributes:
        counts_LE: routed rows of each expert.
        probability_LE: sum of the routers' probabilities; carries the gradient.
        squared_lse_L: sum of the squared log-sum-exp of the logits; carries the gradient.
        entropy_L: sum of the entropy of the routers' distribution, in nats.
    """

    counts_LE: Tensor
    probability_LE: Tensor
    squared_lse_L: Tensor
    entropy_L: Tensor


def router_statistics(
    logits: Sequence[Tensor], experts: Sequence[Tensor], token_mask_T: Tensor | None = None
) -> RouterStatistics:
    """Sums the routers' statistics over the tokens that are no padding.

    Args:
        logits: L tensors (T, E), raw.
        experts: L tensors (T, K), the routed indices.
        token_mask_T: true where a token counts; None counts all.

    Returns:
        The sums, in the logits' dtype.
    """
    layers = []
    for logits_TE, experts_TK in zip(logits, experts, strict=True):
        mask_T1 = torch.ones_like(logits_TE[:, :1])
        if token_mask_T is not None:
            mask_T1 = token_mask_T.reshape(-1, 1).to(logits_TE.dtype)
        log_probability_TE = logits_TE.log_softmax(dim=-1)
        probability_TE = log_probability_TE.exp()
        routed_TE = torch.zeros_like(logits_TE).scatter(-1, experts_TK, 1.0)
        layers.append(
            (
                (routed_TE * mask_T1).sum(dim=0),
                (probability_TE * mask_T1).sum(dim=0),
                (logits_TE.logsumexp(dim=-1).square() * mask_T1.squeeze(-1)).sum(),
                -(probability_TE * log_probability_TE * mask_T1).sum().detach(),
            )
        )
    return RouterStatistics(*(torch.stack(kind) for kind in zip(*layers, strict=True)))


def load_balancing_loss(counts_LE: Tensor, probability_LE: Tensor, tokens: Tensor | float) -> Tensor:
    """Weighs each expert's mean probability by its share of the tokens, layer by layer.

    The mean over layers of E * sum_e (counts_e / tokens) * (probability_e / tokens): K when every
    layer is balanced, up to E when K experts take all. With one layer it is the published loss;
    with several, unlike the published one, layers that collapse onto different experts do not
    hide each other. Linear in `probability_LE`: with global `counts_LE` and `tokens`, the
    values of the ranks' own probabilities add up to the global value.

    Args:
        counts_LE: routed rows of each expert; no gradient flows into them.
        probability_LE: sums of probabilities.
        tokens: number of tokens behind `counts_LE`.

    Returns:
        A scalar; zero when there is no token.

    Source: arXiv 2101.03961, equations 4 to 6, for top-K routing.
    """
    tokens = torch.as_tensor(tokens, dtype=probability_LE.dtype, device=probability_LE.device).clamp(min=1)
    num_experts = counts_LE.shape[-1]
    per_layer = num_experts * (counts_LE.detach() / tokens * (probability_LE / tokens)).sum(dim=-1)
    return per_layer.mean()


def document_load_balancing_loss(
    logits: Sequence[Tensor], experts: Sequence[Tensor], document_T: Tensor, token_mask_T: Tensor
) -> Tensor:
    """Balances the load inside of each document: the sum over documents of its tokens times its own loss.

    Divided by all tokens of a step it is the token-weighted mean of the documents' `load_balancing_loss`, whatever
    batch, row or rank a document is in.

    Args:
        logits: L tensors (T, E), raw.
        experts: L tensors (T, K), the routed indices.
        document_T: the document of each token, any numbers from 0 to T - 1.
        token_mask_T: true where a token counts.

    Returns:
        A scalar; zero when there is no token.
    """
    layers = []
    for logits_TE, experts_TK in zip(logits, experts, strict=True):
        mask_T1 = token_mask_T[:, None].to(logits_TE.dtype)
        routed_TE = torch.zeros_like(logits_TE).scatter(-1, experts_TK, 1.0)
        empty_DE = torch.zeros_like(logits_TE)  # as many documents as tokens would do
        counts_DE = empty_DE.index_add(0, document_T, routed_TE * mask_T1)
        probability_DE = empty_DE.index_add(0, document_T, logits_TE.softmax(dim=-1) * mask_T1)
        tokens_D = empty_DE[:, 0].index_add(0, document_T, mask_T1[:, 0]).clamp(min=1)
        layers.append(logits_TE.shape[-1] * ((counts_DE * probability_DE).sum(dim=-1) / tokens_D).sum())
    return torch.stack(layers).mean()


def pooled_load_balancing_loss(statistics: RouterStatistics, tokens: Tensor | float) -> Tensor:
    """The published auxiliary loss: all layers pooled into one histogram before the product.

    Args:
        statistics: sums over this forward's tokens.
        tokens: number of those tokens.

    Returns:
        A scalar; zero when there is no token.

    Source: `load_balancing_loss_func` of transformers' Mixtral.
    """
    layers = statistics.counts_LE.shape[0]
    return load_balancing_loss(
        statistics.counts_LE.sum(dim=0, keepdim=True),
        statistics.probability_LE.sum(dim=0, keepdim=True),
        layers * tokens,
    )


def router_z_loss(squared_lse_L: Tensor, tokens: Tensor | float) -> Tensor:
    """The mean over layers and tokens of the squared log-sum-exp of the router logits.

    Source: arXiv 2202.08906, equation 5.
    """
    return squared_lse_L.mean() / torch.as_tensor(tokens, dtype=squared_lse_L.dtype).clamp(min=1)


def router_divergence(
    logits: Sequence[Tensor], base_logits: Sequence[Tensor], token_mask_T: Tensor | None = None
) -> Tensor:
    """Sums over tokens how far routers' distributions are from a base's: KL(base || now), in nats.

    Args:
        logits: L tensors (T, E), raw.
        base_logits: likewise; no gradient flows into them.
        token_mask_T: true where a token counts; None counts all.

    Returns:
        (L,), in the logits' dtype; zero where both are the same.
    """
    layers = []
    for logits_TE, base_TE in zip(logits, base_logits, strict=True):
        log_base_TE = base_TE.detach().log_softmax(dim=-1)
        per_token_T = (log_base_TE.exp() * (log_base_TE - logits_TE.log_softmax(dim=-1))).sum(dim=-1)
        layers.append((per_token_T if token_mask_T is None else per_token_T * token_mask_T.flatten()).sum())
    return torch.stack(layers)


def shift_labels(labels_BS: Tensor) -> Tensor:
    """Moves each label to the position that predicts it; the last position predicts nothing."""
    return torch.nn.functional.pad(labels_BS[:, 1:], (0, 1), value=IGNORE_INDEX)
