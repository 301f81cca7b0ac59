"""The certificate in one process; with several: tests/multiprocess/test_verify.py."""

import pytest
import torch

from mixtral import MixtralConfig
from tests.train.helpers import read_json
from train.cli import main
from train.parallel.engine import Piece
from train.verify.compare import Bounds, Comparison
from train.verify.verb import without_flash

STACKED = "model.layers.0.mlp.experts.down_proj"


def test_a_folder_may_be_verified_again(tmp_path):
    words = ["verify", "recipe=demo", f"run.dir={tmp_path / 'run'}"]
    assert main(words) == 0
    certificate = read_json(tmp_path / "run" / "certificate.json")
    (tmp_path / "run" / "certificate.json").write_text("{}")
    assert main(words) == 0
    assert read_json(tmp_path / "run" / "certificate.json") == certificate
    assert certificate["ok"]
    assert certificate["layout"] == {"processes": 1, "expert": 1, "zero": 0, "accumulation": 1}
    assert (certificate["model"], certificate["attention"]) == ("shrunk", "sdpa")


def test_of_a_classifier_the_decoder_is_proved_under_a_language_models_head(tmp_path):
    words = ["verify", "recipe=demo", "data.path=a.jsonl", "data.format=classification", f"run.dir={tmp_path / 'run'}"]
    assert main(words) == 0
    names = {row["name"] for row in read_json(tmp_path / "run" / "certificate.json")["rows"]}
    assert any(name.endswith("gradient/lm_head.weight") for name in names)
    assert not any("score" in name for name in names)


def test_as_many_layers_are_kept_as_the_chosen_weights_need(tmp_path):
    words = [
        "verify",
        "recipe=demo",
        "train.precision=fp32",
        f"run.dir={tmp_path / 'run'}",
        "model.num_hidden_layers=4",
    ]
    assert main([*words, "train.only=model.layers.2.*"]) == 0
    certificate = read_json(tmp_path / "run" / "certificate.json")
    assert "layers.2." in str(certificate)
    assert "layers.3." not in str(certificate)
    assert "the routers' drift" in certificate["left_out"]


@pytest.mark.parametrize("experts", [1, 2, 8])
def test_a_model_whose_tokens_take_every_expert_is_proved_too(tmp_path, experts):
    words = [f"model.num_local_experts={experts}", f"model.num_experts_per_tok={experts}"]
    assert main(["verify", "recipe=demo", f"run.dir={tmp_path / 'run'}", *words]) == 0
    assert read_json(tmp_path / "run" / "certificate.json")["ok"]


def test_where_nothing_has_a_gradient_nothing_is_compared(tmp_path, capsys):
    words = ["train.only=router", "model.num_experts_per_tok=1", "model.router_aux_loss_coef=0"]
    assert main(["verify", "recipe=demo", f"run.dir={tmp_path / 'run'}", *words]) == 2
    assert "nothing to compare: what is trained, router, has no gradient" in capsys.readouterr().err


def test_what_never_came_is_out_of_bounds():
    expected = {STACKED: torch.ones(4, 2, 3).double(), "model.norm.weight": torch.ones(3).double()}
    comparison = Comparison()
    pieces = [Piece(STACKED, expert, torch.ones(2, 3)) for expert in (0, 1, 3)]
    comparison.pieces("step", "weights", pieces, expected, Bounds(1e-5))
    found = {row.name: (row.ok, row.max_rel) for row in comparison.rows}
    assert found == {f"step/{STACKED}": (False, 1.0), "step/model.norm.weight": (False, 1.0)}


def test_a_wrong_scale_and_a_wrong_expert_are_told():
    expected = {STACKED: torch.randn(2, 2, 3).double()}
    right = [Piece(STACKED, expert, expected[STACKED][expert]) for expert in range(2)]
    doubled = [right[0], Piece(STACKED, 1, 2 * expected[STACKED][1])]
    swapped = [Piece(STACKED, 0, right[1].tensor), Piece(STACKED, 1, right[0].tensor)]
    comparison = Comparison()
    for pieces in (right, doubled, swapped):
        comparison.pieces("step", "weights", pieces, expected, Bounds(1e-5))
    assert [row.ok for row in comparison.rows] == [True, False, False]
    assert comparison.rows[1].scale == pytest.approx(2.0)


def test_flash_attention_is_proved_in_fp64_by_another_backend_and_the_certificate_says_so():
    model = MixtralConfig(attn_implementation="flash_attention_2")
    assert without_flash(model)._attn_implementation == "sdpa"
    assert model._attn_implementation == "flash_attention_2"
    windowed = MixtralConfig(attn_implementation="windowed", sliding_window=8)
    assert without_flash(windowed) is windowed
