"""The pure losses against plain loops, and what they must not depend on."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mixtral.losses import (
    load_balancing_loss,
    pooled_load_balancing_loss,
    router_statistics,
    router_z_loss,
    shift_labels,
)

LAYERS, TOKENS, EXPERTS, TOP_K = 3, 40, 6, 2


def random_routing(tokens=TOKENS):
    logits = [torch.randn(tokens, EXPERTS, dtype=torch.float64).mul(3).requires_grad_() for _ in range(LAYERS)]
    return logits, [layer.topk(TOP_K).indices for layer in logits]


def test_load_balancing_equals_a_loop_over_tokens():
    logits, experts = random_routing()
    expected = 0.0
    for layer_logits, layer_experts in zip(logits, experts, strict=True):
        share, probability = [0.0] * EXPERTS, [0.0] * EXPERTS
        for token in range(TOKENS):
            for expert in layer_experts[token].tolist():
                share[expert] += 1 / TOKENS
            for expert in range(EXPERTS):
                probability[expert] += layer_logits[token].softmax(-1)[expert].item() / TOKENS
        expected += EXPERTS * sum(s * p for s, p in zip(share, probability, strict=True)) / LAYERS
    statistics = router_statistics(logits, experts)
    got = load_balancing_loss(statistics.counts_LE, statistics.probability_LE, TOKENS)
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_balance_scores_top_k_and_collapse_scores_the_number_of_experts():
    even = torch.full((1, EXPERTS), TOKENS * TOP_K / EXPERTS), torch.full((1, EXPERTS), TOKENS / EXPERTS)
    assert load_balancing_loss(*even, TOKENS).item() == pytest.approx(TOP_K)
    collapsed = torch.tensor([[TOKENS, TOKENS, 0.0]]), torch.tensor([[TOKENS / 2, TOKENS / 2, 0.0]])
    assert load_balancing_loss(*collapsed, TOKENS).item() == pytest.approx(3)


def test_layers_that_collapse_onto_different_experts_do_not_hide_each_other():
    counts = torch.tensor([[TOKENS, 0.0], [0.0, TOKENS]])
    one_layer = load_balancing_loss(counts[:1], counts[:1], TOKENS)
    assert load_balancing_loss(counts, counts, TOKENS).item() == one_layer.item() == 2
    logits = [torch.tensor([[9.0, 0.0]]).repeat(TOKENS, 1), torch.tensor([[0.0, 9.0]]).repeat(TOKENS, 1)]
    statistics = router_statistics(logits, [layer.topk(1).indices for layer in logits])
    assert pooled_load_balancing_loss(statistics, TOKENS).item() == pytest.approx(1)  # the published one does hide it


@pytest.mark.parametrize("padded", [False, True])
def test_pooled_loss_equals_transformers_with_its_gradient(padded):
    logits, experts = random_routing()
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    if padded:
        mask[0, 25:] = 0
    expected = load_balancing_loss_func(tuple(logits), EXPERTS, TOP_K, mask)
    expected_gradients = torch.autograd.grad(expected, logits)
    got = pooled_load_balancing_loss(router_statistics(logits, experts, mask), mask.sum())
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)  # theirs counts in fp32
    for mine, other in zip(torch.autograd.grad(got, logits), expected_gradients, strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-9)


def test_padding_leaves_router_losses_unchanged():
    logits, experts = random_routing()
    mask = torch.arange(TOKENS) < 25
    cut = router_statistics([x[:25] for x in logits], [x[:25] for x in experts])
    masked = router_statistics(logits, experts, mask)
    for mine, other in zip(masked, cut, strict=True):
        assert torch.allclose(mine, other, rtol=1e-12, atol=1e-14)


def test_parts_of_a_batch_add_up_to_the_whole_with_its_gradient():
    """Given the global counts, the parts' losses and gradients sum to one large batch's."""
    logits, experts = random_routing()
    whole = router_statistics(logits, experts)
    expected = load_balancing_loss(whole.counts_LE, whole.probability_LE, TOKENS)
    expected_gradients = torch.autograd.grad(expected, logits)
    parts = [slice(0, 13), slice(13, TOKENS)]
    total = sum(
        load_balancing_loss(
            whole.counts_LE,
            router_statistics([x[part] for x in logits], [x[part] for x in experts]).probability_LE,
            TOKENS,
        )
        for part in parts
    )
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    for mine, other in zip(torch.autograd.grad(total, logits), expected_gradients, strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-15)


def test_z_loss_equals_its_definition():
    logits, experts = random_routing()
    expected = torch.stack([layer.exp().sum(-1).log().square() for layer in logits]).mean()
    got = router_z_loss(router_statistics(logits, experts).squared_lse_L, TOKENS)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)


def test_entropy_of_uniform_routers_is_the_logarithm_of_the_experts():
    logits = [torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)]
    entropy = router_statistics(logits, [logits[0].topk(TOP_K).indices]).entropy_L / TOKENS
    assert entropy.item() == pytest.approx(torch.tensor(float(EXPERTS)).log().item(), rel=1e-6)


def test_no_token_gives_zero_and_not_nan():
    logits, experts = random_routing()
    nothing = router_statistics(logits, experts, torch.zeros(TOKENS, dtype=torch.bool))
    losses = [
        load_balancing_loss(nothing.counts_LE, nothing.probability_LE, 0),
        pooled_load_balancing_loss(nothing, 0),
        router_z_loss(nothing.squared_lse_L, 0),
    ]
    assert [loss.item() for loss in losses] == [0, 0, 0]


def test_shifted_labels_predict_the_next_token():
    assert shift_labels(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, -100]]
