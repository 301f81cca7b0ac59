"""One process of several that send rows to each other's experts; compares with the block that holds all of them."""

import gc
import os
import sys
import weakref
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed

from mixtral import MixtralConfig
from mixtral.moe import SparseMoeBlock
from train.config import ParallelConfig
from train.parallel import expert as expert_layer
from train.parallel.exchange import Journey, Traffic
from train.parallel.expert import ExpertParallelBlock

HIDDEN, INNER, EXPERTS = 64, 32, 8


def make_blocks(rank: int, world: int, **dispatch) -> tuple[SparseMoeBlock, ExpertParallelBlock]:
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    torch.manual_seed(0)
    whole = SparseMoeBlock(config).double()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.3)
    split = ExpertParallelBlock(config, ParallelConfig(expert=world, **dispatch), rank).double()
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
    """Counts the bytes that are handed to all-to-all, those for the rank itself among them."""

    def __init__(self) -> None:
        self.rows = self.rest = 0
        self._original = dist.all_to_all_single

    def __call__(self, output, input, *arguments, **kwargs):
        if input.is_floating_point() and input.shape[-1] == HIDDEN:
            self.rows += input.numel() * input.element_size()
        else:
            self.rest += input.numel() * input.element_size()
        return self._original(output, input, *arguments, **kwargs)


def check(case: str, rank: int, world: int, **dispatch) -> None:
    whole, split = make_blocks(rank, world, **dispatch)
    aim(case, (whole, split), world)
    inputs = make_inputs(case, rank)
    counter = dist.all_to_all_single = Counter()
    try:
        mine, routing = split(inputs[0])
        mine.sin().sum().backward()
    finally:
        dist.all_to_all_single = counter._original
    other, _ = whole(inputs[1])
    other.sin().sum().backward()
    close(mine, other, case, "output")
    close(inputs[0].grad, inputs[1].grad, case, "input")
    close(split.gate.weight.grad, whole.gate.weight.grad, case, "router")
    check_experts(case, whole, split, rank, world)
    away = (routing.experts_TK // (EXPERTS // world) != rank).sum()
    rows = routing.experts_TK.numel()
    counted = torch.tensor(Traffic.total(split.traffic))
    expected = torch.tensor([rows, rows, away])
    for tensor in (counted, expected):
        dist.all_reduce(tensor)
    assert counted.tolist() == expected.tolist(), (case, counted, expected)
    if "dispatch" not in dispatch:
        check_bytes(counter, rows, world, dispatch.get("overlap_degree", 1))


def make_inputs(case: str, rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1 + rank)
    hidden = torch.randn(1, tokens_of(case, rank), HIDDEN, dtype=torch.float64, generator=generator)
    hidden[..., 0] = 1.0
    return [hidden.clone().requires_grad_(), hidden.clone().requires_grad_()]


def close(got: torch.Tensor, expected: torch.Tensor, case: str, name: str) -> None:
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12), (case, name, (got - expected).abs().max())


def check_experts(case: str, whole: SparseMoeBlock, split: ExpertParallelBlock, rank: int, world: int) -> None:
    first = rank * EXPERTS // world
    for name, parameter in split.experts.named_parameters():
        gradient = getattr(whole.experts, name).grad
        dist.all_reduce(gradient)  # every rank's tokens, as the split experts saw them
        close(parameter.grad, gradient[first : first + len(parameter)], case, name)


def check_bytes(counter: Counter, rows: int, world: int, parts: int) -> None:
    sent = torch.tensor([counter.rows, counter.rest, rows])
    dist.all_reduce(sent)
    payload, metadata, rows = sent.tolist()
    assert payload == 4 * rows * HIDDEN * 8, "each row goes out and back once, in both passes"
    counts = parts * world * EXPERTS * 8
    assert metadata == counts + 2 * rows * 8, "each row's weight goes out, and its gradient back"
    if rows > 8 * world * parts:
        assert metadata <= 0.02 * payload, (metadata, payload)


def kept_rows(probability_TE: torch.Tensor, capacity: int, policy: str) -> torch.Tensor:
    """Goes over the experts, one row at a time: which (token, expert) pairs fit; (T, E)."""
    kept_TE = torch.zeros_like(probability_TE, dtype=torch.bool)
    chosen_TK = probability_TE.topk(2, dim=-1).indices
    for expert in range(EXPERTS):
        tokens = [token for token in range(len(chosen_TK)) if expert in chosen_TK[token]]
        if policy == "probs":
            tokens.sort(key=lambda token: -float(probability_TE[token, expert]))
        kept_TE[tokens[:capacity], expert] = True
    return kept_TE


