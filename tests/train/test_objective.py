"""The loss and its gradient depend on the step's tokens alone: not on how they are split. In fp64, to 1e-10.

The reductions are the test's own: each simulated process computes its parts, and the test adds them up.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from mixtral.losses import load_balancing_loss, pooled_load_balancing_loss, router_statistics
from mixtral.ops.cross_entropy import IGNORE_INDEX
from train.config import Config
from train.data.packing import PackedRows, stack
from train.drift import Drift
from train.objective import Coefficients, Parts, StepSize, objective_parts, predict

ROWS = 8


@pytest.fixture
def step_rows():
    """Eight ragged rows: documents of unequal length, untrained stretches, and padding at the end."""
    lengths = [5, 9, 14, 3, 21, 2, 8]
    ids = iter(torch.randint(0, 128, (sum(lengths),)).tolist())
    documents = [[next(ids) for _ in range(length)] for length in lengths]
    dataset = Dataset.from_dict({"input_ids": documents})
    rows = PackedRows(dataset, 8, epochs=1)
    batch = stack([rows[index] for index in range(ROWS)])
    batch.shifted_labels[1, 2:6] = IGNORE_INDEX
    batch.shifted_labels[3] = IGNORE_INDEX
    return batch


def rows_of(batch, indices):
    return type(batch)(*(tensor[list(indices)] for tensor in batch))


def step(model, batch, world, accumulation, coefficients, load=None, base=None):
    """Simulates a step of `world` processes; returns its total parts, its loss and every gradient.

    `base` gives what a base's routers say of the last pass; its passes are those of training.
    """
    model.zero_grad()
    load = torch.linspace(0.1, 0.6, 24, dtype=torch.float64).view(3, 8) if load is None else load
    size = StepSize(
        tokens=batch.token_mask.sum(),
        trained_tokens=(batch.shifted_labels != IGNORE_INDEX).sum(),
        parts=world * accumulation,
    )
    parts, loss = [], 0.0
    width = ROWS // (world * accumulation)
    for micro_step in range(accumulation):
        shares = [
            rows_of(batch, range(start, start + width))
            for start in range(micro_step * world * width, (micro_step + 1) * world * width, width)
        ]
        outputs, asked = [], []
        for share in shares:
            outputs.append(predict(model, share, size.trained_tokens, routing=True))
            asked.append(base() if base else None)
        loads = []  # what an all-reduce would have given: first gathered, then handed back

        def gather(load, loads=loads):
            loads.append(load)
            return load

        for share, output in zip(shares, outputs, strict=True):
            objective_parts(output, share, size, gather, coefficients, load)
        total = sum(loads) if loads else None
        for share, output, said in zip(shares, outputs, asked, strict=True):
            part = objective_parts(output, share, size, lambda _, total=total: total, coefficients, load, said)
            part.loss(coefficients).backward(retain_graph=True)
            loss += part.loss(coefficients).item()
            parts.append(part.detached())
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return Parts.total(parts, lambda tensor: tensor), loss, gradients


def assert_same(mine, other):
    assert mine[1] == pytest.approx(other[1], rel=1e-10)
    for name, gradient in other[2].items():
        assert (mine[2][name] - gradient).norm() <= 1e-10 * gradient.norm(), name


SPLITS = [(2, 1), (4, 1), (8, 1)]
ACCUMULATED = [(1, 2), (1, 4), (2, 2), (1, 8), (4, 2)]


@pytest.mark.parametrize(("world", "accumulation"), SPLITS + ACCUMULATED)
def test_cross_entropy_and_z_loss_do_not_depend_on_the_split(make_model, step_rows, world, accumulation):
    model = make_model(torch.float64)
    coefficients = Coefficients(router_loss=0.0, router_z_loss=0.3, scope="global_batch")
    whole = step(model, step_rows, 1, 1, coefficients)
    assert_same(step(model, step_rows, world, accumulation, coefficients), whole)


@pytest.mark.parametrize(("world", "accumulation"), SPLITS)
def test_the_global_batch_router_loss_does_not_depend_on_the_number_of_processes(
    make_model, step_rows, world, accumulation
):
    model = make_model(torch.float64)
    coefficients = Coefficients(router_loss=0.7, router_z_loss=0.0, scope="global_batch")
    whole = step(model, step_rows, 1, 1, coefficients)
    assert_same(step(model, step_rows, world, accumulation, coefficients), whole)


@pytest.mark.parametrize("scope", ["previous_step", "document"])
@pytest.mark.parametrize(("world", "accumulation"), SPLITS + ACCUMULATED)
def test_these_scopes_do_not_depend_on_accumulation_either(make_model, step_rows, world, accumulation, scope):
    model = make_model(torch.float64)
    coefficients = Coefficients(router_loss=0.7, router_z_loss=0.0, scope=scope)
    whole = step(model, step_rows, 1, 1, coefficients)
    assert_same(step(model, step_rows, world, accumulation, coefficients), whole)


def test_the_previous_step_scope_with_this_steps_own_load_is_the_exact_loss(make_model, step_rows):
    model = make_model(torch.float64)
    coefficients = Coefficients(router_loss=1.0, router_z_loss=0.0, scope="previous_step")
    tokens = step_rows.token_mask.sum()
    statistics = step(model, step_rows, 1, 1, coefficients)[0].statistics
    own = step(model, step_rows, 2, 2, coefficients, load=statistics.counts_LE / tokens)[0]
    exact = load_balancing_loss(statistics.counts_LE, statistics.probability_LE, tokens)
    assert own.router_objective.item() == pytest.approx(exact.item(), rel=1e-12)


def test_the_document_scope_is_the_token_weighted_mean_of_the_documents_own_losses(make_model, step_rows):
    model = make_model(torch.float64)
    coefficients = Coefficients(router_loss=1.0, router_z_loss=0.0, scope="document")
    total = step(model, step_rows, 2, 2, coefficients)[0]
    expected, tokens = 0.0, 0
    for row in range(ROWS):
        starts = [at for at in range(8) if step_rows.position_ids[row, at] == 0]
        for start, stop in itertools.pairwise([*starts, 8]):
            if not step_rows.token_mask[row, start]:
                continue
            ids = step_rows.input_ids[row : row + 1, start:stop]
            output = model(input_ids=ids, use_cache=False, output_routing=True)
            statistics = router_statistics(output.router_logits, output.expert_indices)
            loss = load_balancing_loss(statistics.counts_LE, statistics.probability_LE, ids.shape[1])
            expected += loss.item() * ids.shape[1]
            tokens += ids.shape[1]
    assert tokens == step_rows.token_mask.sum()
    assert total.router_objective.item() == pytest.approx(expected / tokens, rel=1e-10)


@pytest.mark.parametrize(("world", "accumulation"), SPLITS + ACCUMULATED)
def test_the_logged_router_loss_is_exact_however_the_step_is_split(make_model, step_rows, world, accumulation):
    model = make_model(torch.float64)
    coefficients = Coefficients(router_loss=0.1, router_z_loss=0.0, scope="huggingface")

    def logged(split):
        statistics = step(model, step_rows, *split, coefficients)[0].statistics
        return load_balancing_loss(statistics.counts_LE, statistics.probability_LE, step_rows.token_mask.sum()).item()

    assert logged((world, accumulation)) == pytest.approx(logged((1, 1)), rel=1e-12)


def test_the_huggingface_scope_depends_on_the_split(make_model, step_rows):
    model = make_model(torch.float64)
    coefficients = Coefficients(router_loss=1.0, router_z_loss=0.0, scope="huggingface")
    values = [
        step(model, step_rows, *split, coefficients)[0].router_objective.item() for split in [(1, 1), (2, 1), (1, 2)]
    ]
    assert abs(values[1] - values[0]) > 1e-3
    assert abs(values[2] - values[0]) > 1e-3


def test_the_huggingface_scope_is_the_published_loss(make_model, step_rows):
    model = make_model(torch.float64)
    batch = rows_of(step_rows, range(4))  # no padding in these
    coefficients = Coefficients(router_loss=1.0, router_z_loss=0.0, scope="huggingface")
    size = StepSize(batch.token_mask.sum(), torch.tensor(1), parts=1)
    output = predict(model, batch, 1, routing=True)
    part = objective_parts(output, batch, size, lambda x: x, coefficients, torch.zeros(3, 8))
    published = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, output_router_logits=True, use_cache=False
    ).aux_loss
    assert part.router_objective.item() == pytest.approx(published.item(), rel=1e-12)


@pytest.mark.parametrize("scope", ["global_batch", "huggingface"])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 2), (1, 4), (2, 2)])
def test_the_router_objective_has_its_scale_however_the_step_is_split(
    make_model, step_rows, world, accumulation, scope
):
    """By hand: per micro-batch over all processes and weighted by tokens, or the mean of the published losses."""
    model = make_model(torch.float64)
    coefficients = Coefficients(router_loss=1.0, router_z_loss=0.0, scope=scope)
    total, _, gradients = step(model, step_rows, world, accumulation, coefficients)
    model.zero_grad()
    parts = accumulation if scope == "global_batch" else accumulation * world
    expected = 0.0
    for start in range(0, ROWS, ROWS // parts):
        part = rows_of(step_rows, range(start, start + ROWS // parts))
        output = predict(model, part, step_rows.token_mask.sum(), routing=True)
        statistics = router_statistics(output.router_logits, output.expert_indices, part.token_mask)
        tokens = part.token_mask.sum()
        if scope == "global_batch":
            share = tokens.double() / step_rows.token_mask.sum()
            expected = expected + share * load_balancing_loss(statistics.counts_LE, statistics.probability_LE, tokens)
        else:
            expected = expected + pooled_load_balancing_loss(statistics, tokens) / parts
    assert total.router_objective.item() == pytest.approx(expected.item(), rel=1e-10)
    gates = {name: gate for name, gate in model.named_parameters() if name.endswith("gate.weight")}
    by_hand = torch.autograd.grad(expected, list(gates.values()))
    without = step(model, step_rows, world, accumulation, Coefficients(0.0, 0.0, scope))[2]
    for name, gradient in zip(gates, by_hand, strict=True):
        assert (gradients[name] - without[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


@pytest.mark.parametrize("scope", ["global_batch", "previous_step", "document", "huggingface"])
def test_the_router_gradient_is_linear_in_the_coefficient_and_not_zero(make_model, step_rows, scope):
    model = make_model(torch.float64)
    gates = [f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)]
    gradients = []
    for coefficient in (0.0, 1.0, 3.0):
        coefficients = Coefficients(router_loss=coefficient, router_z_loss=0.0, scope=scope)
        gradients.append(step(model, step_rows, 1, 1, coefficients)[2])
    for gate in gates:
        of_one, of_three = (gradients[index][gate] - gradients[0][gate] for index in (1, 2))
        assert of_one.norm() > 1e-4
        assert torch.allclose(of_three, 3 * of_one, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("scope", ["global_batch", "previous_step", "document"])
def test_more_padding_changes_nothing(make_model, step_rows, scope):
    model = make_model(torch.float64)
    coefficients = Coefficients(router_loss=0.5, router_z_loss=0.2, scope=scope)
    assert not step_rows.token_mask[-1].all()
    padded = type(step_rows)(*(tensor.clone() for tensor in step_rows))
    padded.input_ids[~padded.token_mask] = 77  # whatever padding holds
    assert_same(step(model, padded, 2, 2, coefficients), step(model, step_rows, 2, 2, coefficients))


def test_a_process_without_a_trained_token_takes_part(make_model, step_rows):
    model = make_model(torch.float64)
    coefficients = Coefficients(router_loss=0.5, router_z_loss=0.2, scope="global_batch")
    assert (step_rows.shifted_labels[3] == IGNORE_INDEX).all()
    assert_same(step(model, step_rows, 8, 1, coefficients), step(model, step_rows, 1, 1, coefficients))


def test_parts_add_up_in_any_order(make_model, step_rows):
    model = make_model(torch.float64)
    coefficients = Coefficients(router_loss=0.5, router_z_loss=0.2, scope="global_batch")
    size = StepSize(step_rows.token_mask.sum(), torch.tensor(10), parts=4)
    parts = [
        objective_parts(
            predict(model, rows_of(step_rows, range(start, start + 2)), 10, routing=True),
            rows_of(step_rows, range(start, start + 2)),
            size,
            lambda tensor: tensor,
            coefficients,
            torch.zeros(3, 8),
        ).detached()
        for start in range(0, ROWS, 2)
    ]
    totals = [
        Parts.total(list(order), lambda tensor: tensor) for order in itertools.islice(itertools.permutations(parts), 5)
    ]
    for total in totals[1:]:
        for mine, other in zip(total.tensors(), totals[0].tensors(), strict=True):
            assert torch.allclose(mine, other, rtol=1e-12, atol=1e-14)


@pytest.fixture
def drifting(make_model):
    """Builds a model whose routers moved, with what the drift's own hooks hear of those that it began with."""

    def make(by=0.3):
        model = make_model(torch.float64).train()
        config = Config()
        config.model.init_from, config.train.router_drift_coef, config.evaluate.router_drift_tokens = "base", 1.0, 0
        engine = SimpleNamespace(
            module=model,
            rank=0,
            world_size=1,
            local=lambda _, names: ((name, one.detach()) for name, one in model.named_parameters() if name in names),
        )
        drift = Drift(engine, config, None)
        weights = [layer.mlp.gate.weight.detach().clone() for layer in model.model.layers]
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight += by * torch.randn_like(layer.mlp.gate.weight)
        return model, drift.base_logits, weights

    return make


