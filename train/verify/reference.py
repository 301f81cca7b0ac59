"""Mixtral and its training step once more, in plain fp64 tensors: what `cierzo verify` compares a layout with.

Nothing of the model or the loop is used. A document is run by itself, an expert at a time, and the loss is written
down as it is defined, so that a fault in packing, windows, dispatch, scaling or reduction cannot be on both sides.
Shape letters: see `mixtral/modeling.py`.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral import MixtralConfig
from mixtral.ops.cross_entropy import IGNORE_INDEX
from train.data.packing import Batch
from train.objective import Coefficients

Weights = dict[str, Tensor]


@dataclass
class Document:
    """A document's part in a row.

    Attributes:
        ids: S token ids.
        labels: the id to predict at each position, or -100.
        micro_batch: number of the global micro-batch, and of the process, that it is in.
    """

    ids: Tensor
    labels: Tensor
    micro_batch: tuple[int, int]


def documents_of(micro_steps: Sequence[Sequence[Batch]]) -> list[Document]:
    """Takes an optimizer step apart into its documents; `micro_steps[m][p]` is the batch of process p."""
    found = []
    for micro_step, batches in enumerate(micro_steps):
        for process, batch in enumerate(batches):
            for ids, positions, labels, mask in zip(*batch, strict=True):
                starts = [at for at in range(len(ids)) if positions[at] == 0 and mask[at]]
                for start, stop in itertools.pairwise([*starts, len(ids)]):
                    span = slice(start, start + int(mask[start:stop].sum()))
                    found.append(Document(ids[span], labels[span], (micro_step, process)))
    return found


def forward(weights: Weights, config: MixtralConfig, ids_S: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Runs one document; returns its logits (S, V), and of each layer the router logits (S, E) and choices (S, K)."""
    x_SH = weights["model.embed_tokens.weight"][ids_S]
    router_logits, choices = [], []
    for layer in range(config.num_hidden_layers):
        of_layer = {name: weights[f"model.layers.{layer}.{name}"] for name in LAYER}
        x_SH = x_SH + _attention(of_layer, config, _norm(x_SH, of_layer["input_layernorm.weight"], config))
        normed_SH = _norm(x_SH, of_layer["post_attention_layernorm.weight"], config)
        logits_SE = normed_SH @ of_layer["mlp.gate.weight"].T
        top_SK = logits_SE.softmax(dim=-1).topk(config.num_experts_per_tok, dim=-1)
        share_SK = top_SK.values / top_SK.values.sum(dim=-1, keepdim=True)
        out_SH = torch.zeros_like(x_SH)
        for expert in range(config.num_local_experts):
            weight_S1 = (share_SK * (top_SK.indices == expert)).sum(dim=-1, keepdim=True)
            gate_SI, up_SI = (normed_SH @ of_layer["mlp.experts.gate_up_proj"][expert].T).chunk(2, dim=-1)
            out_SH = out_SH + weight_S1 * ((F.silu(gate_SI) * up_SI) @ of_layer["mlp.experts.down_proj"][expert].T)
        x_SH = x_SH + out_SH
        router_logits.append(logits_SE)
        choices.append(top_SK.indices)
    head_VH = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return _norm(x_SH, weights["model.norm.weight"], config) @ head_VH.T, router_logits, choices


def adapted(weights: Weights, scale: float) -> Weights:
    """Adds low-rank adapters to the weights they belong to, as they are defined; those without stay as they are.

    Source: arXiv 2106.09685, and arXiv 2402.09353, equation 5, for magnitudes, whose norm is held constant.
    """
    found = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        stem, dot = (module.removesuffix("_proj"), "_") if ".experts." in name else (module, ".")
        a, b = (weights.get(f"{stem}{dot}lora_{side}{'' if dot == '_' else '.weight'}") for side in "AB")
        if a is not None and b is not None:
            weight = weight + scale * b @ a
        magnitude = weights.get(f"{module}.lora_magnitude_vector.weight")
        if magnitude is not None:
            weight = (magnitude / weight.detach().norm(dim=1)).unsqueeze(-1) * weight
        found[name] = weight
    return found


LAYER = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
    *("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
)


def _norm(x_SH: Tensor, weight_H: Tensor, config: MixtralConfig) -> Tensor:
    return weight_H * x_SH / (x_SH.pow(2).mean(dim=-1, keepdim=True) + config.rms_norm_eps).sqrt()


