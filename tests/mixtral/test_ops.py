"""Every fast op against its reference, with gradients, in fp64."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.nn.functional import silu

from mixtral.ops import attention, cross_entropy, experts, linear, norm, tiled, windowed
from mixtral.ops.permute import gather_rows, place_of, sort_rows, spread_rows, weigh_rows
from mixtral.ops.rope import apply_rope
from tests.mixtral.test_block import Counted

EXPERTS, HIDDEN, INNER = 4, 6, 5


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@contextmanager
def kept_tensors():
    """Lists the tensors that are kept for backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        yield kept


def assigned(counts, top_k=1):
    """Assigns R / K tokens to K experts each, `counts` rows to each of them in all, by weights of their own."""
    weights_TK = torch.rand(sum(counts) // top_k, top_k, dtype=torch.float64, requires_grad=True)
    return experts.Assignment(torch.randperm(sum(counts)), torch.tensor(counts), weights_TK)


def tokens_and_projections(assignment, rank=0):
    inputs = [leaf(len(assignment.weights_TK), HIDDEN), assignment.weights_TK]
    projections = []
    for outputs, width in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
        tensors = [leaf(EXPERTS, outputs, width), leaf(EXPERTS, rank, width), leaf(EXPERTS, outputs, rank)]
        projections.append(experts.Projection(tensors[0], experts.LowRank(*tensors[1:], scale=0.7) if rank else None))
        inputs += tensors if rank else tensors[:1]
    return inputs, (inputs[0], assignment, *projections)


@pytest.mark.parametrize("rank", [0, 2], ids=["plain", "low-rank additions"])
@pytest.mark.parametrize("activation", [silu, torch.nn.functional.gelu, torch.nn.Identity()])
@pytest.mark.parametrize(
    ("counts", "top_k"),
    [
        ([3, 0, 4, 2], 1),
        ([3, 0, 5, 2], 2),
        ([0, 0, 0, 0], 2),
        ([1, 0, 0, 0], 1),
        ([0, 9, 0, 0], 1),
        ([33, 3, 64, 40], 2),
    ],
    ids=["each token once", "each token twice", "no rows", "one row", "one expert", "experts filled up"],
)
def test_experts_equal_their_reference_with_gradients(counts, top_k, activation, rank):
    inputs, arguments = tokens_and_projections(assigned(counts, top_k), rank)
    outputs = [op(*arguments, activation) for op in (experts.expert_ffn, experts.reference)]
    assert torch.allclose(*outputs, rtol=1e-11 if rank else 1e-12, atol=1e-13)
    if sum(counts):
        upstream = torch.randn_like(outputs[0])
        gradients = [torch.autograd.grad(output, inputs, upstream) for output in outputs]
        for mine, other in zip(*gradients, strict=True):
            assert torch.allclose(mine, other, rtol=1e-10 if rank else 1e-11, atol=1e-13)


def test_frozen_experts_pass_the_gradient_on():
    inputs, (x_TH, assignment, gate_up, down) = tokens_and_projections(assigned([3, 0, 5, 2], 2))
    frozen = experts.Projection(gate_up.weight_EYX.detach()), experts.Projection(down.weight_EYX.detach())
    outputs = [op(x_TH, assignment, *frozen, silu) for op in (experts.expert_ffn, experts.reference)]
    gradients = [torch.autograd.grad(output.sum(), inputs[:2]) for output in outputs]
    for mine, other in zip(*gradients, strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-13)


def test_a_choice_that_weighs_nothing_leaves_every_gradient_finite():
    inputs, arguments = tokens_and_projections(assigned([3, 0, 5, 2], 2))
    with torch.no_grad():
        arguments[1].weights_TK[0, 1] = 0
    gradients = torch.autograd.grad(experts.expert_ffn(*arguments, silu).sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_dropout_of_a_low_rank_addition_spares_the_projection_and_keeps_the_mean():
    rows, eye = torch.ones(2000, HIDDEN).double(), torch.eye(HIDDEN).double()[None]
    gate_up = torch.cat([eye, eye], dim=1)
    addition = experts.LowRank(eye, 100 * gate_up, scale=0.5, dropout=0.25)
    assignment = experts.Assignment(torch.arange(2000), torch.tensor([2000]), torch.ones(2000, 1).double())
    projections = experts.Projection(gate_up, addition), experts.Projection(eye)
    values = experts.expert_ffn(rows, assignment, *projections, torch.ones_like)
    assert values.unique().tolist() == pytest.approx([1.0, 1 + 50 / 0.75])
    assert values.mean().item() == pytest.approx(51, rel=0.05)


def test_dropout_of_a_low_rank_addition_has_the_gradient_of_what_it_computed():
    inputs, (x_TH, assignment, *projections) = tokens_and_projections(assigned([3, 0, 4, 2]), rank=2)
    dropping = [experts.Projection(p.weight_EYX, p.addition._replace(dropout=0.5)) for p in projections]

    def same_draw(*_):
        torch.manual_seed(3)
        return experts.expert_ffn(x_TH, assignment, *dropping, silu)

    assert torch.autograd.gradcheck(same_draw, inputs)


def test_an_expert_without_rows_has_a_gradient_of_exactly_zero():
    (_, _, gate_up, down), arguments = tokens_and_projections(assigned([3, 0, 0, 0]))
    experts.expert_ffn(*arguments, silu).sum().backward()
    assert (gate_up.grad[1:] == 0).all()
    assert (down.grad[1:] == 0).all()


def test_experts_keep_for_backward_their_tokens_and_what_gate_and_up_gave():
    assignment = assigned([320, 160, 64, 96], 2)
    _, arguments = tokens_and_projections(assignment)
    with kept_tensors() as kept:
        experts.expert_ffn(*arguments, silu)
    given = {tensor.data_ptr() for tensor in (arguments[0], *assignment, arguments[2][0], arguments[3][0])}
    found = [(tensor.dtype, tensor.numel()) for tensor in kept if tensor.data_ptr() not in given]
    places = [(torch.int64, 640), (torch.float64, 640), (torch.int64, 640)]  # each row's token and weight, and back
    assert found == [*places, (torch.float64, 640 * 2 * INNER)]


def aligned(counts, rank, device="cpu", dtype=torch.float32):
    """The arguments of experts whose sizes grouped products take, in fp64 and in another dtype."""
    tensors = [torch.randn(sum(counts) // 2, 32), torch.rand(sum(counts) // 2, 2)]
    for outputs, width in ((2 * 16, 32), (32, 16)):
        tensors += [torch.randn(EXPERTS, outputs, width), torch.randn(EXPERTS, rank, width)]
        tensors.append(torch.randn(EXPERTS, outputs, rank))
    order_R, counts_E = torch.randperm(sum(counts), device=device), torch.tensor(counts, device=device)
    for kind in (torch.float64, dtype):
        given = [tensor.to(device, dtype).to(kind).requires_grad_() for tensor in tensors]
        additions = [experts.LowRank(*given[at : at + 2], scale=0.7) if rank else None for at in (3, 6)]
        assignment = experts.Assignment(order_R, counts_E, given[1])
        projections = [experts.Projection(given[at], one) for at, one in zip((2, 5), additions, strict=True)]
        yield given if rank else [given[at] for at in (0, 1, 2, 5)], (given[0], assignment, *projections, silu)


def assert_alike(found, expected, bound):
    for mine, other in zip(found, expected, strict=True):
        assert (mine.double() - other).norm() <= bound * max(1e-9, other.norm())


ROWS = pytest.mark.parametrize(
    "counts",
    [[3, 0, 5, 2], [0, 0, 0, 0], [2, 0, 0, 0], [0, 10, 0, 0]],
    ids=["uneven", "no rows", "one token", "one expert"],
)


@ROWS
@pytest.mark.parametrize("rank", [0, 8], ids=["plain", "low-rank additions"])
def test_grouped_products_equal_the_reference_with_gradients(counts, rank):
    (exact_inputs, exact), (inputs, arguments) = aligned(counts, rank)
    found, expected = experts.expert_ffn(*arguments, grouped=True), experts.reference(*exact)
    assert_alike([found], [expected], 1e-5)
    gradients = torch.autograd.grad(found.sum(), inputs)
    if sum(counts):
        assert_alike(gradients, torch.autograd.grad(expected.sum(), exact_inputs), 1e-5)
    else:
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.gpu
@ROWS
@pytest.mark.parametrize("rank", [0, 8], ids=["plain", "low-rank additions"])
def test_on_a_gpu_the_same_function_groups_products_by_itself(counts, rank, monkeypatch):
    seen = []
    grouped_mm = torch.nn.functional.grouped_mm
    monkeypatch.setattr("torch.nn.functional.grouped_mm", lambda *a, **b: seen.append(1) or grouped_mm(*a, **b))
    (exact_inputs, exact), (inputs, arguments) = aligned(counts, rank, "cuda", torch.bfloat16)
    found, expected = experts.expert_ffn(*arguments), experts.reference(*exact)
    assert_alike([found], [expected], 2e-2)
    gradients = torch.autograd.grad(found.sum(), inputs)
    assert seen
    if sum(counts):
        assert_alike(gradients, torch.autograd.grad(expected.sum(), exact_inputs), 4e-2)


@ROWS
@pytest.mark.parametrize("rank", [0, 8], ids=["plain", "low-rank additions"])
def test_experts_of_few_rows_in_fp32_equal_the_reference_where_nothing_is_trained(counts, rank, monkeypatch):
    (_, definition), (_, arguments) = aligned(counts, rank)
    turned = []
    monkeypatch.setattr(experts, "few_rows", lambda *inputs: turned.append(1) or linear.few_rows(*inputs))
    with torch.no_grad():
        found = experts.expert_ffn(*arguments, grouped=False)
    assert_alike([found], [experts.reference(*definition)], 1e-6)
    assert bool(turned) == (0 < max(counts) <= linear.FEW)
    turned.clear()
    assert_alike([experts.expert_ffn(*arguments, grouped=False)], [found.double()], 1e-6)
    assert not turned


@pytest.mark.parametrize("rows", [0, 1, 2, linear.FEW, linear.FEW + 1])
@pytest.mark.parametrize("trains", [False, True])
def test_a_linear_layer_equals_torch_s_and_goes_the_other_way_for_few_rows(rows, trains, monkeypatch):
    layer, turned = linear.Linear(5, 3, bias=False), []
    monkeypatch.setattr(linear, "few_rows", lambda *inputs, op=linear.few_rows: turned.append(1) or op(*inputs))
    x = torch.randn(rows, 1, 5)
    with torch.set_grad_enabled(trains):
        found = layer(x)
    assert_alike([found], [torch.nn.functional.linear(x.double(), layer.weight.double())], 1e-6)
    assert bool(turned) == (0 < rows <= linear.FEW and not trains)


def test_a_linear_layer_takes_a_row_without_a_batch():
    layer, x = linear.Linear(5, 3, bias=False), torch.randn(5)
    with torch.no_grad():
        assert torch.allclose(layer(x), layer(x[None])[0], rtol=1e-5, atol=1e-6)


def test_few_rows_pass_gradcheck():
    assert torch.autograd.gradcheck(linear.few_rows, (leaf(1, 5), leaf(3, 5)))
    assert torch.autograd.gradcheck(linear.few_rows, (leaf(3, 5), leaf(4, 5)))


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_wide_linear_map_equals_torch_s_with_gradients(rows):
    x, weight = leaf(rows, 5), leaf(3, 5)
    outputs = [op(x, weight) for op in (linear.wide_linear, torch.nn.functional.linear)]
    assert torch.allclose(*outputs, rtol=1e-12, atol=1e-13)
    upstream = torch.randn_like(outputs[0])
    for mine, other in zip(*(torch.autograd.grad(out, (x, weight), upstream) for out in outputs), strict=True):
        assert torch.allclose(mine, other, rtol=1e-12, atol=1e-13)


def test_a_wide_linear_map_of_bf16_is_that_of_fp32_and_keeps_what_it_was_given():
    x, weight = (leaf(*shape).detach().bfloat16().requires_grad_() for shape in ((9, 64), (4, 64)))
    wide = [tensor.detach().float().requires_grad_() for tensor in (x, weight)]
    with kept_tensors() as kept:
        out = linear.wide_linear(x, weight)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr(), weight.data_ptr()]
    expected = torch.nn.functional.linear(*wide)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (x, weight), upstream), torch.autograd.grad(expected, wide, upstream)
    for mine, other in zip(*gradients, strict=True):
        assert torch.equal(mine, other.bfloat16())


def test_a_wide_linear_map_whose_weight_is_frozen_keeps_no_rows():
    x, weight = leaf(9, 5), leaf(4, 5).detach()
    with kept_tensors() as kept:
        out = linear.wide_linear(x, weight)
    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr()]
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.allclose(gradient, weight.sum(dim=0).expand(9, 5), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 6), (1, 6), (7, 6), (2, 5, 6), (6,)], ids=str)
@pytest.mark.parametrize("trained", ["both", "input", "weight"])
def test_the_norm_equals_its_reference_with_gradients(shape, trained):
    x, weight = leaf(*shape), leaf(6)
    inputs = {"both": (x, weight), "input": (x,), "weight": (weight,)}[trained]
    for tensor in {x, weight} - set(inputs):
        tensor.requires_grad_(False)
    outputs = [op(x, weight, 1e-3) for op in (norm.rms_norm, norm.reference)]
    assert torch.equal(*outputs)
    upstream = torch.randn_like(outputs[0])
    for mine, other in zip(*(torch.autograd.grad(out, inputs, upstream) for out in outputs), strict=True):
        assert mine.shape == other.shape
        assert torch.allclose(mine, other, rtol=1e-11, atol=1e-13)


