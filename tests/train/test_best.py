"""Early stopping, and the best of a run's evaluations."""

import pytest

from tests.train.helpers import SMALL, metrics, read_json, run_small, write_corpus
from tests.train.test_labelled import labelled, write
from tests.warm import launch_ranks
from train.cli import main
from train.evaluate.best import Best


@pytest.mark.parametrize("metric", ["loss", "mse", "accuracy", "exact_match"])
def test_better_is_less_of_a_loss_and_more_of_anything_else_and_patience_counts_in_a_row(metric):
    best = Best(metric, patience=2)
    sign = -1 if metric in ("loss", "mse") else 1
    heard = []
    for step, value in enumerate([1, 2, 2, 1, 3, 2, 2.5], start=1):
        assert not best.is_over
        heard.append(best.hear(step, {f"eval_{metric}": sign * value}))
        if best.is_over:
            break
    assert heard == [True, True, False, False]
    assert (best.step, best.value) == (2, 2 * sign)
    forever = Best(metric)
    assert [forever.hear(step, {f"eval_{metric}": 0.0}) for step in range(50)] == [True] + [False] * 49
    assert not forever.is_over


OVERFIT = [
    *("train.max_steps=60", "evaluate.every=2", "evaluate.patience=3", "schedule=constant", "optim.lr=2e-2"),
    *("schedule.warmup_steps=1", "optim.max_grad_norm=null", "data.held_out_fraction=0.3"),
]


def loss_of(export):
    """The loss of an export on its own held-out documents, loaded anew."""
    words = [*(word for word in SMALL if not word.startswith("model.")), f"data.path={export / 'held_out.jsonl'}"]
    words += [
        f"data.held_out_path={export / 'held_out.jsonl'}",
        "data.sequence_length=128",
        f"model.init_from={export}",
    ]
    assert main(["evaluate", *words, f"run.dir={export.parent / 'evaluated'}"]) == 0
    (figures,) = read_json(export.parent / "evaluated" / "evaluation.json")["models"].values()
    return figures["eval_loss"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_overfits_stops_and_exports_its_best_model(tmp_path, processes):
    corpus = write_corpus(tmp_path / "corpus.jsonl", 20)
    words = [*SMALL, f"data.path={corpus}", *OVERFIT, "evaluate.export_best=true", "data.sequence_length=128"]
    words += ["parallel.expert=2", "parallel.zero=2", "train.micro_batch_size=2"] if processes > 1 else []
    done = launch_ranks(processes, "train", *words, f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    summary, evaluated = read_json(run / "summary.json"), [row for row in metrics(run)[1:] if "eval_loss" in row]
    losses = [row["eval_loss"] for row in evaluated]
    least = losses.index(min(losses))
    assert summary["stopped_early"] is True
    assert len(losses) == least + 4
    assert summary["steps"] == evaluated[-1]["step"] < 60
    assert summary["best"] == {"metric": "loss", "step": evaluated[least]["step"], "value": losses[least]}
    assert losses[-1] > losses[least] * 1.01
    assert f"of 60: the best held-out loss is {losses[least]:.4f}" in read_json(run / "exit.json")["message"]
    assert loss_of(run / "export") == pytest.approx(losses[least], abs=1e-5)
    assert f"{losses[least]:.4f} after" in (run / "export" / "README.md").read_text()
    assert "# run\n" in (run / "export" / "README.md").read_text()
    (kept,) = (run / "best").glob("*/export/model.safetensors")
    assert kept.samefile(run / "export" / "model.safetensors")
    assert "sample of the last step" in done.stdout


def test_without_either_the_last_model_is_exported_and_the_best_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", labelled("classification", 100))
    words = [f"data.path={path}", "data.format=classification", "data.too_long=cut", "evaluate.metric=macro_f1"]
    assert run_small(tmp_path / "run", *words, "evaluate.every=1") == 0
    rows = metrics(tmp_path / "run")[1:]
    best = max(row["eval_macro_f1"] for row in rows)
    first = next(row["step"] for row in rows if row["eval_macro_f1"] == best)
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["best"] == {"metric": "macro_f1", "step": first, "value": best}
    assert summary["stopped_early"] is False
    assert summary["steps"] == 4


REFUSED = {
    "evaluate.patience=2": "evaluate.patience=2 compares evaluations: set evaluate.every",
    "evaluate.export_best=true": "evaluate.export_best=True compares evaluations: set evaluate.every",
    "evaluate.metric=accuracy": "evaluate.metric=accuracy is no figure of data.format=auto",
    "evaluate.metric=mse data.format=classification": "is no figure of data.format=classification",
    "evaluate.metric=exact_match": "evaluate.metric=exact_match is of prompts: set evaluate.prompts",
    "evaluate.metric=acuracy": "did you mean accuracy?",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_metric_that_there_is_not_is_refused(tmp_path, words, capsys):
    assert run_small(tmp_path / "run", "data.path=a.jsonl", *words.split()) == 2
    assert REFUSED[words] in capsys.readouterr().err


def test_a_metric_of_prompts_that_there_are_none_of_is_refused_before_training(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus.jsonl", 20)
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "a", "answer": "b"}])
    words = [f"data.path={corpus}", f"evaluate.prompts={prompts}", "evaluate.metric=choice_accuracy"]
    assert main(["train", *SMALL, f"run.dir={tmp_path / 'run'}", *words]) == 3
    assert "has no row of that kind" in capsys.readouterr().err
