"""The sparse block with grouped products, as on a GPU: one graph, few operations, and nothing asked of the host."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixtral import MixtralConfig
from mixtral.moe import SparseMoeBlock

OPERATIONS = 105  # a pass and its gradient
WAITS = {"_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "_unique2", "item"}


class Counted(TorchDispatchMode):
    """Counts the operations that reach a device, by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.__name__.partition(".")[0]] += 1
        return function(*args, **kwargs or {})


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = SparseMoeBlock(MixtralConfig(hidden_size=32, intermediate_size=16, num_local_experts=4)).bfloat16()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    block.experts.grouped = True
    return block


def gradients(block, run, x_BSH):
    block.zero_grad()
    out_BSH, _ = run(x_BSH)
    out_BSH.sum().backward()
    return [out_BSH.detach(), *(parameter.grad for parameter in block.parameters())]


def test_it_compiles_as_one_graph_with_the_same_gradients(block):
    x_BSH = torch.randn(2, 8, 32, dtype=torch.bfloat16)
    expected = gradients(block, block, x_BSH)
    found = gradients(block, torch.compile(block, fullgraph=True, backend="aot_eager"), x_BSH)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


def test_a_pass_and_its_gradient_are_few_operations_whatever_the_experts_and_wait_for_nothing(block):
    with Counted() as counted:
        gradients(block, block, torch.randn(2, 8, 32, dtype=torch.bfloat16))
    assert counted.names["_grouped_mm"] == 6
    assert not WAITS & counted.names.keys()
    assert counted.names.total() <= OPERATIONS
