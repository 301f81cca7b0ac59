"""Whole runs of one process: what they write, and how they refuse what cannot run."""

import itertools
import json
import os
import signal
import socket
import subprocess
import time

import pytest
import torch
import transformers
import yaml

from mixtral import MixtralForCausalLM
from tests.train.helpers import PYTHON, SMALL, kill_group, metrics, read_json, run_small, write_corpus
from tests.warm import launch_ranks
from train.compose import compose
from train.config import Config, TrainConfig
from train.errors import NumericsError, StopSignal
from train.folder import RunFolder
from train.model import empty_model
from train.parallel.replicated import ReplicatedEngine
from train.setup import signals_as_errors

FIGURES = {
    "step", "tokens", "loss", "router_loss", "router_objective", "router_z_loss", "grad_norm", "lr",
    "tokens_per_second", "data_wait_fraction", "peak_memory_bytes", "expert_load", "router_entropy",
    "dropped_fraction", "cross_rank_fraction", "skipped_steps",
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """One run that the tests below look at."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run_small(folder, f"data.path={corpus}", "evaluate.every=2", "run.plots=true") == 0
    return folder


def test_the_run_folder_holds_the_contracts_files(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "tokenizer",
        "config.yaml",
        "overrides.yaml",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "exit.json",
    }
    assert {path.name for path in (finished / "plots").iterdir()} == {"loss.png", "expert_load.png", "router.png"}
    assert read_json(finished / "exit.json") == {"reason": "done", "code": 0, "message": "4 steps"}
    assert "data.path=" in (finished / "overrides.yaml").read_text()
    # a build may say more of itself than its package: 2.13.0+cu130, of torch 2.13.0
    recorded = read_json(finished / "environment.json")["packages"]["torch"]
    assert recorded.partition("+")[0] == torch.__version__.partition("+")[0]


def test_the_resolved_configuration_composes_to_itself(finished):
    written = yaml.safe_load((finished / "config.yaml").read_text())
    assert written["train"]["max_steps"] == 4
    assert compose([f"recipe={finished / 'config.yaml'}"]).config.run.dir == str(finished)


def test_every_logged_step_has_every_figure(finished):
    rows = metrics(finished)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4]
    for row in rows[1:]:
        assert set(row) - {"eval_loss", "eval_perplexity"} == FIGURES
        assert [len(layer) for layer in row["expert_load"]] == [8, 8]
        assert all(sum(layer) == pytest.approx(1) for layer in row["expert_load"])
        assert len(row["router_entropy"]) == 2
        assert row["dropped_fraction"] == 0
        assert row["tokens"] == row["step"] * 4 * 32
    assert rows[0]["eval_perplexity"] == pytest.approx(torch.tensor(rows[0]["eval_loss"]).exp().item(), rel=1e-5)


def test_the_export_loads_in_transformers_with_our_loss(finished):
    export = finished / "export"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export)
    ours = MixtralForCausalLM.from_pretrained(export)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    rows = [json.loads(line) for line in (export / "held_out.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        losses = [model(ids, labels=ids).loss.item() for model in (theirs, ours)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert "library_name: transformers" in (export / "README.md").read_text()
    assert (export / "generation_config.json").exists()


def test_the_last_evaluation_is_that_of_the_exported_model(finished):
    """The whole pipeline once more by hand: token-weighted over the packed held-out documents."""
    export = finished / "export"
    model = transformers.AutoModelForCausalLM.from_pretrained(export)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    stream, starts = [], set()
    for line in (export / "held_out.jsonl").read_text().splitlines():
        starts.add(len(stream))
        stream += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    total = count = 0.0
    cuts = sorted(starts | set(range(0, len(stream), 32)) | {len(stream)})
    for begin, end in itertools.pairwise(cuts):
        logits = model(torch.tensor([stream[begin:end]])).logits[0].log_softmax(-1)
        follows = [place + 1 for place in range(begin, end) if place + 1 < len(stream) and place + 1 not in starts]
        total -= sum(logits[place - 1 - begin, stream[place]].item() for place in follows)
        count += len(follows)
    assert metrics(finished)[-1]["eval_loss"] == pytest.approx(total / count, abs=1e-4)


def test_the_same_seed_repeats_a_run_and_another_does_not(finished, corpus, tmp_path):
    def losses(folder):
        return [row["loss"] for row in metrics(folder)[1:]]

    assert run_small(tmp_path / "same", f"data.path={corpus}") == 0
    assert run_small(tmp_path / "other", f"data.path={corpus}", "run.seed=1") == 0
    assert losses(tmp_path / "same") == losses(finished)
    assert losses(tmp_path / "other") != losses(finished)


def test_a_run_learns(corpus, tmp_path):
    assert run_small(tmp_path, f"data.path={corpus}", "train.max_steps=30", "optim.lr=0.01") == 0
    rows = metrics(tmp_path)
    assert rows[-1]["eval_loss"] < 0.75 * rows[0]["eval_loss"]


@pytest.mark.parametrize(
    "words",
    [
        ["train.precision=bf16", "train.gradient_accumulation_steps=2"],
        ["optim=sgd", "schedule=warmup_stable_decay", "schedule.warmup_steps=1"],
        ["train.router_loss_scope=huggingface", "train.router_z_loss_coef=0.001", "model.router_jitter_noise=0.1"],
        ["model.sliding_window=8", "model.attention_dropout=0.1", "model.tie_word_embeddings=true"],
        ["data.streaming=true", "data.tokenizer=mixtral", "model.vocab_size=32000", "data.shuffle_buffer=8"],
        [
            "model.attn_implementation=eager",
            "data.shuffle=false",
            "evaluate.micro_batch_size=2",
            "optim.max_grad_norm=null",
        ],
    ],
    ids=lambda words: words[0],
)
def test_each_choice_trains(corpus, tmp_path, words):
    assert run_small(tmp_path, f"data.path={corpus}", *words) == 0
    assert metrics(tmp_path)[-1]["loss"] > 0


def test_an_epoch_ends_where_the_data_does(corpus, tmp_path):
    assert (
        run_small(tmp_path, f"data.path={corpus}", "train.max_steps=null", "train.epochs=2", "train.micro_batch_size=7")
        == 0
    )
    tokens = [row["tokens"] for row in metrics(tmp_path)]
    rows_in_an_epoch = -(-(tokens[-1] // 2) // 32)
    assert tokens[-1] % 2 == 0
    assert metrics(tmp_path)[-1]["step"] == -(-2 * rows_in_an_epoch // 7)
    assert tokens[-1] < tokens[-2] + 7 * 32  # the last step is filled with padding, which is not counted


@pytest.mark.parametrize("steps", [1, 4])
def test_an_exploding_run_ends_with_five_and_exports_nothing(corpus, tmp_path, steps):
    """The gradient tells of it at the next step, and after the last one the evaluation does."""
    words = [
        "optim=sgd",
        "optim.lr=1e30",
        f"data.path={corpus}",
        f"train.max_steps={steps}",
        "evaluate.sample_tokens=0",
    ]
    assert run_small(tmp_path, *words) == 5
    assert read_json(tmp_path / "exit.json")["reason"] == "numerics"
    assert not (tmp_path / "export").exists()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_no_weight(make_model, bad):
    engine = ReplicatedEngine(Config(train=TrainConfig(precision="fp32")))
    model = make_model()
    engine.prepare(empty_model(model.config), lambda _: model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    for parameter in engine.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.module.lm_head.weight.grad[3, 3] = bad
    with pytest.raises(NumericsError, match="the gradient norm is"):
        engine.step(lr=0.1)
    assert all(torch.equal(parameter, before[name]) for name, parameter in engine.module.named_parameters())


def test_accelerate_settings_in_the_environment_change_no_gradient(finished, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert run_small(tmp_path, f"data.path={corpus}") == 0
    assert metrics(tmp_path)[1]["grad_norm"] == metrics(finished)[1]["grad_norm"]


REFUSED = {
    "empty file": (b"", "no text in it", 3),
    "blank lines": (b"\n\n \n", "no text in it", 3),
    "not UTF-8": (b'{"text": "\xe9"}\n', "corpus.jsonl:1: not UTF-8", 3),
    "missing field": (b'{"text": "a"}\n{"body": "b"}\n', "corpus.jsonl:2: missing column: no 'text'", 3),
    "broken line": (b'{"text": "a"}\n{"text": "b"\n', "corpus.jsonl:2: not JSON", 3),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_data_ends_with_one_error_before_the_first_step(case, tmp_path, capsys):
    content, message, code = REFUSED[case]
    (tmp_path / "corpus.jsonl").write_bytes(content)
    assert run_small(tmp_path / "run", f"data.path={tmp_path / 'corpus.jsonl'}") == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    ended = read_json(tmp_path / "run" / "exit.json")
    assert (ended["reason"], ended["code"]) == ("data", 3)
    assert message in ended["message"]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_that_failed_before_its_first_step_can_be_used_again(corpus, tmp_path):
    assert run_small(tmp_path / "run", "data.path=/no/such.jsonl") == 3
    assert run_small(tmp_path / "run", f"data.path={corpus}") == 0
    assert read_json(tmp_path / "run" / "exit.json")["code"] == 0


def test_a_tokenizer_larger_than_the_embedding_ends_with_two(corpus, tmp_path):
    assert run_small(tmp_path / "run", f"data.path={corpus}", "data.tokenizer=mixtral") == 2
    assert "model.vocab_size" in read_json(tmp_path / "run" / "exit.json")["message"]


def test_a_token_out_of_range_ends_with_three_before_the_first_step(tmp_path, capsys):
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [1, 2, 3, 4]}\n{"input_ids": [1, 2, 32000]}\n')
    words = ["data.tokenizer=mixtral", "model.vocab_size=32000", f"data.held_out_path={path}"]
    assert run_small(tmp_path / "run", f"data.path={path}", *words) == 3
    assert "ids.jsonl:2: token out of range: 32000" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_that_cannot_be_written_ends_with_six(corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert run_small(tmp_path / "file" / "run", f"data.path={corpus}") == 6
    assert "cannot be written" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_left_as_it_is(finished, corpus, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert run_small(finished, f"data.path={corpus}") == 6
    assert "holds a run already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_a_run_whose_exit_cannot_be_written_says_so_and_lets_its_folder_go(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    (tmp_path / ".exit.json.partial").mkdir()
    folder.close("disk full", 6, "make room")
    assert "exit.json cannot be written: Is a directory" in capsys.readouterr().err
    (tmp_path / ".exit.json.partial").rmdir()
    RunFolder(tmp_path).close("done", 0, "")
    assert read_json(tmp_path / "exit.json")["code"] == 0


def test_a_folder_with_files_of_another_kind_is_left_as_it_is(corpus, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("mine")
    assert run_small(tmp_path, f"data.path={corpus}") == 6
    assert "holds files that are no run's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.fixture
def living(corpus, tmp_path):
    """A run in another process that has begun to train, and its folder."""
    folder = tmp_path / "living"
    words = [*SMALL, f"data.path={corpus}", f"run.dir={folder}", "train.max_steps=100000", "checkpoint.every=null"]
    words.append("run.plots=true")
    process = subprocess.Popen(
        [*PYTHON, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").stat().st_size:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    yield process, folder
    kill_group(process)
    process.wait()


@pytest.mark.slow
def test_a_folder_in_use_names_its_owner_and_is_left_alone(living, corpus, capsys):
    process, folder = living
    assert run_small(folder, f"data.path={corpus}") == 6
    message = capsys.readouterr().err
    assert f"process {process.pid} on {socket.gethostname()}" in message
    assert not (folder / "exit.json").exists()
    process.kill()
    process.wait()
    (folder / "metrics.jsonl").unlink()
    assert run_small(folder, f"data.path={corpus}") == 0  # a dead owner's lock is free


@pytest.mark.slow
def test_a_terminated_run_says_so(living):
    process, folder = living
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert read_json(folder / "exit.json") == {"reason": "interrupted", "code": 143, "message": "stopped by SIGTERM"}


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_nohup_or_a_script_had_ignored_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with signals_as_errors():
            os.kill(os.getpid(), number)
        signal.signal(number, signal.SIG_DFL)
        with pytest.raises(StopSignal), signals_as_errors():
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


@pytest.mark.slow
def test_an_interrupted_run_has_its_pictures(living):
    process, folder = living
    deadline = time.monotonic() + 60
    while len(metrics(folder)) < 10 and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert {path.name for path in (folder / "plots").iterdir()} == {"loss.png", "expert_load.png", "router.png"}


@pytest.mark.slow
def test_by_default_a_run_makes_its_own_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = launch_ranks(1, "train", *SMALL, f"data.path={corpus}", "train.max_steps=1")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("pretrain_tiny-20")
    assert read_json(folder / "exit.json")["code"] == 0
