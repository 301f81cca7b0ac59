"""The sequence classifier against transformers', and where the documentation says more than transformers does."""

import pytest
import torch
import transformers

from mixtral import MixtralConfig, MixtralForSequenceClassification
from tests.conftest import SIZES, skew_router

PAD = 7


def pair(**changes):
    sizes = {"pad_token_id": PAD, "num_labels": 3, **changes}
    theirs = transformers.MixtralForSequenceClassification(transformers.MixtralConfig(**SIZES, **sizes))
    skew_router(theirs)
    ours = MixtralForSequenceClassification(MixtralConfig(**SIZES, **sizes))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def padded(side):
    ids = torch.randint(8, 128, (3, 12))
    mask = torch.ones_like(ids)
    for row, length in enumerate((12, 7, 3)):
        gone = slice(length, None) if side == "right" else slice(0, 12 - length)
        ids[row, gone], mask[row, gone] = PAD, 0
    return ids, mask


PROBLEMS = {
    "one class of several": ({}, lambda: torch.tensor([0, 2, 1])),
    "several classes": ({}, lambda: torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])),
    "a number": ({"num_labels": 1}, lambda: torch.tensor([0.5, -1.0, 2.0])),
    "several numbers": ({"problem_type": "regression"}, lambda: torch.randn(3, 3)),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_logits_loss_and_gradients_equal_transformers(problem, side):
    changes, labels = PROBLEMS[problem]
    theirs, ours = pair(**changes)
    ids, mask = padded(side)
    arguments = {"input_ids": ids, "attention_mask": mask, "labels": labels()}
    expected, got = theirs(**arguments), ours(**arguments)
    assert (got.logits - expected.logits).abs().max() <= 1e-5
    assert abs(got.loss - expected.loss) <= 1e-6
    expected.loss.backward()
    got.loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        scale = max(gradients[name].norm(), 1e-4 * largest)
        assert (parameter.grad - gradients[name]).norm() <= 1e-5 * scale, name


def test_without_a_padding_id_the_last_position_is_taken():
    """As documented; transformers refuses more than one row here."""
    theirs, ours = pair(pad_token_id=None)
    ids = torch.randint(8, 128, (3, 12))
    alone = torch.cat([theirs(input_ids=row[None]).logits for row in ids])
    assert (ours(input_ids=ids).logits - alone).abs().max() <= 1e-5


def test_with_embeddings_the_last_position_is_taken():
    theirs, ours = pair()
    ids = torch.randint(8, 128, (3, 12))
    embeds = ours.model.embed_tokens(ids)
    assert (ours(inputs_embeds=embeds).logits - theirs(input_ids=ids).logits).abs().max() <= 1e-5


def test_it_goes_through_the_hubs_layout_both_ways(tmp_path):
    theirs, ours = pair()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ids, mask = padded("right")
    expected = theirs(input_ids=ids, attention_mask=mask).logits
    for model in (
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours"),
        MixtralForSequenceClassification.from_pretrained(tmp_path / "theirs"),
    ):
        assert (model(input_ids=ids, attention_mask=mask).logits - expected).abs().max() <= 1e-6


def test_routing_is_returned_when_asked_for():
    _, ours = pair()
    output = ours(input_ids=torch.randint(8, 128, (2, 5)), output_routing=True)
    assert [tuple(layer.shape) for layer in output.router_logits] == [(10, 8)] * 3
    assert [tuple(layer.shape) for layer in output.expert_indices] == [(10, 2)] * 3
    assert ours(input_ids=torch.randint(8, 128, (2, 5))).router_logits is None


@pytest.mark.parametrize(
    ("changes", "labels", "message"),
    [
        ({"num_labels": 1}, torch.zeros(2), "do not fit 1 real numbers"),
        ({"problem_type": "regression"}, torch.zeros(3), "do not fit 3 real numbers"),
        ({"problem_type": "single_label_classification"}, torch.zeros(3), "torch.float32 are no class indices"),
    ],
)
def test_labels_that_do_not_fit_are_refused(changes, labels, message):
    _, ours = pair(**changes)
    with pytest.raises(ValueError, match=message):
        ours(input_ids=padded("right")[0], labels=labels)


def test_class_indices_may_be_of_any_whole_dtype():
    _, ours = pair()
    ids, labels = padded("right")[0], torch.tensor([0, 2, 1])
    assert ours(input_ids=ids, labels=labels.int()).loss == ours(input_ids=ids, labels=labels).loss