def _attention(weights: Weights, config: MixtralConfig, x_SH: Tensor) -> Tensor:
    size, heads, groups = config.attention_head_dim, config.num_attention_heads, config.num_key_value_heads
    position_S = torch.arange(len(x_SH))
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = position_S[:, None].float() * frequency  # in fp32, as the published model has it
    turn = torch.complex(angles.cos().double(), angles.sin().double())[:, None]

    def project(name: str) -> Tensor:
        return (x_SH @ weights[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, size))

    def rotate(x_SND: Tensor) -> Tensor:
        turned = torch.complex(*x_SND.chunk(2, dim=-1)) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    query_SND = rotate(project("q"))
    key_SND, value_SND = (x.repeat_interleave(heads // groups, dim=1) for x in (rotate(project("k")), project("v")))
    scores_NSS = torch.einsum("snd,tnd->nst", query_SND, key_SND) / math.sqrt(size)
    distance_SS = position_S[:, None] - position_S
    seen_SS = (distance_SS >= 0) & (distance_SS < (config.sliding_window or math.inf))
    probability_NSS = scores_NSS.masked_fill(~seen_SS, -math.inf).softmax(dim=-1)
    out_SND = torch.einsum("nst,tnd->snd", probability_NSS, value_SND)
    return out_SND.flatten(1) @ weights["self_attn.o_proj.weight"].T


@dataclass
class Figures:
    """What a step comes to.

    Attributes:
        loss: token-mean cross-entropy.
        router_loss: exact, per layer, over the whole step.
        objective: what is differentiated.
        load_LE: routed rows per token.
        gap: the least distance between the last router logit chosen and the first one not; routing that hangs on
            rounding is no ground to compare on.
    """

    loss: Tensor
    router_loss: Tensor
    objective: Tensor
    load_LE: Tensor
    gap: float


def objective(
    weights: Weights,
    config: MixtralConfig,
    micro_steps: Sequence[Sequence[Batch]],
    coefficients: Coefficients,
    load_LE: Tensor,
) -> Figures:
    """Writes down a step's loss: `micro_steps[m][p]` is the batch of process p, `load_LE` that of the step before."""
    documents = documents_of(micro_steps)
    cross_entropy = torch.zeros((), dtype=torch.float64)
    runs: list[Run] = []
    gap = math.inf
    for document in documents:
        logits_SV, router_logits, choices = forward(weights, config, document.ids)
        cross_entropy = cross_entropy + F.cross_entropy(
            logits_SV, document.labels, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        logits_LSE, routed_LSE = torch.stack(router_logits), _one_hot(choices, config)
        runs.append(Run(document.micro_batch, logits_LSE, routed_LSE))
        ranked = logits_LSE.detach().sort(dim=-1, descending=True).values
        if config.num_local_experts > config.num_experts_per_tok:
            k = config.num_experts_per_tok
            gap = min(gap, (ranked[..., k - 1] - ranked[..., k]).min().item())
    trained = sum(int((document.labels != IGNORE_INDEX).sum()) for document in documents)
    logits_LTE, routed_LTE = _joined(runs)
    z_loss = logits_LTE.logsumexp(dim=-1).pow(2).mean()
    router = _router_objective(runs, logits_LTE, routed_LTE, coefficients.scope, load_LE)
    if coefficients.scope == "huggingface":
        router = router / sum(map(len, micro_steps))
    loss = cross_entropy / max(1, trained)
    total = loss + coefficients.router_loss * router + coefficients.router_z_loss * z_loss
    return Figures(loss, _balance(logits_LTE, routed_LTE), total, routed_LTE.mean(dim=1), gap)


def _one_hot(choices: list[Tensor], config: MixtralConfig) -> Tensor:
    return F.one_hot(torch.stack(choices), config.num_local_experts).sum(dim=-2).double()


def _balance(logits_LTE: Tensor, routed_LTE: Tensor, load_LE: Tensor | None = None) -> Tensor:
    load_LE = routed_LTE.mean(dim=1) if load_LE is None else load_LE
    return (load_LE * logits_LTE.softmax(dim=-1).mean(dim=1)).sum(dim=-1).mean() * logits_LTE.shape[-1]


class Run(NamedTuple):
    """What the routers said of a document."""

    micro_batch: tuple[int, int]
    logits_LSE: Tensor
    routed_LSE: Tensor


def _joined(runs: list[Run]) -> tuple[Tensor, Tensor]:
    return torch.cat([run.logits_LSE for run in runs], dim=1), torch.cat([run.routed_LSE for run in runs], dim=1)


def _router_objective(
    runs: list[Run], logits_LTE: Tensor, routed_LTE: Tensor, scope: str, load_LE: Tensor
) -> Tensor | float:
    if scope == "previous_step":
        return _balance(logits_LTE, routed_LTE, load_LE)
    tokens = logits_LTE.shape[1]
    if scope == "document":
        return sum((logits.shape[1] / tokens * _balance(logits, routed) for _, logits, routed in runs), 0.0)
    batches: dict[object, list[Run]] = {}
    for run in runs:
        batches.setdefault(run.micro_batch[0] if scope == "global_batch" else run.micro_batch, []).append(run)
    total: Tensor | float = 0.0
    for members in batches.values():
        logits, routed = _joined(members)
        if scope == "global_batch":
            total = total + logits.shape[1] / tokens * _balance(logits, routed)
        else:  # the published formula pools the layers
            total = total + _balance(logits.flatten(0, 1)[None], routed.flatten(0, 1)[None])
    return total
