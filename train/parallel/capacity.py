"""The second way to the experts: DeepSpeed's own layer, with a buffer of one capacity for each of them.

Every expert's buffer travels full, padded with zeros, so that all messages are of one size. Rows that no longer fit
are dropped, and what their token's other experts weigh is raised to one again, as DeepSpeed does.
"""

from typing import Any

import torch
from deepspeed.moe.sharded_moe import MOELayer, topkgating
from torch import Tensor

from mixtral.moe import Experts, Routing
from mixtral.ops.experts import Assignment
from train.config import ParallelConfig
from train.parallel.exchange import Traffic

LEAST_CAPACITY = 4  # rows, as DeepSpeed has it


class CapacityDispatcher:
    """Brings tokens to experts through DeepSpeed's `MOELayer`; in training some are dropped, in evaluation none.

    Every rank of the group must bring as many tokens. Padding competes for the buffers, since DeepSpeed's layer
    does not know it.

    Args:
        config: capacity and what is dropped.
        block: the expert-parallel block whose tokens these are.
    """

    def __init__(self, config: ParallelConfig, block: Any) -> None:
        self._factor, self._policy, self._block = config.capacity_factor, config.drop_policy, block
        self._layer = MOELayer(
            self._gate, self._run_experts, block.ep_group_name, block.ep_size, block.num_local_experts
        )

    def __call__(self, x_TH: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """Returns (T, H)."""
        self._experts, self._layer.ep_group = experts, self._block.ep_group
        out_TH: Tensor = self._layer(x_TH, routing)
        return out_TH

    def _gate(self, x_TH: Tensor, routing: Routing, sparse: bool, tutel: bool) -> tuple[Any, ...]:
        """Gives every routed row its place in the buffers, as DeepSpeed's `TopKGate` does for logits of its own."""
        dropping = self._block.training and self._factor is not None
        places = topkgating(
            routing.logits_TE,
            routing.experts_TK.shape[-1],
            self._factor if dropping else 0.0,
            LEAST_CAPACITY,
            drop_tokens=dropping,
            ep_group=self._block.ep_group,
            drop_policy=self._policy,
            sparse_routes=sparse,
        )
        expert_KT = places[3]  # negative where a row was dropped
        kept_KT = expert_KT >= 0
        away_KT = kept_KT & (expert_KT // self._block.num_local_experts != self._block.ep_rank)
        self._block.count(Traffic(expert_KT.numel(), kept_KT.sum(), away_KT.sum()))
        return places

    def _run_experts(self, buffers_PLCH: Tensor) -> Tensor:
        """Runs the buffers that arrived, of P ranks for L experts of capacity C, through their experts."""
        rows_LPCH = buffers_PLCH.transpose(0, 1)
        rows_RH = rows_LPCH.flatten(0, 2)
        counts_L = torch.full((len(rows_LPCH),), rows_LPCH[0, ..., 0].numel(), device=rows_RH.device)
        in_order = Assignment(
            torch.arange(len(rows_RH), device=rows_RH.device), counts_L, rows_RH.new_ones(len(rows_RH), 1)
        )
        return self._experts(rows_RH, in_order).view_as(rows_LPCH).transpose(0, 1)
