"""The hash by which processes compare what they hold, and whom they name."""

import numpy as np
import pytest
import torch

from train.parallel.replicas import BLOCK, hashed, holders, odd_ones


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_single_bit_changes_the_hash(dtype):
    integers = {4: torch.int32, 2: torch.int16}
    values = torch.randn(5, 7).to(dtype)
    bits = values.view(integers[dtype.itemsize])
    before, seen = hashed(values).item(), set()
    for place in range(values.numel()):
        for bit in range(8 * dtype.itemsize):
            mask = torch.tensor(1 << bit).to(bits.dtype)
            bits.view(-1)[place] ^= mask
            seen.add(hashed(values).item())
            bits.view(-1)[place] ^= mask
    assert before not in seen
    assert len(seen) == values.numel() * 8 * dtype.itemsize
    assert hashed(values).item() == before


def test_the_hash_is_the_sum_it_says_and_sees_an_exchange_of_elements_and_the_last_of_several_blocks():
    values = torch.randn(2 * BLOCK + 3)
    bits = values.view(torch.int32).numpy().astype(np.uint64)  # modulo 2^64
    odd, total = np.arange(1, 2 * BLOCK, 2, dtype=np.uint64), 0
    for start in range(0, len(bits), BLOCK):
        block = bits[start : start + BLOCK]
        total = (total * 0x1E3779B97F4A7C15 + int((block * odd[: len(block)]).sum())) % 2**64
    assert hashed(values).item() % 2**64 == total
    for change in ((0, 1), (5, BLOCK + 5), (2 * BLOCK, 2 * BLOCK + 2)):
        changed = values.clone()
        changed[list(change)] = changed[list(reversed(change))]
        assert hashed(changed) != hashed(values)
    assert hashed(values.view(-1, 1).expand(-1, 2)[:, 0]) == hashed(values)
    assert hashed(torch.zeros(0)).item() == 0
    assert hashed(values[:1]) != hashed(values[:2])


def test_the_majority_is_right_and_where_there_is_none_all_are_named():
    assert odd_ones({0: 5, 1: 5}) == []
    assert odd_ones({0: 5, 1: 6}) == [0, 1]
    assert odd_ones({0: 5, 2: 6, 4: 5}) == [2]
    assert odd_ones({0: 5, 1: 6, 2: 5, 3: 6}) == [0, 1, 2, 3]
    assert odd_ones({0: 5, 1: 6, 2: 7}) == [0, 1, 2]


def test_experts_are_compared_among_those_that_hold_the_same_ones():
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert [list(ranks) for ranks in holders(name, 6, 3)] == [[0, 3], [1, 4], [2, 5]]
    assert [list(ranks) for ranks in holders("model.norm.weight", 6, 3)] == [[0, 1, 2, 3, 4, 5]]