def test_the_norm_passes_gradcheck_and_keeps_its_input_and_a_number_a_row():
    x, weight = leaf(3, 4, 6), leaf(6)
    assert torch.autograd.gradcheck(lambda x, weight: norm.rms_norm(x, weight, 1e-3), (x, weight))
    with kept_tensors() as kept:
        norm.rms_norm(x, weight, 1e-3)
    assert [tensor.data_ptr() for tensor in kept[:2]] == [x.data_ptr(), weight.data_ptr()]
    assert [tensor.numel() for tensor in kept[2:]] == [3 * 4]


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_the_norm_of_bf16_is_its_reference_s_and_its_gradients_are_nearer_to_fp64(weight_dtype):
    x = torch.randn(64, 96).bfloat16().requires_grad_()
    weight = (1 + 0.1 * torch.randn(96)).to(weight_dtype).requires_grad_()
    upstream = torch.randn(64, 96).bfloat16()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    true = torch.autograd.grad(norm.reference(*exact, 1e-5), exact, upstream.double())
    errors = []
    for op in (norm.rms_norm, norm.reference):
        out = op(x, weight, 1e-5)
        gradients = torch.autograd.grad(out, (x, weight), upstream.to(out.dtype))
        assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, weight_dtype]
        errors.append([(mine.double() - one).norm() / one.norm() for mine, one in zip(gradients, true, strict=True)])
        assert torch.equal(out, norm.reference(x, weight, 1e-5))
    for mine, other in zip(*errors, strict=True):
        assert mine <= 1.05 * other


