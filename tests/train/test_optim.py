"""Optimizers, master weights and schedules."""

import gc
import weakref

import pytest
import torch
import transformers

from tests.train.helpers import run_small, write_corpus
from train import optim
from train.config import OptimConfig, ScheduleConfig
from train.optim import MasterWeights, build_optimizer, global_norm, learning_rate, warm_up_warning
from train.parallel.collected import Collected

STEPS, WARMUP = 50, 10


def theirs(name, **options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = getattr(transformers, f"get_{name}_schedule_with_warmup")(
        optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS, **options
    )
    rates = []
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules_equal_transformers(name):
    config = ScheduleConfig(name=name, warmup_steps=WARMUP, min_lr_ratio=0.0)
    expected = [min(1.0, step / WARMUP) for step in range(1, STEPS + 1)] if name == "constant" else theirs(name)
    got = [learning_rate(step, STEPS, 1.0, config) for step in range(1, STEPS + 1)]
    assert got == pytest.approx(expected, abs=1e-12)


def test_warmup_stable_decay_holds_the_peak_and_ends_at_its_floor():
    config = ScheduleConfig(name="warmup_stable_decay", warmup_steps=WARMUP, decay_fraction=0.2, min_lr_ratio=0.1)
    rates = [learning_rate(step, STEPS, 2.0, config) for step in range(1, STEPS + 1)]
    assert rates[WARMUP - 1 : 40] == [2.0] * 31
    assert rates[44] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[-1] == pytest.approx(0.2)


def test_the_last_step_of_a_cosine_has_the_smallest_rate():
    config = ScheduleConfig(name="cosine", warmup_steps=0, min_lr_ratio=0.1)
    assert learning_rate(STEPS, STEPS, 1.0, config) == pytest.approx(0.1)


def test_matrices_decay_and_vectors_do_not():
    parameters = {"matrix": torch.ones(2, 2, requires_grad=True), "norm": torch.ones(2, requires_grad=True)}
    optimizer = build_optimizer(parameters, OptimConfig(lr=0.1, weight_decay=0.5))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (parameters["matrix"] < 1).all()
    assert (parameters["norm"] == 1).all()


def test_an_expert_without_a_token_decays_as_the_others_do(make_model):
    """Its gradient is zero, and not missing, so that the optimizer steps with it."""
    model = make_model(num_hidden_layers=1, num_experts_per_tok=1)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()  # all choose the first
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig(lr=0.1, weight_decay=0.5))
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    ids = torch.randint(0, 128, (2, 9))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    after = model.model.layers[0].mlp.experts.down_proj
    idle = [expert for expert in range(8) if (after.grad[expert] == 0).all()]
    assert len(idle) == 7
    assert torch.equal(after[idle], before[idle] * (1 - 0.1 * 0.5))


def test_moments_of_bf16_are_rounded_after_each_update_of_fp32(monkeypatch):
    """Against AdamW by its definition (arXiv 1711.05101, algorithm 2), in fp64 but for the moments' rounding."""
    monkeypatch.setattr(optim, "UPDATE_BLOCK", 7)
    config = OptimConfig(lr=0.1, weight_decay=0.5, moments="bf16")
    parameters = {"matrix": torch.randn(4, 5, requires_grad=True), "norm": torch.randn(3, requires_grad=True)}
    optimizer = build_optimizer(parameters, config)
    expected = {name: parameter.detach().double() for name, parameter in parameters.items()}
    firsts, seconds = ({name: torch.zeros_like(value) for name, value in expected.items()} for _ in range(2))
    for step in range(1, 6):
        for name, parameter in parameters.items():
            parameter.grad = torch.randn_like(parameter)
            first = config.beta1 * firsts[name] + (1 - config.beta1) * parameter.grad.double()
            second = config.beta2 * seconds[name] + (1 - config.beta2) * parameter.grad.double() ** 2
            root = (second / (1 - config.beta2**step)).sqrt() + config.eps
            decayed = expected[name] * (1 - 0.1 * 0.5 * (parameter.dim() == 2))
            expected[name] = decayed - 0.1 * first / (1 - config.beta1**step) / root
            firsts[name], seconds[name] = first.bfloat16().double(), second.bfloat16().double()
        optimizer.step()
        for name, parameter in parameters.items():
            kept = [optimizer.state[parameter][kind] for kind in ("exp_avg", "exp_avg_sq")]
            assert [moment.dtype for moment in kept] == [torch.bfloat16] * 2
            assert torch.allclose(parameter.double(), expected[name], rtol=0, atol=0.1 * step * 2**-9)
            # where a sum lies between two numbers of bf16, fp32 and fp64 may choose differently
            for mine, other in zip(kept, (firsts[name], seconds[name]), strict=True):
                assert torch.allclose(mine.double(), other, rtol=2**-7, atol=1e-12)
    assert optim.updates_of(optimizer) == 5


def test_moments_of_bf16_learn_as_those_of_fp32_do():
    found = []
    for moments in ("fp32", "bf16"):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
        optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig(lr=3e-3, moments=moments))
        inputs, targets = torch.randn(256, 16), torch.randn(256, 4)
        for _ in range(200):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
        found.append(loss.item())
    assert found[0] < 0.5
    assert found[1] == pytest.approx(found[0], rel=0.03)


