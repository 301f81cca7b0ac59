"""One process of two that compute gradients in opposite orders, and some of none in a step's last pass or at all."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn

from train.optim import MasterWeights
from train.parallel.collected import Collected


class Failing(torch.autograd.Function):
    """Fails where backward comes by, as for want of memory."""

    @staticmethod
    def forward(_, values):
        return values.clone()

    @staticmethod
    def backward(_, gradient):
        raise MemoryError


def fail_between(model: nn.ModuleDict, masters: MasterWeights, collected: Collected) -> None:
    """Has a last pass fail when the first sums travel already, and lets go of its gradients."""
    failing = Failing.apply(model["first"](torch.ones(1, 7).bfloat16())).sum()
    there = sum(model[name](torch.ones(1, 2 + len(name)).bfloat16()).sum() for name in ("early", "idle"))
    with contextlib.suppress(MemoryError), collected.during(last=True):
        (failing + there).backward()  # which comes to what was computed last first
    for one in (*model.parameters(), *masters.by_name.values()):
        one.grad = None


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    names = ("first", "second", "early", "idle")
    model = nn.ModuleDict({name: nn.Linear(2 + len(name), 3, bias=False) for name in names}).bfloat16()
    masters = MasterWeights(model)
    collected = Collected(masters, 2)
    arrived: list[str] = []
    for name in names:
        model[name].weight.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))

    def outputs(*used: str) -> list[torch.Tensor]:
        return [(1 + rank) * model[name](torch.ones(1, 2 + len(name), dtype=torch.bfloat16)).sum() for name in used]

    with collected.during(last=False):
        sum(outputs("early", "first")).backward()
    assert not collected._under_way
    assert model["first"].weight.grad is None
    arrived.clear()
    with collected.during(last=True):
        sum(outputs(*(("first", "second") if rank else ("second", "first")))).backward()
    assert arrived == (["second", "first"] if rank else ["first", "second"])
    sums = {name: master.grad for name, master in masters.by_name.items()}
    for name, expected in (("first", 6.0), ("second", 3.0), ("early", 3.0)):  # 1 of one process, 2 of the other
        assert (sums[f"{name}.weight"] == expected).all(), name
    assert sums["idle.weight"] is None
    fail_between(model, masters, collected)
    with collected.during(last=True):
        sum(outputs(*names)).backward()
    assert all((master.grad == 3.0).all() for master in masters.by_name.values()), "a sum after a failed pass"
    if rank == 0:
        print("held")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