@pytest.mark.parametrize("shape", [(1, 6), (7, 6), (2, 5, 6)], ids=str)
def test_the_norm_that_gpus_take_from_torch_is_the_reference(shape):
    x, weight = leaf(*shape), leaf(6)
    outputs = [op(x, weight) for op in (gpu_norm, lambda x, weight: norm.reference(x, weight, 1e-3))]
    assert torch.allclose(*outputs, rtol=1e-12, atol=1e-14)
    upstream = torch.randn_like(outputs[0])
    for mine, other in zip(*(torch.autograd.grad(out, (x, weight), upstream) for out in outputs), strict=True):
        assert torch.allclose(mine, other, rtol=1e-11, atol=1e-13)


def gpu_norm(x, weight):
    """`rms_norm` of tensors that say that they are on a GPU."""
    with mock.patch.object(torch.Tensor, "is_cuda", new=True):
        return norm.rms_norm(x, weight, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("trained", [1, 2], ids=["input", "both"])
def test_on_a_gpu_the_norm_is_one_kernel_and_keeps_its_input_and_a_number_a_row(dtype, bound, trained):
    x, weight = (
        torch.randn(2, 500, 4096, device="cuda", dtype=dtype),
        torch.rand(4096, device="cuda", dtype=dtype) + 0.5,
    )
    inputs = [x, weight][:trained]
    exact = [tensor.double().requires_grad_(tensor is not weight or trained == 2) for tensor in (x, weight)]
    for tensor in inputs:
        tensor.requires_grad_()
    upstream = torch.randn_like(x)
    with kept_tensors() as kept, Counted() as counted:
        out = norm.rms_norm(x, weight, 1e-5)
    assert counted.names == {"_fused_rms_norm": 1}
    with torch.autocast("cuda", torch.bfloat16):
        assert norm.rms_norm(x, weight, 1e-5).dtype == dtype
    assert sorted(tensor.numel() for tensor in kept) == [1000, 4096, x.numel()]
    expected = norm.reference(*exact, 1e-5)
    found = [out, *torch.autograd.grad(out, inputs, upstream)]
    true = [expected, *torch.autograd.grad(expected, exact[:trained], upstream.double())]
    for mine, one in zip(found, true, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - one).norm() <= bound * one.norm()


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("trained", ["all", "some", "none"])
def test_linear_cross_entropy_equals_its_reference_with_gradients(chunk, trained):
    hidden, weight = leaf(11, HIDDEN), leaf(17, HIDDEN)
    labels = torch.randint(0, 17, (11,))
    labels[{"all": slice(0, 0), "some": slice(0, 11, 2), "none": slice(None)}[trained]] = -100
    fast = cross_entropy.linear_cross_entropy(hidden, weight, labels, chunk)
    slow = cross_entropy.reference(hidden, weight, labels)
    assert torch.allclose(fast, slow, rtol=1e-12, atol=1e-13)
    for mine, other in zip(
        torch.autograd.grad(0.3 * fast, (hidden, weight)),
        torch.autograd.grad(0.3 * slow, (hidden, weight)),
        strict=True,
    ):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("chunk", [4, 100])
def test_cross_entropy_through_a_head_of_several_parts_equals_the_reference_with_gradients(chunk):
    hidden, head = leaf(11, HIDDEN), torch.nn.Sequential(torch.nn.Linear(HIDDEN, 5), torch.nn.Linear(5, 17)).double()
    labels = torch.randint(0, 17, (11,))
    labels[::3] = -100
    inputs = [hidden, *head.parameters()]
    fast = cross_entropy.head_cross_entropy(hidden, head, labels, chunk)
    slow = cross_entropy.cross_entropy_sum(head(hidden), labels)
    assert torch.allclose(fast, slow, rtol=1e-12, atol=1e-13)
    for mine, other in zip(torch.autograd.grad(fast, inputs), torch.autograd.grad(slow, inputs), strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-14)


def test_linear_cross_entropy_of_a_frozen_head_and_of_no_rows():
    hidden, weight = leaf(5, HIDDEN), leaf(17, HIDDEN).detach()
    labels = torch.randint(0, 17, (5,))
    cross_entropy.linear_cross_entropy(hidden, weight, labels).backward()
    (expected,) = torch.autograd.grad(cross_entropy.reference(hidden, weight, labels), hidden)
    assert torch.allclose(hidden.grad, expected, rtol=1e-10, atol=1e-13)
    assert cross_entropy.linear_cross_entropy(hidden[:0], weight, labels[:0]) == 0


def test_linear_cross_entropy_passes_gradcheck():
    hidden, weight = leaf(4, 3), leaf(5, 3)
    labels = torch.tensor([1, -100, 0, 4])
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy.linear_cross_entropy(h, w, labels, 3), (hidden, weight))


