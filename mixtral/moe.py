"""The sparse mixture-of-experts layer: y = sum over the top-K experts of weight_e(x) * expert_e(x).

Source: arXiv 2401.04088, section 2.1. Shape letters: see `mixtral/modeling.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixtral.configuration import MixtralConfig
from mixtral.ops.experts import Activation, Assignment, Matrices, Projection, expert_ffn
from mixtral.ops.linear import wide_linear
from mixtral.ops.permute import sort_rows


class Routing(NamedTuple):
    """Where a layer sent its tokens; computed once, used by dispatch, losses and statistics."""

    logits_TE: Tensor
    weights_TK: Tensor
    experts_TK: Tensor


class Router(nn.Module):
    """Chooses K experts per token and weighs them by softmax over the chosen logits.

    Everything is computed in at least fp32, whatever the dtype of the model.

    Attributes:
        bias_E: added to the probabilities in training where it is set, for the choice alone: arXiv 2408.15664,
            equation 3. No file holds it.
    """

    bias_E: Tensor | None = None

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(self, x_TH: Tensor) -> Routing:
        """Routes T tokens."""
        with torch.autocast(x_TH.device.type, enabled=False):
            logits_TE = self.logits(x_TH)
        probability_TE = logits_TE.softmax(dim=-1)
        if self.training and self.bias_E is not None:
            experts_TK = (probability_TE.detach() + self.bias_E).topk(self.top_k, dim=-1).indices
            top_TK = probability_TE.gather(-1, experts_TK)
        else:
            top_TK, experts_TK = probability_TE.topk(self.top_k, dim=-1)
        return Routing(logits_TE, top_TK / top_TK.sum(dim=-1, keepdim=True), experts_TK)

    def logits(self, x_TH: Tensor) -> Tensor:
        """Scores every expert, in at least fp32."""
        return wide_linear(x_TH, self.weight)


Opener = Callable[[Tensor, tuple[int, int]], Matrices]


def as_they_are(stacked_EYX: Tensor, shape: tuple[int, int]) -> Matrices:
    """Gives the matrices of a parameter that is them."""
    return stacked_EYX


class Experts(nn.Module):
    """E gated feed-forward networks: down(activation(gate(x)) * up(x)).

    `opener` may be replaced from outside, where the parameters hold frozen matrices in another form: it gives those of
    a parameter, each of a shape. `grouped` may say how products are made where the device should not: see `expert_ffn`.
    """

    grouped: bool | None = None

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.hidden, self.inner = hidden, inner
        self.opener: Opener = as_they_are
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        activation = config.activation
        # As a submodule it would be hooked by what wraps models, and ranks would call it for each expert that has rows.
        self.activation: Activation = activation.forward if isinstance(activation, nn.Module) else activation

    def forward(self, x_TH: Tensor, assignment: Assignment) -> Tensor:
        """Sends tokens through the experts that they are assigned to; returns (T, H), their weighted sums."""
        gate_up, down = self.projections()
        return expert_ffn(x_TH, assignment, gate_up, down, self.activation, grouped=self.grouped)

    def projections(self) -> tuple[Projection, Projection]:
        """Gives what maps H to gate and up, and what maps I back to H."""
        gate_up, down = self.matrices()
        return Projection(gate_up), Projection(down)

    def matrices(self) -> tuple[Matrices, Matrices]:
        """Gives the matrices of both, (2I, H) and (H, I) of each expert."""
        gate_up = self.opener(self.gate_up_proj, (2 * self.inner, self.hidden))
        return gate_up, self.opener(self.down_proj, (self.hidden, self.inner))


Dispatcher = Callable[[Tensor, Routing, Experts], Tensor]


def dispatch_local(x_TH: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Brings every token to its K experts, all of them here, and sums their weighted outputs.

    No token is dropped, whatever the load. Returns (T, H).
    """
    order_R, counts_E = sort_rows(routing.experts_TK, num_experts=routing.logits_TE.shape[-1])
    return experts(x_TH, Assignment(order_R, counts_E, routing.weights_TK))


class SparseMoeBlock(nn.Module):
    """Router, experts, and the dispatcher that brings tokens to experts and back.

    `dispatcher` may be replaced from outside: one that knows ranks lives in the training package.
    """

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.jitter = config.router_jitter_noise
        self.gate = Router(config)
        self.experts = Experts(config)
        self.dispatcher: Dispatcher = dispatch_local

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, Routing]:
        """Returns the block's output, of the input's shape, and where it routed its T = B*S tokens."""
        if self.training and self.jitter:
            noise = torch.empty_like(hidden_BSH).uniform_(1 - self.jitter, 1 + self.jitter)
            hidden_BSH = hidden_BSH * noise
        x_TH = hidden_BSH.flatten(0, 1)
        routing = self.gate(x_TH)
        return self.dispatcher(x_TH, routing, self.experts).view_as(hidden_BSH), routing
