"""Makes mistakes that a GPU does not forgive, on `tests.stand_in`, and prints what was said of each as JSON."""

import json

import torch
import torch.distributed as dist


def product_of_both():
    torch.ones(3, 3, device="cuda") @ torch.ones(3, 3)


def assign_gradient():
    torch.ones(3).grad = torch.ones(3, device="cuda")


MISTAKES = {
    "a product": product_of_both,
    "a sum on the host": lambda: torch.zeros(()).add_(torch.ones((), device="cuda")),
    "a choice on the host": lambda: torch.ones(3)[torch.tensor([0], device="cuda")],
    "values of the host": lambda: torch.ones(3, device="cuda").index_put_((torch.tensor([0, 1]),), torch.ones(2)),
    "two GPUs": lambda: torch.ones(3, 3, device="cuda") @ torch.ones(3, 3, device="cuda:1"),
    "a gradient": assign_gradient,
    "a collective": lambda: dist.all_reduce(torch.ones(3)),
    "a collective of another's": lambda: dist.all_reduce(torch.ones(3, device="cuda:1")),
}


if __name__ == "__main__":
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    right = torch.ones(3, device="cuda", requires_grad=True)
    (right * 2).sum().backward()
    dist.all_reduce(right.grad)
    assert right.grad.tolist() == [2, 2, 2]
    said = {}
    for name, mistake in MISTAKES.items():
        try:
            mistake()
        except RuntimeError as error:
            said[name] = str(error).split(", but ")[0].split(". ")[0]
    print(json.dumps(said))