def test_sorting_then_combining_weighs_every_row_once():
    tokens, top_k = 9, 2
    experts_TK = torch.stack([torch.randperm(EXPERTS)[:top_k] for _ in range(tokens)])
    weights_TK, x_TH = leaf(tokens, top_k), leaf(tokens, HIDDEN)
    order_R, counts_E = sort_rows(experts_TK, EXPERTS)
    assert counts_E.tolist() == [(experts_TK == expert).sum() for expert in range(EXPERTS)]
    assert (experts_TK.flatten()[order_R].diff() >= 0).all()
    out = weigh_rows(x_TH[order_R // top_k], place_of(order_R), weights_TK)
    assert torch.allclose(out, x_TH * weights_TK.sum(-1, keepdim=True), rtol=1e-12, atol=1e-13)


def test_spreading_and_gathering_rows_are_each_other_s_gradient():
    order_R = torch.randperm(18)
    assert torch.allclose(
        gather_rows(spread_rows(x_TH := leaf(9, HIDDEN), order_R, 2), order_R, 2), 2 * x_TH, atol=1e-14
    )
    assert torch.autograd.gradcheck(lambda x: spread_rows(x, order_R, 2), leaf(9, HIDDEN))
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, order_R, 2), leaf(18, HIDDEN))


def test_rope_depends_on_distance_alone():
    query, key = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def score(query_at, key_at):
        frequency = (100.0 ** -(torch.arange(4, dtype=torch.float64) / 4)).repeat(2)
        rotated = []
        for vector, at in ((query, query_at), (key, key_at)):
            angle = (at * frequency).view(1, 1, 8)
            rotated.append(apply_rope(vector, vector, angle.cos(), angle.sin())[0])
        return (rotated[0] * rotated[1]).sum().item()

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-10)
    assert score(7, 3) != pytest.approx(score(7, 4), rel=1e-3)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("length", "window"), [(10, 3), (5, 9), (7, 1), (64, 64), (200, 3), (130, 1), (300, 70), (700, 300)]
)
def test_windowed_attention_equals_its_reference_with_gradients(length, window, packed):
    query, key, value = leaf(2, 4, length, 8), leaf(2, 2, length, 8), leaf(2, 2, length, 8)
    documents = torch.zeros(2, length, dtype=torch.long)
    if packed:
        documents[0, length // 2 :], documents[1, -2:], documents[1, 0] = 1, -1, -1  # two documents; padding
    outputs = [
        windowed.windowed_attention(query, key, value, documents, window),
        windowed.reference(query, key, value, documents, window),
    ]
    assert torch.allclose(*outputs, rtol=1e-12, atol=1e-14)
    upstream = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(output, (query, key, value), upstream) for output in outputs]
    for mine, other in zip(*gradients, strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("tile", [(256, 2**21), (16, 2**21), (16, 128)], ids=["whole", "some queries", "some heads"])
@pytest.mark.parametrize(
    ("length", "window"), [(1, None), (10, 3), (5, 9), (7, 1), (64, 64), (130, 1), (300, None), (700, 300)]
)
def test_tiled_attention_equals_the_windowed_reference_with_gradients(monkeypatch, length, window, tile):
    monkeypatch.setattr(tiled, "QUERIES", tile[0])
    monkeypatch.setattr(tiled, "SCORES", tile[1])
    monkeypatch.setattr(tiled, "FEWEST", 4)
    query, key, value = leaf(2, 4, length, 8), leaf(2, 2, length, 8), leaf(2, 2, length, 8)
    documents = torch.zeros(2, length, dtype=torch.long)
    documents[0, length // 2 :], documents[1, 1 + length // 2 :] = 1, -1  # two documents; padding after one
    real = (documents >= 0)[:, None, :, None]
    got = tiled.tiled_attention(query, key, value, tiled.spans(documents), window)
    expected = windowed.reference(query, key, value, documents, window or length) * real
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)
    assert not got[1, :, 1 + length // 2 :].any()
    upstream = torch.randn_like(got)
    gradients = [torch.autograd.grad(output, (query, key, value), upstream) for output in (got, expected)]
    for mine, other in zip(*gradients, strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-13)


def test_tiled_attention_in_bf16_is_as_near_to_fp64_as_sdpa():
    """In the output by a quarter more, since it rounds what its softmax gives, and that of queries by a half.

    Those of keys and values are nearer, which SDPA rounds once for each query head that shares them.
    """
    wide = [torch.randn(2, heads, 600, 64).bfloat16().double().requires_grad_() for heads in (8, 2, 2)]
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    upstream = torch.randn(2, 8, 600, 64).bfloat16()

    def sdpa(*inputs):
        return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    def results(attend, inputs):
        out = attend(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))

    exact = results(sdpa, wide)
    errors = [
        [
            float((got.double() - true).norm() / true.norm())
            for got, true in zip(results(attend, narrow), exact, strict=True)
        ]
        for attend in (lambda *inputs: tiled.tiled_attention(*inputs, (((0, 600),),) * 2, None), sdpa)
    ]
    assert errors[0][0] < 1.25 * errors[1][0]
    assert errors[0][1] < 1.5 * errors[1][1]
    assert errors[0][2] < 0.75 * errors[1][2]
    assert errors[0][3] < 0.75 * errors[1][3]


def test_tiled_attention_leaves_the_precision_of_other_products_as_it_was():
    before = torch.backends.mkldnn.matmul.fp32_precision
    inputs = [torch.randn(1, 2, 9, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    tiled.tiled_attention(*inputs, (((0, 9),),), None).sum().backward()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        tiled.tiled_attention(inputs[0], inputs[1].detach().float()[..., :4], inputs[2], (((0, 9),),), None)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_the_last_of_several_threads_puts_back_the_precision_that_the_first_found():
    settings, rounding = torch.backends.mkldnn.matmul, tiled._Rounding()
    before, device = settings.fp32_precision, torch.device("cpu")
    first, second = (rounding.allowed(torch.bfloat16, device) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert settings.fp32_precision == before
    with rounding.allowed(torch.float32, device):
        assert settings.fp32_precision == before


def test_tiled_attention_keeps_its_inputs_alone_for_backward():
    inputs = [leaf(1, 2, 300, 8) for _ in range(3)]
    with kept_tensors() as kept:
        tiled.tiled_attention(*inputs, (((0, 300),),), None)
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in inputs]


def test_a_query_sees_exactly_the_keys_of_its_window():
    seen = windowed.visible(torch.zeros(1, 9, dtype=torch.long), 4)[0]
    assert seen.sum(-1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4]
    assert seen[6].nonzero().flatten().tolist() == [3, 4, 5, 6]


def test_attention_reference_equals_torch():
    query, key, value = leaf(2, 4, 7, 8), leaf(2, 2, 7, 8), leaf(2, 2, 7, 8)
    mask = torch.full((7, 7), float("-inf"), dtype=torch.float64).triu(1).expand(2, 1, 7, 7)
    got, probabilities = attention.reference(torch.nn.Module(), query, key, value, mask, scaling=8**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert torch.allclose(got.transpose(1, 2), expected, rtol=1e-10, atol=1e-13)
    assert torch.allclose(probabilities.sum(-1), torch.ones(2, 4, 7, dtype=torch.float64), atol=1e-14)
