"""Routing is compared with that of the model that a run started from, whatever became of the run."""

import json
import shutil

import pytest
import torch
import transformers

from mixtral.losses import router_divergence
from tests.multiprocess.many_runs import run
from tests.train.helpers import SMALL, metrics, read_json, run_small, write_corpus
from tests.train.test_labelled import labelled
from train.cli import main
from train.compose import compose
from train.config import check_training, routing_can_move
from train.data.build import open_documents, pack
from train.data.share import Share, evenly
from train.data.tokenizer import open_tokenizer
from train.drift import Routed, agreement
from train.errors import ConfigError

FREE = [word for word in SMALL if not word.startswith("model.")]
TUNED = ["optim.lr=1e-3", "schedule.warmup_steps=0", "train.max_steps=6", "evaluate.every=3"]
TOKENS = 200  # in 7 rows of 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl", documents=150)


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "run"
    words = ["train.max_steps=20", "optim.lr=1e-2", "schedule.warmup_steps=0", "tracker=none"]
    assert run_small(folder, f"data.path={corpus}", *words) == 0
    return folder / "export"


def tune(folder, corpus, base, *words):
    given = [f"data.path={corpus}", f"model.init_from={base}", f"run.dir={folder}"]
    assert main(["train", *FREE, *TUNED, *given, f"evaluate.router_drift_tokens={TOKENS}", *words]) == 0
    return metrics(folder)


def drift_of(rows):
    return {row["step"]: (row["router_agreement"], row["router_kl"]) for row in rows if "router_kl" in row}