def test_updates_too_small_for_bf16_add_up_in_the_master_weights():
    model = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    masters = MasterWeights(model)
    optimizer = build_optimizer(masters.by_name, OptimConfig(name="sgd", lr=1e-3, weight_decay=0.0))
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        masters.collect_gradients()
        optimizer.step()
        optimizer.zero_grad()
        masters.publish()
    assert torch.allclose(masters.by_name["weight"], torch.full((4, 4), 0.9), atol=1e-5)
    assert torch.allclose(model.weight.float(), torch.full((4, 4), 0.9), atol=4e-3)


def test_bf16_gradients_are_accumulated_in_fp32():
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    masters = MasterWeights(model)
    for value in (256.0, 1.0):  # their bf16 sum is 256
        model.weight.grad = torch.full((1, 1), value, dtype=torch.bfloat16)
        masters.collect_gradients()
    assert masters.by_name["weight"].grad.item() == 257.0
    assert model.weight.grad is None


@pytest.mark.parametrize("passes", [1, 2])
def test_a_run_in_bf16_is_the_same_whatever_is_widened_at_a_time(passes, monkeypatch, tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents=300)
    words = [f"data.path={corpus}", "train.precision=bf16", f"train.gradient_accumulation_steps={passes}"]
    found = []
    for part in (2**24, 1000):
        monkeypatch.setattr("train.optim.PART", part)
        assert run_small(tmp_path / str(part), *words) == 0
        found.append((tmp_path / str(part) / "export" / "model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_gradients_of_one_pass_are_widened_a_part_at_a_time_and_update_the_same(moments, monkeypatch):
    monkeypatch.setattr("train.optim.PART", 80)
    found, there = [], []
    for collects, by_hand in ((True, True), (True, False), (False, False)):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(4)]
        model = torch.nn.Sequential(*layers, torch.nn.Linear(8, 1, bias=False, dtype=torch.bfloat16))
        masters = MasterWeights(model)
        optimizer = build_optimizer(masters.by_name, OptimConfig(lr=1e-2, moments=moments))
        for _ in range(3):
            model(torch.randn(5, 8, dtype=torch.bfloat16)).sum().backward()
            norm = global_norm(masters.gradients())
            if collects:
                masters.collect_gradients()
            assert masters.has_collected == collects
            if by_hand:
                torch.nn.utils.clip_grads_with_norm_(list(masters.by_name.values()), 0.1, norm)
                optimizer.step()
                optimizer.zero_grad()
            for part in () if by_hand else masters.parts():
                there.append(sum(one.grad is not None for one in masters.by_name.values()))
                assert there[-1] == len(part)
                torch.nn.utils.clip_grads_with_norm_(part, 0.1, norm)
                optimizer.step()
            assert not masters.gradients()
            masters.publish()
        states = [state for master in masters.by_name.values() for state in optimizer.state[master].values()]
        found.append([*masters.by_name.values(), *states])
    # What was collected is one part; else matrices of 64 and vectors of 8, until there are 80 elements.
    assert there == [9] * 3 + [3, 3, 3] * 3
    for one, collected, widened in zip(*found, strict=True):
        assert torch.equal(collected, one)
        assert torch.equal(widened, one)


def test_the_norm_of_bf16_gradients_is_that_of_fp32():
    gradients = [torch.randn(3000, 101).bfloat16(), torch.randn(5).bfloat16()]
    assert torch.equal(global_norm(gradients), global_norm([gradient.float() for gradient in gradients]))


def test_the_norm_of_millions_of_gradients_is_exact():
    gradients = [torch.randn(3000, 1001), torch.randn(5), torch.zeros(0), torch.full((2, 2), 3.0)]
    exact = torch.cat([gradient.flatten().double() for gradient in gradients]).norm()
    assert global_norm(gradients).item() == pytest.approx(exact.item(), rel=1e-7)


def test_a_warm_up_that_outlasts_the_run_is_warned_of():
    config = ScheduleConfig(warmup_steps=10)
    assert warm_up_warning(11, 1e-3, config) is None
    assert "only rises, to 0.0005 of optim.lr=0.001" in (warm_up_warning(5, 1e-3, config) or "")
    assert "schedule.warmup_steps=10, but the run has 10 steps" in (warm_up_warning(10, 1e-3, config) or "")
    assert warm_up_warning(1, 1e-3, ScheduleConfig()) is None


def test_a_model_whose_gradients_were_collected_is_let_go_of():
    model = torch.nn.Linear(4, 4).bfloat16()
    masters = MasterWeights(model)
    collected = Collected(masters, 1)
    for last in (False, True):
        with collected.during(last=last):
            model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    assert masters.by_name["weight"].grad.tolist() == [[2.0] * 4] * 4
    held = weakref.ref(model.weight), weakref.ref(masters.by_name["weight"])
    del model, masters, collected
    gc.collect()
    assert [reference() for reference in held] == [None, None]
