"""Balancing without a loss: a bias per expert that sways the choice and is gone at the end."""

import numpy as np
import pytest
import torch

from mixtral.moe import Router
from tests.train.helpers import metrics, run_small, write_corpus
from train.balance import Balance

RATE = 0.1


def routers_of(model):
    return [module for module in model.modules() if isinstance(module, Router)]


def test_a_bias_sways_the_choice_but_not_the_weights(make_model):
    router = routers_of(make_model())[0]
    x_TH = torch.randn(50, router.weight.shape[1])
    router.bias_E = torch.linspace(0.5, -0.5, 8)
    routing = router(x_TH)
    logits = (x_TH @ router.weight.T).detach().numpy().astype(np.float64)
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    chosen = np.argsort(-(probability + np.linspace(0.5, -0.5, 8)), axis=1)[:, :2]
    assert (chosen != np.argsort(-probability, axis=1)[:, :2]).any()
    assert (routing.experts_TK.numpy() == chosen).all()
    share = np.take_along_axis(probability, chosen, axis=1)
    assert np.allclose(routing.weights_TK.detach().numpy(), share / share.sum(axis=1, keepdims=True), atol=1e-5)


def test_evaluation_knows_no_bias(make_model):
    model = make_model().eval()
    ids = torch.arange(20)[None]
    before = model(ids).logits
    for router in routers_of(model):
        router.bias_E = torch.linspace(5.0, -5.0, 8)
    assert torch.equal(model(ids).logits, before)
    assert not torch.equal(model.train()(ids).logits, before)


def test_a_bias_moves_against_the_load_and_is_gone_for_the_last_step(make_model):
    model = make_model()
    balance = Balance(model, RATE, torch.device("cpu"))
    load_LE = torch.full((3, 8), 0.25)
    load_LE[1, :2] = torch.tensor([0.5, 0.0])
    seen = []
    for step in range(1, 10):
        balance.follow(load_LE, steps_left=10 - step)
        seen.append(routers_of(model)[1].bias_E[:3].tolist())
    expected = [RATE * min(step, 10 - step - 1) for step in range(1, 10)]  # up with the steps, down with those left
    assert np.allclose(seen, [[-size, size, 0.0] for size in expected], rtol=1e-6, atol=0)
    assert seen[-1] == [0.0, 0.0, 0.0]
    assert (balance.bias_LE[0] == 0).all()


def test_a_run_with_a_bias_is_better_balanced(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    worst = {}
    for rate in (0.0, 0.02):
        words = ["train.max_steps=20", "model.router_aux_loss_coef=0", f"train.router_bias_rate={rate}"]
        words += ["optim.lr=0.01", "schedule.warmup_steps=0", "model.initializer_range=0.2"]
        folder = tmp_path / str(rate)
        assert run_small(folder, f"data.path={corpus}", *words) == 0
        worst[rate] = np.mean([np.max(row["expert_load"]) for row in metrics(folder)[8:16]])
    assert worst[0.02] < 0.8 * worst[0.0]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_rate_of_zero_sets_no_bias(make_model, rate):
    model = make_model()
    Balance(model, rate, torch.device("cpu")).follow(torch.rand(3, 8), steps_left=5)
    assert all((router.bias_E is None) == (rate == 0.0) for router in routers_of(model))