def documents(corpus, base):
    """The documents, or parts of such, of the held-out rows that are compared."""
    config = compose([*FREE, f"data.path={corpus}", f"model.init_from={base}"]).config
    training, held_out = open_documents(config.data)
    tokenizer = open_tokenizer(config.data.tokenizer, config.model.vocab_size, training, None)
    data = pack(training, held_out, tokenizer, config)
    rows = -(-TOKENS // config.data.sequence_length)
    assert rows < len(data.held_out)
    for batch in data.evaluation(Share(0, 1, 1), most=rows):
        ids, mask, positions = batch.input_ids[0], batch.token_mask[0], batch.position_ids[0]
        starts = [at for at in range(len(ids)) if positions[at] == 0 and mask[at]]
        for start, stop in zip(starts, [*starts[1:], int(mask.sum())], strict=True):
            yield ids[None, start:stop]


@torch.no_grad()
def published_logits(folder, corpus, base):
    """What transformers' routers say of every token: (L, T, E)."""
    model = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = [model(ids, output_router_logits=True).router_logits for ids in documents(corpus, base)]
    return torch.stack([torch.cat(layer) for layer in zip(*found, strict=True)]).double()


def test_the_figures_are_those_of_transformers_routers(tmp_path, corpus, base):
    found = drift_of(tune(tmp_path / "run", corpus, base, "run.plots=true"))
    assert found.keys() == {0, 3, 6}
    assert found[0] == ([1.0, 1.0], [0.0, 0.0])
    then, now = (published_logits(folder, corpus, base) for folder in (base, tmp_path / "run" / "export"))
    chosen = [set_of.topk(2, dim=-1).indices.tolist() for set_of in (then, now)]
    for layer in range(2):
        p, q = then[layer].softmax(dim=-1), now[layer].softmax(dim=-1)
        kl = (p * (p / q).log()).sum(dim=-1).mean().item()
        pairs = list(zip(chosen[0][layer], chosen[1][layer], strict=True))
        same = sum(len(set(one) & set(other)) for one, other in pairs) / (2 * len(pairs))
        assert kl > 1e-4
        assert 0.05 < same < 0.95
        assert found[6][1][layer] == pytest.approx(kl, rel=1e-4)
        assert found[6][0][layer] == pytest.approx(same, abs=1.01 / len(pairs))  # a tie, to rounding
    assert (tmp_path / "run" / "plots" / "router_drift.png").is_file()


RESUMED = {
    "weights": [],
    "adapters": ["lora.rank=4", "lora.targets=q_proj,gate", "lora.dropout=0.1"],
    "bf16": ["train.precision=bf16", "train.only=router"],
    "held": ["train.router_drift_coef=0.5", "evaluate.router_drift_tokens=0"],
    "adapters, held": ["train.router_drift_coef=0.5", "lora.rank=4", "lora.targets=gate", "train.recompute=layers"],
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_that_died_is_compared_with_the_base_and_not_with_what_it_goes_on_from(tmp_path, corpus, base, kind):
    words = [f"data.path={corpus}", f"model.init_from={base}", *TUNED, "checkpoint.every=2", *RESUMED[kind]]
    whole, died = ([*words, f"run.dir={tmp_path / name}"] for name in ("whole", "died"))
    assert [run(whole), run(died, dies_at=4), run(died, dies_at=2), run(died)] == [0, 99, 99, 0]
    names = ("loss", "grad_norm", "router_drift_loss", "router_agreement", "router_kl")
    whole, died = (
        [{key: row[key] for key in names if key in row} for row in metrics(tmp_path / name)]
        for name in ("whole", "died")
    )
    assert whole == died
    if kind != "held":
        assert whole[6]["router_kl"] != [0.0, 0.0]
    if "held" in kind:
        assert whole[1]["router_drift_loss"] == 0.0
        assert whole[6]["router_drift_loss"] > 0.0


def test_a_run_that_holds_its_routers_drifts_less(tmp_path, corpus, base):
    free, held = (
        tune(tmp_path / coefficient, corpus, base, "train.only=router", f"train.router_drift_coef={coefficient}")
        for coefficient in ("0.0", "100.0")
    )
    for layer in range(2):
        assert 0 < drift_of(held)[6][1][layer] < 0.5 * drift_of(free)[6][1][layer]
    assert not any("router_drift_loss" in row for row in free)
    assert held[-1]["router_drift_loss"] > 0


def test_measuring_changes_no_bit_of_a_run(tmp_path, corpus, base):
    tune(tmp_path / "measured", corpus, base)
    tune(tmp_path / "not", corpus, base, "evaluate.router_drift_tokens=0")
    rows = [
        [
            {key: row[key] for key in ("loss", "grad_norm", "eval_loss") if key in row}
            for row in metrics(tmp_path / name)
        ]
        for name in ("measured", "not")
    ]
    assert rows[0] == rows[1]
    exports = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("measured", "not")]
    assert exports[0] == exports[1]


def test_the_base_of_a_run_that_goes_on_from_an_adapter_is_the_adapted_model(tmp_path, corpus, base):
    words = ["lora.rank=4", "lora.targets=q_proj,gate", "optim.lr=1e-2"]
    tune(tmp_path / "first", corpus, base, *words)
    rows = tune(
        tmp_path / "on", corpus, base, f"lora.init_from={tmp_path / 'first' / 'export'}", "train.router_drift_coef=1"
    )
    assert drift_of(rows)[0] == ([1.0, 1.0], [0.0, 0.0])
    assert rows[1]["router_drift_loss"] == 0.0
    assert rows[6]["router_drift_loss"] > 0.0


def test_another_base_is_not_taken_for_the_one_that_the_run_began_with(tmp_path, corpus, base, capsys):
    given = shutil.copytree(base, tmp_path / "given")
    words = ["checkpoint.every=2", "train.max_steps=4"]
    tune(tmp_path / "run", corpus, given, *words)
    other = tmp_path / "other" / "export"
    assert run_small(other.parent, f"data.path={corpus}", "train.max_steps=1", "run.seed=1") == 0
    shutil.copy(other / "model.safetensors", given / "model.safetensors")
    words = [*FREE, *TUNED, f"data.path={corpus}", f"model.init_from={given}", f"run.dir={tmp_path / 'run'}", words[0]]
    assert main(["train", *words]) == 4
    assert "has other routers than when the run began" in capsys.readouterr().err
    assert main(["train", *words, "evaluate.router_drift_tokens=0"]) == 0
    assert 6 not in drift_of(metrics(tmp_path / "run"))


def test_a_classifier_is_compared_too(tmp_path, base):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled("classification", 60)))
    found = drift_of(tune(tmp_path / "run", path, base, "data.format=classification", "data.too_long=cut"))
    assert found[0] == ([1.0, 1.0], [0.0, 0.0])
    assert all(0 < kl < 10 for kl in found[6][1])


