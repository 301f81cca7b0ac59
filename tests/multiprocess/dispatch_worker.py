"""One process of several that send rows to each other's experts; compares with the block that holds all of them."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from mixtral import MixtralConfig
from mixtral.moe import SparseMoeBlock
from train.parallel.expert import ExpertParallelBlock

HIDDEN, INNER, EXPERTS = 64, 32, 8


def make_blocks(rank: int, world: int) -> tuple[SparseMoeBlock, ExpertParallelBlock]:
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    torch.manual_seed(0)
    whole = SparseMoeBlock(config).double()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.3)
    split = ExpertParallelBlock(config, world, rank).double()
    split.ep_group = dist.group.WORLD
    mine = slice(rank * EXPERTS // world, (rank + 1) * EXPERTS // world)
    with torch.no_grad():
        split.gate.weight.copy_(whole.gate.weight)
        for name, parameter in split.experts.named_parameters():
            parameter.copy_(getattr(whole.experts, name)[mine])
    return whole, split


def tokens_of(case: str, rank: int) -> int:
    return {"one rank has no token": 0 if rank else 24, "unequal": 3 + 7 * rank, "a single token": 1}.get(case, 16)


def aim(case: str, blocks: tuple[SparseMoeBlock, ExpertParallelBlock], world: int) -> None:
    """Makes the router choose what the case is about, through a feature that every token has."""
    chosen = {
        "all to one expert": [EXPERTS - 1],
        "none to the first rank": list(range(EXPERTS // world, EXPERTS)),
    }.get(case, [])
    with torch.no_grad():
        for block in blocks:
            block.gate.weight[:, 0] = 0.0
            block.gate.weight[chosen, 0] += 100.0


class Counter:
    """Counts the bytes that leave for other ranks."""

    def __init__(self) -> None:
        self.rows = self.rest = 0
        self._original = dist.all_to_all_single

    def __call__(self, out, rows, receives=None, sends=None, group=None, **kwargs):
        if rows.is_floating_point():
            self.rows += rows.numel() * rows.element_size()
        else:
            self.rest += rows.numel() * rows.element_size()
        return self._original(out, rows, receives, sends, group=group, **kwargs)


def check(case: str, rank: int, world: int) -> None:
    whole, split = make_blocks(rank, world)
    aim(case, (whole, split), world)
    generator = torch.Generator().manual_seed(1 + rank)
    hidden = torch.randn(1, tokens_of(case, rank), HIDDEN, dtype=torch.float64, generator=generator)
    hidden[..., 0] = 1.0
    inputs = [hidden.clone().requires_grad_(), hidden.clone().requires_grad_()]
    counter = dist.all_to_all_single = Counter()
    try:
        mine, routing = split(inputs[0])
        mine.sin().sum().backward()
    finally:
        dist.all_to_all_single = counter._original
    other, _ = whole(inputs[1])
    other.sin().sum().backward()

    def close(got: torch.Tensor, expected: torch.Tensor, name: str) -> None:
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12), (case, name, (got - expected).abs().max())

    close(mine, other, "output")
    close(inputs[0].grad, inputs[1].grad, "input")
    close(split.gate.weight.grad, whole.gate.weight.grad, "router")
    first = rank * EXPERTS // world
    for name, parameter in split.experts.named_parameters():
        gradient = getattr(whole.experts, name).grad
        dist.all_reduce(gradient)  # every rank's tokens, as the split experts saw them
        close(parameter.grad, gradient[first : first + len(parameter)], name)
    sent = torch.tensor([counter.rows, counter.rest, routing.experts_TK.numel()])
    dist.all_reduce(sent)
    payload, metadata, rows = sent.tolist()
    assert payload == 4 * rows * HIDDEN * 8, "each row goes out and back once, in both passes"
    if rows > 8 * world:
        assert metadata <= 0.02 * payload, (metadata, payload)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for case in sys.argv[1:]:
        check(case, dist.get_rank(), dist.get_world_size())
        if dist.get_rank() == 0:
            print(f"held: {case}", flush=True)
    dist.destroy_process_group()
