"""Expert parallelism: each rank of a group holds an equal part of every layer's experts, and rows travel to them.

The block is a DeepSpeed-MoE layer, so that DeepSpeed's engine reduces, partitions, clips and updates its experts over
the ranks that hold the same ones; the mathematics is `mixtral.moe`'s. Shape letters: see `mixtral/modeling.py`.
"""

import copy
from typing import Any

import deepspeed.module_inject.auto_ep_layer as deepspeed_moe
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from mixtral import MixtralConfig
from mixtral.moe import Dispatcher, Experts, Router, Routing, SparseMoeBlock
from mixtral.ops.experts import Assignment
from mixtral.ops.permute import gather_rows, sort_rows, spread_rows
from train.config import ParallelConfig
from train.parallel.capacity import CapacityDispatcher
from train.parallel.exchange import Journey, Route, Traffic, exchange_counts


class ExpertParallelBlock(nn.Module):
    """`SparseMoeBlock` with E / P of its experts on this rank, P being the ranks of its group, `ep_group`.

    Parameters and their names are the block's, but that the experts' first dimension is E / P.

    Args:
        config: of the model.
        parallel: P, and how rows travel.
        rank: this rank's place in its group.

    Attributes:
        parts: of the tokens, one of which is computed beside another that travels.
        traffic: of each training pass since it was last cleared.
    """

    ep_group: Any

    def __init__(self, config: MixtralConfig, parallel: ParallelConfig, rank: int) -> None:
        nn.Module.__init__(self)  # that of DeepSpeed's layer would take a whole layer apart
        self.jitter = config.router_jitter_noise
        self.gate = Router(config)
        mine = copy.copy(config)
        mine.num_local_experts = config.num_local_experts // parallel.expert
        self.experts = Experts(mine)
        self._describe_to_deepspeed(config, parallel.expert, rank)
        capacity = parallel.dispatch == "deepspeed_capacity"
        self.dispatcher: Dispatcher = CapacityDispatcher(parallel, self) if capacity else self.dispatch
        self.parts = parallel.overlap_degree
        self.traffic: list[Traffic] = []

    forward = SparseMoeBlock.forward

    def dispatch(self, x_TH: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """Sends every token's rows to the ranks of its K experts and sums what comes back; drops none.

        The tokens are taken in parts: beside the rows of one that travel, those of another are computed. Every rank
        of the group must call it, with tokens or without. Returns (T, H).
        """
        top_k = routing.experts_TK.shape[-1]
        sizes = _even_sizes(len(x_TH), self.parts)
        sorts = [sort_rows(experts_tK, self.num_experts) for experts_tK in routing.experts_TK.split(sizes)]
        arriving_NPE, routes = self._routes(torch.stack([counts_E for _, counts_E in sorts]))
        orders = [order_R for order_R, _ in sorts]

        away = []  # the rows of every part, and what each weighs
        parts = zip(x_TH.split(sizes), routing.weights_TK.split(sizes), orders, routes, strict=True)
        for x_tH, weights_tK, order_R, route in parts:
            rows = Journey(spread_rows(x_tH, order_R, top_k), route)
            away.append((rows, Journey(spread_rows(weights_tK.view(-1, 1), order_R, 1), route)))

        back = []
        for (rows, weights), arriving_PE, route in zip(away, arriving_NPE, routes, strict=True):
            rows_RH, weights_R1 = rows.arrived(), weights.arrived()
            assignment = Assignment(_by_expert(arriving_PE, len(rows_RH)), arriving_PE.sum(dim=0), weights_R1)
            back.append(Journey(experts(rows_RH, assignment), route.back()))

        weighted = [rows.arrived() for rows in back]
        summed = [gather_rows(rows_RH, order_R, top_k) for rows_RH, order_R in zip(weighted, orders, strict=True)]
        return summed[0] if len(summed) == 1 else torch.cat(summed)

    def _routes(self, counts_NE: Tensor) -> tuple[Tensor, list[Route]]:
        """Gives, for each part, the rows that come from each rank for each expert here, and the ways of all rows."""
        arriving_NPE = exchange_counts(counts_NE, self.ep_group)
        leaving_NP = counts_NE.unflatten(1, (self.ep_size, -1)).sum(dim=2)
        routes = []
        for sends, receives in torch.stack([leaving_NP, arriving_NPE.sum(dim=2)], dim=1).tolist():
            routes.append(Route(sends, receives, self.ep_group, beside=self.parts > 1))
            self.count(Traffic(sum(sends), sum(receives), sum(sends) - sends[self.ep_rank]))
        return arriving_NPE, routes

    def count(self, traffic: Traffic) -> None:
        """Counts the rows of a training pass."""
        if self.training:
            self.traffic.append(traffic)

    def _describe_to_deepspeed(self, config: MixtralConfig, ranks: int, rank: int) -> None:
        """Sets what DeepSpeed's engine reads of such a layer, all of it private to DeepSpeed."""
        experts = config.num_local_experts
        self.num_experts, self.num_local_experts = experts, experts // ranks
        self.top_k = config.num_experts_per_tok
        self.ep_size, self.ep_rank, self.ep_group_name = ranks, rank, f"ep_size_{ranks}"
        self.ep_group = self.tp_group = self.folding_group_handles = None
        self.combine_impl, self.comm_backend = "weighted_sum", "comm"
        self.expert_placement_descriptor = deepspeed_moe.legacy_uniform_autoep_placement_descriptor(
            experts, experts // ranks, ranks
        )


class TrainedExpertParallelBlock(ExpertParallelBlock, deepspeed_moe.AutoEPMoELayer):
    """The same as a DeepSpeed-MoE layer; DeepSpeed's engine refuses one whose experts are all frozen."""


def mark_as_split(parameter: Any, ranks: int) -> None:
    """Tells DeepSpeed that a parameter belongs to this rank's experts, replicated only where they are.

    Args:
        parameter: stacked over this rank's experts; DeepSpeed reads attributes that torch's does not declare.
        ranks: over which a layer's experts are split.
    """
    parameter.allreduce = False
    parameter.group_name = parameter.ds_zero_partition_group_name = f"ep_size_{ranks}"
    parameter.ds_zero_placement_family = "autoep_expert"
    parameter.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(f"ep_size_{ranks}")


def _even_sizes(tokens: int, parts: int) -> list[int]:
    """Cuts so many tokens into so many parts, of sizes that differ by one at most."""
    return [tokens // parts + (part < tokens % parts) for part in range(parts)]


def _by_expert(arriving_PE: Tensor, rows: int) -> Tensor:
    """Orders the rows that arrived sorted by rank, then expert, by expert alone."""
    expert_of_block = torch.arange(arriving_PE.shape[1], device=arriving_PE.device).repeat(arriving_PE.shape[0])
    return expert_of_block.repeat_interleave(arriving_PE.flatten(), output_size=rows).argsort(stable=True)


def split_experts(model: nn.Module, config: MixtralConfig, parallel: ParallelConfig, rank: int) -> None:
    """Replaces every sparse block of a model by one that holds the experts of a rank alone, where the block's are."""
    place = rank % parallel.expert
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SparseMoeBlock):
                trained = any(parameter.requires_grad for parameter in child.experts.parameters())
                with torch.device(child.gate.weight.device):
                    kind = TrainedExpertParallelBlock if trained else ExpertParallelBlock
                    block = kind(config, parallel, place)
                block.gate, block.experts = child.gate, _first_part(child.experts, parallel.expert)
                block.ep_group = expert_groups(parallel.expert)[0]
                setattr(parent, name, block)


def _first_part(experts: Experts, ranks: int) -> Experts:
    """Cuts what is stacked over the experts, adapters too, down to as many as a rank has."""
    for name, parameter in list(experts.named_parameters()):
        part = parameter.detach()[: len(parameter) // ranks]
        setattr(experts, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    return experts


def expert_groups(ranks: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Gives this rank's two groups: those that share a layer's experts out, and those that hold the same ones."""
    name = f"ep_size_{ranks}"
    return groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