def test_a_layer_that_drifts_raises_an_alarm_in_a_run(tmp_path, corpus, base, capfd):
    tune(tmp_path / "run", corpus, base, "evaluate.router_agreement_alarm=1.0")
    lines = [line for line in capfd.readouterr().out.splitlines() if "router_agreement_alarm=1" in line]
    assert lines[0].startswith("ALARM step 3: layer 0 makes ")
    assert lines[0].endswith(
        "; lower optim.lr, raise train.router_drift_coef, or freeze the routers (by lora.targets or train.only)"
    )
    assert len(lines) == 2  # a layer each, and not again in step 6


def test_agreement_counts_choices_in_any_order_and_no_padding():
    now = Routed((), (torch.tensor([[0, 1], [2, 3], [4, 5]]),), torch.tensor([True, True, False]))
    base = Routed((), (torch.tensor([[1, 0], [3, 4], [4, 5]]),), torch.tensor([True, True, False]))
    assert agreement(now, base).tolist() == [1.5]


def test_divergence_is_that_of_the_distributions():
    now, base = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False])
    found = router_divergence(list(now), list(base), mask)
    p, q = base.softmax(dim=-1), now.softmax(dim=-1)
    assert torch.allclose(found, (p * (p / q).log()).sum(dim=-1)[:, mask].sum(dim=-1), rtol=1e-12, atol=1e-12)
    assert router_divergence(list(base), list(base)).tolist() == [0.0, 0.0]


def test_rows_are_evenly_spread_and_all_where_there_are_fewer():
    assert evenly(10, 3) == [0, 3, 6]
    assert evenly(3, 10) == evenly(3, None) == [0, 1, 2]
    assert evenly(0, 4) == []


CAN_MOVE = {
    "train.only=all": True,
    "train.only=router": True,
    "train.only=norms": True,
    "train.only=model.norm.weight": False,
    "train.only=lm_head.weight": False,
    "train.only=model.layers.1.mlp.experts.*": False,
    "train.only=model.layers.0.mlp.experts.*": True,
    "lora.rank=4 lora.targets=q_proj lora.experts=false": True,
    "lora.rank=4 lora.targets=lm_head lora.experts=false": False,
    "lora.rank=4 lora.targets=lm_head": True,
}


@pytest.mark.parametrize("words", CAN_MOVE)
def test_only_what_comes_before_a_router_moves_its_choices(base, words):
    assert routing_can_move(compose([*FREE, f"model.init_from={base}", *words.split()]).config) == CAN_MOVE[words]


REFUSED = {
    "evaluate.router_drift_tokens=99": "evaluate.router_drift_tokens=99 is of no effect: set model.init_from",
    "evaluate.router_agreement_alarm=0.7": "evaluate.router_agreement_alarm=0.7 is of no effect: set model.init_from",
    "BASE train.only=lm_head.weight evaluate.router_agreement_alarm=0.7": "no weight is trained that routing hangs on",
    "train.router_drift_coef=0.1": "train.router_drift_coef=0.1 .*set model.init_from",
    "BASE train.router_drift_coef=0.1 lora.rank=4 lora.targets=q_proj": "coef=0.1 .*set lora.targets=q_proj,gate",
    "BASE train.router_drift_coef=0.1 train.only=attention": "train.router_drift_coef=0.1 .*add router to train.only",
    "BASE evaluate.router_drift_tokens=0 evaluate.router_agreement_alarm=0.7": "set evaluate.router_drift_tokens",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_key_without_effect_is_refused(base, words):
    given = [word.replace("BASE", f"model.init_from={base}") for word in words.split()]
    with pytest.raises(ConfigError, match=REFUSED[words]) as caught:
        check_training(compose([*FREE, *given]).config)
    assert caught.value.code == 2


def test_a_run_from_nothing_has_no_such_figures(base):
    assert not any("router_kl" in row for row in metrics(base.parent))
    assert "drift" not in read_json(next((base.parent / "checkpoints").glob("step-*")) / "state.json")["parts"]


def test_the_drift_is_on_the_console_and_in_the_summary_with_the_tokens_it_is_of(tmp_path, corpus, base, capsys):
    last = tune(tmp_path / "run", corpus, base)[-1]
    summary = read_json(tmp_path / "run" / "summary.json")
    assert all(summary[name] == last[name] for name in ("router_agreement", "router_kl", "router_drift_tokens"))
    compared = sum(ids.shape[1] for ids in documents(corpus, base))
    assert summary["router_drift_tokens"] == compared
    figures = f"router agreement at least {min(last['router_agreement']):.4f}, KL at most {max(last['router_kl']):.4f}"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 6/6")]
    assert f", {figures}  loss" in line