DRIFT_ALONE = Coefficients(0.0, 0.0, "document", router_drift=0.7)


def test_the_drift_and_its_gradient_are_those_of_a_plain_computation(drifting, step_rows):
    model, base, weights = drifting()
    entering = []
    hooks = [
        layer.mlp.gate.register_forward_pre_hook(lambda _, x: entering.append(x[0])) for layer in model.model.layers
    ]
    total, loss, gradients = step(model, step_rows, 1, 1, DRIFT_ALONE, base=base)
    entering.clear()
    model.zero_grad()
    output = predict(model, step_rows, (step_rows.shifted_labels != IGNORE_INDEX).sum())
    mask = step_rows.token_mask.flatten()
    per_layer = []
    for x_TH, weight_EH, layer in zip(entering, weights, model.model.layers, strict=True):
        then = (x_TH.detach() @ weight_EH.T).softmax(dim=-1)
        now = (x_TH @ layer.mlp.gate.weight.T).softmax(dim=-1)
        per_layer.append((then * (then / now).log()).sum(dim=-1)[mask].mean())
    expected = sum(per_layer) / len(per_layer)
    (output.loss + 0.7 * expected).backward()
    assert total.router_drift.item() == pytest.approx(expected.item(), rel=1e-10)
    assert loss == pytest.approx((output.loss + 0.7 * expected).item(), rel=1e-10)
    assert expected.item() > 1e-2
    for name, parameter in model.named_parameters():
        assert (gradients[name] - parameter.grad).norm() <= 1e-10 * parameter.grad.norm(), name
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("world", "accumulation"), SPLITS + ACCUMULATED)
def test_the_drift_does_not_depend_on_the_split(drifting, step_rows, world, accumulation):
    model, base, _ = drifting()
    whole = step(model, step_rows, 1, 1, DRIFT_ALONE, base=base)
    mine = step(model, step_rows, world, accumulation, DRIFT_ALONE, base=base)
    assert_same(mine, whole)
    assert mine[0].router_drift.item() == pytest.approx(whole[0].router_drift.item(), rel=1e-10)


def test_padding_does_not_drift(drifting, step_rows):
    model, base, _ = drifting()
    padded = type(step_rows)(*(tensor.clone() for tensor in step_rows))
    padded.input_ids[~padded.token_mask] = 77
    whole = step(model, step_rows, 1, 1, DRIFT_ALONE, base=base)
    assert_same(step(model, padded, 2, 2, DRIFT_ALONE, base=base), whole)


def test_the_drift_is_zero_at_the_start_and_changes_no_gradient(drifting, step_rows):
    model, base, _ = drifting(by=0.0)
    held = step(model, step_rows, 1, 1, DRIFT_ALONE, base=base)
    free = step(model, step_rows, 1, 1, DRIFT_ALONE)
    assert held[0].router_drift.item() == 0.0
    assert free[0].router_drift is None
    assert_same(held, free)


def test_the_drift_is_the_same_where_layers_are_computed_again(drifting, step_rows):
    model, base, _ = drifting()
    kept = step(model, step_rows, 1, 2, DRIFT_ALONE, base=base)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert_same(step(model, step_rows, 1, 2, DRIFT_ALONE, base=base), kept)