def check_drops(rank: int, world: int, policy: str) -> None:
    """In training rows that do not fit are lost and the others weigh more; in evaluation none are."""
    options = {"dispatch": "deepspeed_capacity", "capacity_factor": 0.9, "drop_policy": policy}
    whole, split = make_blocks(rank, world, **options)
    case = f"drops by {policy}"
    mine_in, other_in = make_inputs(case, rank)
    mine, routing = split(mine_in)
    mine.sin().sum().backward()
    capacity = max(4, -(-int(1000 * 0.9 * 2 * mine.shape[1] / EXPERTS) // 1000))
    x_TH = other_in[0]
    probability_TE = torch.softmax(x_TH @ whole.gate.weight.T, dim=-1)
    kept_TE = kept_rows(probability_TE.detach(), capacity, policy)
    share_TE = probability_TE * kept_TE
    share_TE = share_TE / share_TE.sum(dim=-1, keepdim=True).clamp(min=1e-15)
    outputs = []
    for expert in range(EXPERTS):
        gate_TI, up_TI = (x_TH @ whole.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        out_TH = (torch.nn.functional.silu(gate_TI) * up_TI) @ whole.experts.down_proj[expert].T
        outputs.append(share_TE[:, expert, None] * out_TH)
    expected = torch.stack(outputs).sum(dim=0)
    expected.sin().sum().backward()
    close(mine[0], expected, case, "output")
    close(mine_in.grad, other_in.grad, case, "input")
    close(split.gate.weight.grad, whole.gate.weight.grad, case, "router")
    check_experts(case, whole, split, rank, world)
    traffic = Traffic.total(split.traffic)
    assert traffic.routed == routing.experts_TK.numel()
    assert traffic.taken == kept_TE.sum() < traffic.routed
    close(split.eval()(mine_in)[0], whole.eval()(mine_in)[0], case, "evaluation")


class UnderWay:
    """Counts the exchanges that were begun and not yet awaited."""

    def __init__(self) -> None:
        self.now = 0
        self._original = dist.all_to_all_single

    def __call__(self, *arguments, async_op=False, **kwargs):
        work = self._original(*arguments, async_op=async_op, **kwargs)
        if not async_op:
            return work
        self.now += 1
        return SimpleNamespace(wait=lambda: self._awaited(work))

    def _awaited(self, work) -> None:
        work.wait()
        self.now -= 1


def check_overlap(rank: int, world: int, parts: int) -> None:
    """While experts compute, forward and backward, other parts' rows are under way; with one part none are."""
    _, split = make_blocks(rank, world, overlap_degree=parts)
    hidden, _ = make_inputs("even", rank)
    under_way = dist.all_to_all_single = UnderWay()
    seen = []
    activation = split.experts.activation

    def watched(x):
        seen.append(under_way.now)  # backward computes it again
        return activation(x)

    split.experts.activation = watched
    try:
        out = split(hidden)[0]
        forward, seen[:] = sorted(set(seen)), []
        out.sum().backward()
        backward = sorted(set(seen))
    finally:
        dist.all_to_all_single = under_way._original
    # rows and weights of the later parts, and what the earlier ones gave; backward the same the other way round
    expected = sorted({2 * (parts - 1 - part) + part for part in range(parts)})
    assert forward == backward == expected, (forward, backward, expected)
    assert under_way.now == 0


def check_twice(rank: int, world: int, parts: int) -> None:
    """A second backward gives the gradients of the first, of rows that all go to the next rank."""
    _, split = make_blocks(rank, world, overlap_degree=parts)
    with torch.no_grad():
        split.gate.weight.zero_()
        first = (rank + 1) % world * EXPERTS // world
        split.gate.weight[[first, first + 1], 0] = torch.tensor([9.0, 8.0], dtype=torch.float64)
    hidden, _ = make_inputs("even", rank)
    total = split(hidden)[0].sin().sum()
    first, again = (torch.autograd.grad(total, [hidden, *split.parameters()], retain_graph=True) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        close(other, one, "twice", "gradient")
    assert all(bool(one.any()) for one in first)


def check_freed(rank: int, world: int) -> None:
    """What is exchanged goes with its pass, without the garbage collector: also where recomputing stops halfway."""
    for parts, stops, expected in ((1, True, 3 + 2), (2, True, 6 + 5), (2, False, 6 + 6)):
        _, split = make_blocks(rank, world, overlap_degree=parts)
        hidden, _ = make_inputs("even", rank)
        transfers = []

        class Watched(Journey):
            def __init__(self, *arguments, transfers=transfers) -> None:
                super().__init__(*arguments)
                transfers.append(weakref.ref(self._transfer))

        expert_layer.Journey = Watched
        under_way = dist.all_to_all_single = UnderWay()
        gc.disable()
        try:
            options = {"use_reentrant": False, "early_stop": stops}
            checkpoint(lambda x, split=split: split(x)[0], hidden, **options).sum().backward()
        finally:
            expert_layer.Journey, dist.all_to_all_single = Journey, under_way._original
            gc.enable()
        assert len(transfers) == expected, (parts, stops, len(transfers))
        assert not any(transfer() for transfer in transfers)
        assert (under_way.now == 0) == (parts == 1 or not stops), "only what stops halfway is not awaited"


def proofs(case: str, rank: int, world: int) -> None:
    if case.startswith("drops by "):
        check_drops(rank, world, case.removeprefix("drops by "))
    elif case.startswith("capacity, "):
        check(case.removeprefix("capacity, "), rank, world, dispatch="deepspeed_capacity", capacity_factor=None)
    elif case == "freed":
        check_freed(rank, world)
    elif case.startswith("twice in "):
        check_twice(rank, world, int(case.removeprefix("twice in ")))
    elif case.startswith("overlap of "):
        check_overlap(rank, world, int(case.removeprefix("overlap of ")))
    elif case.startswith("in "):
        parts, _, case = case.removeprefix("in ").partition(" parts, ")
        check(case, rank, world, overlap_degree=int(parts))
    else:
        check(case, rank, world)


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if os.environ["DS_ACCELERATOR"] == "cpu" else "nccl")
    for case in sys.argv[1:]:
        proofs(case, dist.get_rank(), dist.get_world_size())
        if dist.get_rank() == 0:
            print(f"held: {case}", flush=True)
    dist.destroy_process_group()
