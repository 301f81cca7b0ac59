"""What dies, is damaged, full, changed or planted: each a real fault, and what a run then does."""

import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch

from tests.multiprocess.many_runs import run
from tests.train.helpers import PYTHON, SMALL, kill_group, metrics, read_json, run_small, write_corpus
from tests.train.test_checkpoint import figures, tensors
from tests.warm import launch_ranks
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.durable import Written
from train.checkpoint.find import find
from train.checkpoint.manifest import render
from train.checkpoint.preemption import Preemption
from train.cli import main
from train.config import Config, TrainConfig
from train.errors import StopSignal
from train.parallel.replicated import ReplicatedEngine
from train.setup import signals_as_errors

STEPS = ["checkpoint.every=3", "train.max_steps=8", "checkpoint.keep_last=3", "evaluate.sample_tokens=0"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """An uninterrupted run with checkpoints after steps 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run_small(folder, f"data.path={corpus}", *STEPS) == 0
    return folder


@pytest.fixture(scope="module")
def engine():
    return ReplicatedEngine(Config(train=TrainConfig(precision="fp32")))


@pytest.fixture
def died(finished, tmp_path):
    """The same run, as a death in its export would have left it."""
    shutil.copytree(finished, tmp_path / "died")
    (tmp_path / "died" / "exit.json").unlink()
    shutil.rmtree(tmp_path / "died" / "export")
    return tmp_path / "died"


def digest_of(content: bytes) -> Written:
    import hashlib

    return Written(len(content), hashlib.sha256(content).hexdigest())


def damage(draw, folder, older):
    """Does one random harm to one file of a checkpoint; returns its name and what was done."""
    path = draw.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    place = draw.randrange(len(content))
    kind = draw.choice(["flip", "truncate", "append", "delete", "swap", "zero", "empty"])
    changed = {
        "flip": content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :],
        "truncate": content[:place],
        "append": content + b" ",
        "swap": (older / path.name).read_bytes(),
        "zero": content[:place] + bytes(min(512, len(content) - place)) + content[place + 512 :],
        "empty": b"",
        "delete": None,
    }[kind]
    if changed == content:
        return damage(draw, folder, older)
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    return path.name, kind


def test_every_damage_is_found_and_the_one_before_is_taken_with_one_loud_line(engine, finished, tmp_path, capsys):
    draw, root, seen = random.Random(7), tmp_path / "checkpoints", set()
    shutil.copytree(finished / "checkpoints", root)
    newest, older = root / "step-00000008", root / "step-00000006"
    for _ in range(250):
        seen.add(damage(draw, newest, older))
        found = find(engine, root, "auto")
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
        assert found.folder == older
        assert len(said) == 1
        assert str(newest) in said[0]
        assert str(older) in said[0]
        shutil.rmtree(newest)
        shutil.copytree(finished / "checkpoints" / newest.name, newest)
    assert len(seen) == 3 * 7
    assert find(engine, root, "auto").folder == newest


def test_without_one_whole_checkpoint_no_step_is_run(died, corpus, capsys):
    before = (died / "metrics.jsonl").read_bytes()
    for path in died.glob("checkpoints/step-*/state.json"):
        path.write_bytes(path.read_bytes()[:-1])
    assert run_small(died, f"data.path={corpus}", *STEPS) == 4
    assert "all 3 checkpoints" in capsys.readouterr().err
    shutil.rmtree(died / "checkpoints" / "step-00000003")
    shutil.rmtree(died / "checkpoints" / "step-00000006")
    shutil.rmtree(died / "checkpoints" / "step-00000008")
    assert run_small(died, f"data.path={corpus}", *STEPS) == 4
    assert "holds no checkpoint any more" in capsys.readouterr().err
    assert read_json(died / "exit.json")["reason"] == "checkpoint"
    assert (died / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [None, "", "step-00000003", "../../elsewhere", "step-00000099", b"\xff\x00"])
def test_whatever_latest_says_the_newest_whole_checkpoint_is_taken(engine, died, content, capsys):
    latest = died / "checkpoints" / "latest"
    latest.unlink()
    if content is not None:
        latest.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert find(engine, died / "checkpoints", "auto").folder.name == "step-00000008"
    assert "WARNING" in capsys.readouterr().out


def plant(folder, name, content, step=8):
    """Replaces a file of a checkpoint, and has the manifest say so."""
    (folder / name).write_bytes(content)
    files = {path.name: digest_of(path.read_bytes()) for path in folder.iterdir() if path.name != "manifest.json"}
    (folder / "manifest.json").write_text(render(step, files))


class Planted:
    def __reduce__(self):
        return os.mkdir, ("planted-by-a-pickle",)


PLANTED = {
    "a pickle": (pickle.dumps(Planted()), "rank-00000.safetensors"),
    "a header that never ends": ((2**62).to_bytes(8, "little") + b"{}", "cannot be"),
    "a tensor of no checkpoint": (
        (57).to_bytes(8, "little") + b'{"a/b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}} ' + b"\0" * 4,
        "which no checkpoint does",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_what_is_planted_with_a_right_hash_runs_no_code_and_ends_with_four(case, died, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = PLANTED[case]
    plant(died / "checkpoints" / "step-00000008", "rank-00000.safetensors", content)
    assert run_small(died, f"data.path={corpus}", *STEPS) == 4
    assert message in read_json(died / "exit.json")["message"]
    assert not (tmp_path / "planted-by-a-pickle").exists()


STATES = {
    "an empty file": ("", "JSONDecodeError"),
    "no JSON": ("{" * 9, "JSONDecodeError"),
    "nests without end": ("[" * 100_000, "RecursionError"),
    "a list": ("[]", "step is missing, or not of its kind"),
    "a step alone": ('{"step": 8}', "rows_per_step is missing, or not of its kind"),
}
WRONG = {
    "step": "8",
    "updates": True,
    "processes": 2,
    "random": [{}, 1],
    "parameters": {"a": [1, "2"]},
    "parts": {"a": 1},
}
WRONG |= {"frozen": None, "data": {"sha256": []}, "tracker_id": 7, "config": {"run": None}, "versions": ["torch"]}


@pytest.mark.parametrize("case", [*STATES, *WRONG])
def test_a_state_that_is_none_is_damage_though_its_hash_be_right(case, engine, died, capsys):
    newest = died / "checkpoints" / "step-00000008"
    content, message = STATES.get(case, ("", "damaged: "))
    if case in WRONG:
        content = json.dumps(read_json(newest / "state.json") | {case: WRONG[case]})
    plant(newest, "state.json", content.encode())
    assert find(engine, died / "checkpoints", "auto").folder.name == "step-00000006"
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert len(said) == 1
    assert message in said[0]


def test_a_lone_checkpoint_whose_state_is_none_ends_with_four(died, corpus):
    for step in (3, 6):
        shutil.rmtree(died / "checkpoints" / f"step-{step:08d}")
    plant(died / "checkpoints" / "step-00000008", "state.json", b'{"step": 8}')
    assert run_small(died, f"data.path={corpus}", *STEPS) == 4
    said = read_json(died / "exit.json")["message"]
    assert "state.json is damaged: rows_per_step is missing" in said
    assert "the only checkpoint is damaged" in said


def test_paths_out_of_the_folder_and_links_are_refused_by_name(engine, died, tmp_path, capsys):
    root = died / "checkpoints"
    newest, outside = root / "step-00000008", tmp_path / "outside"
    outside.write_bytes(b"mine")
    for name in ("../outside", "/etc/passwd", "latest", "sub/state.json"):
        files = {"state.json": digest_of((newest / "state.json").read_bytes()), name: digest_of(b"mine")}
        (newest / "manifest.json").write_text(render(8, files))
        assert find(engine, root, "auto").folder.name == "step-00000006"
        assert repr(name) in capsys.readouterr().out
    shutil.rmtree(newest)
    shutil.copytree(root / "step-00000006", tmp_path / "elsewhere" / "step-00000008")
    newest.symlink_to(tmp_path / "elsewhere" / "step-00000008")
    assert find(engine, root, "auto").folder.name == "step-00000006"
    assert f"{newest} is a symbolic link" in capsys.readouterr().out
    state = root / "step-00000006" / "state.json"
    state.rename(tmp_path / "state.json")
    state.symlink_to(tmp_path / "state.json")
    assert find(engine, root, "auto").folder.name == "step-00000003"
    assert f"{state} is a symbolic link" in capsys.readouterr().out
    assert outside.read_bytes() == b"mine"


@pytest.mark.slow
def test_a_kill_before_any_sub_step_of_a_save_leaves_a_whole_checkpoint(engine, finished, corpus, tmp_path):
    """The save of step 6 is killed; with one checkpoint kept it also deletes that of step 3."""
    folder, words = tmp_path / "run", [f"data.path={corpus}", *STEPS, "checkpoint.keep_last=1"]
    done = launch_ranks(1, "tests.train.killed_saves", str(folder), *words)
    assert done.returncode == 0, done.stderr[-3000:]
    killed = sorted(tmp_path.glob("run-killed-*"))
    assert len(killed) > 60
    steps = []
    for place, died in enumerate(killed):
        steps.append(find(engine, died / "checkpoints", "auto").state["step"])
        assert not list((died / "checkpoints").glob(".*"))  # leftovers are gone
        if place % 5 == 0:
            assert run_small(died, *words) == 0
            assert figures(died) == figures(finished)
            assert tensors(died, 8) == tensors(finished, 8)
    assert steps == sorted(steps)  # once the new one is there, it stays
    assert set(steps) == {3, 6}


CHANGED = {
    "optim.lr=0.5": "optim.lr=0.002 -> 0.5",
    "schedule=constant": "schedule.name=cosine -> constant",
    "optim=sgd": "optim.name=adamw -> sgd",
    "run.seed=3": "run.seed=0 -> 3",
    "model.hidden_size=64": "model.hidden_size=32 -> 64",
    "model.num_local_experts=4": "model.num_local_experts=8 -> 4",
    "train.precision=bf16": "train.precision=fp32 -> bf16",
    "train.micro_batch_size=2": "with 4 rows a step, and this one has 2",
    "train.max_steps=7": "train.max_steps=7 is less than",
    "train.max_steps=null train.epochs=0.1": " steps, less than the checkpoint to go on from has, 8",
}


@pytest.mark.parametrize("word", CHANGED)
def test_a_run_of_other_settings_is_refused_by_its_keys(word, died, corpus, capsys):
    (died / "exit.json").unlink(missing_ok=True)
    before = contents(died)
    assert run_small(died, f"data.path={corpus}", *STEPS, *word.split()) == 2
    assert CHANGED[word] in capsys.readouterr().err
    assert read_json(died / "exit.json")["code"] == 2
    (died / "exit.json").unlink()
    assert contents(died) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file() and path.name != ".lock"}


def test_allowed_changes_are_listed_and_a_longer_run_goes_on_from_a_finished_one(finished, corpus, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "longer")
    words = [f"data.path={corpus}", *STEPS, "train.gradient_accumulation_steps=2", "train.micro_batch_size=2"]
    assert run_small(tmp_path / "longer", *words) == 6
    assert "reached its last step, 8; a higher train.max_steps goes on" in capsys.readouterr().err
    assert run_small(tmp_path / "longer", *words, "train.max_steps=10", "evaluate.every=1") == 0
    said = capsys.readouterr().out
    assert "goes on after step 8" in said
    for change in ("train.max_steps=8 -> 10", "evaluate.every=null -> 1", "train.micro_batch_size=4 -> 2"):
        assert change in said
    rows = metrics(tmp_path / "longer")
    assert [row["step"] for row in rows] == list(range(11))
    assert (tmp_path / "longer" / "export-before-step-00000008" / "model.safetensors").exists()
    assert read_json(tmp_path / "longer" / "summary.json")["steps"] == 10


def test_a_run_from_a_hub_id_goes_on_as_often_as_it_ends_and_its_recipe_keeps_the_id(
    finished, corpus, tmp_path, monkeypatch
):
    for module in ("train.data.hub", "train.model"):
        monkeypatch.setattr(f"{module}.download", lambda *_: finished / "export")
    small = [word for word in SMALL if not word.startswith("model.")]
    words = [*small, "model.init_from=someone/model@v1", f"data.tokenizer={finished / 'export'}", f"data.path={corpus}"]
    for steps in (1, 2, 3):
        assert (
            main(["train", *words, "checkpoint.every=1", f"train.max_steps={steps}", f"run.dir={tmp_path / 'run'}"])
            == 0
        )
        assert "init_from: someone/model@v1" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_run_that_may_go_on_and_cannot_write_that_it_does_ends_with_six(died, corpus, capsys):
    (died / ".environment.json.partial").mkdir()
    (died / "exit.json").unlink(missing_ok=True)
    assert run_small(died, f"data.path={corpus}", *STEPS, "train.max_steps=9") == 6
    assert ".environment.json.partial: Is a directory" in capsys.readouterr().err


def test_a_state_whose_parts_lack_what_they_hold_ends_with_four(died, corpus, capsys):
    for name in ("step-00000003", "step-00000006"):
        shutil.rmtree(died / "checkpoints" / name, ignore_errors=True)
    newest = died / "checkpoints" / "step-00000008"
    state = read_json(newest / "state.json")
    state["parts"]["figures"] = {}
    plant(newest, "state.json", json.dumps(state).encode(), step=8)
    assert run_small(died, f"data.path={corpus}", *STEPS, "train.max_steps=9") == 4
    assert "is damaged: its part figures (KeyError('steps'))" in capsys.readouterr().err


def test_a_checkpoint_of_other_versions_is_gone_on_from_with_a_warning(died, finished, corpus, capsys):
    shutil.rmtree(died / "checkpoints" / "step-00000008")
    older = died / "checkpoints" / "step-00000006"
    state = read_json(older / "state.json")
    state["versions"] |= {"torch": "1.0", "gone": "7"}
    plant(older, "state.json", json.dumps(state).encode(), step=6)
    assert run_small(died, f"data.path={corpus}", *STEPS) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING") and " is of " in line]
    assert [re.search(r"is of (\S+ \S+), here is (\S+):", line).groups() for line in said] == [
        *(("torch 1.0", torch.__version__), ("gone 7", "None")),
    ]
    assert figures(died) == figures(finished)


def test_a_clock_that_jumps_changes_neither_what_is_kept_nor_a_duration(corpus, finished, tmp_path, monkeypatch):
    """By days, in both directions, and from one time zone to another; the oldest checkpoint seems the newest."""
    jumps = itertools.cycle([0.0, 86_400.0, -200_000.0, 5e8])
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    save, folder = Checkpoints.save, tmp_path / "run"

    def save_elsewhere(self, step, **options):
        save(self, step, **options)
        monkeypatch.setenv("TZ", f"somewhere{step - 4:+d}")
        time.tzset()
        for path in folder.glob("checkpoints/step-*"):
            os.utime(path, (2e9 - 1e6 * int(path.name[5:]),) * 2)

    monkeypatch.setattr(Checkpoints, "save", save_elsewhere)
    words = [f"data.path={corpus}", "evaluate.sample_tokens=0", "train.max_steps=8", f"run.dir={folder}"]
    words += ["checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3"]
    try:
        assert run(words, dies_at=6) == 99
        assert sorted(path.name for path in folder.glob("checkpoints/step-*")) == [f"step-{n:08d}" for n in (3, 4, 5)]
        assert run(words) == 0
    finally:
        monkeypatch.undo()
        time.tzset()
    assert sorted(path.name for path in folder.glob("checkpoints/step-*")) == [f"step-{n:08d}" for n in (3, 6, 7, 8)]
    assert figures(folder) == figures(finished)
    for row in metrics(folder)[1:]:
        assert row["tokens_per_second"] > 0
        assert 0 <= row["data_wait_fraction"] <= 1


STREAMED = ["data.streaming=true", "data.tokenizer=mixtral", "model.vocab_size=32000", "data.shuffle_buffer=8"]


@pytest.mark.parametrize("streamed", [[], STREAMED], ids=["at hand", "a stream"])
def test_other_data_under_the_same_name_ends_with_three(corpus, streamed, tmp_path, capsys):
    corpus = shutil.copy(corpus, tmp_path / "corpus.jsonl")
    words = [f"data.path={corpus}", *STEPS, *streamed]
    assert run(["train.max_steps=8", *words, f"run.dir={tmp_path / 'run'}"], dies_at=5) == 99
    rows = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*rows[1:], rows[0], '{"text": "words that were not there"}']) + "\n")
    (tmp_path / "run" / "exit.json").unlink()
    before = contents(tmp_path / "run")
    assert run_small(tmp_path / "run", *words) == 3
    assert "is of a run on other data" in capsys.readouterr().err
    (tmp_path / "run" / "exit.json").unlink()
    assert contents(tmp_path / "run") == before


def test_a_run_whose_last_step_is_one_it_did_not_evaluate_is_evaluated_there(died, corpus):
    shutil.rmtree(died / "checkpoints" / "step-00000008")
    assert run_small(died, f"data.path={corpus}", *STEPS, "train.max_steps=6") == 0
    rows, summary = metrics(died), read_json(died / "summary.json")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 6]
    assert summary["eval_loss"] == rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert summary["best"]["step"] == 6


def test_a_stream_of_which_a_checkpoint_says_nothing_goes_on(corpus, tmp_path):
    words = [f"data.path={corpus}", *STEPS, *STREAMED, f"run.dir={tmp_path / 'run'}"]
    assert run(["train.max_steps=8", *words], dies_at=5) == 99
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    plant(newest, "state.json", json.dumps(read_json(newest / "state.json") | {"data": None}).encode(), step=3)
    assert run(words) == 0


def test_going_back_takes_the_named_checkpoint_and_sets_the_later_ones_aside(died, finished, corpus):
    words = [f"data.path={corpus}", *STEPS]
    assert run_small(died, *words, f"checkpoint.resume={died / 'checkpoints' / 'step-00000003'}") == 0
    assert figures(died) == figures(finished)
    assert tensors(died, 8) == tensors(finished, 8)
    discarded = [json.loads(line)["step"] for line in (died / "metrics.discarded.jsonl").read_text().splitlines()]
    assert discarded == [4, 5, 6, 7, 8]
    assert {path.name for path in died.glob("checkpoints/*")} == {
        *("latest", "step-00000003", "step-00000006", "step-00000008"),
    }


def test_going_back_to_a_checkpoint_that_is_not_there_lists_those_that_are(died, corpus, capsys):
    missing = died / "checkpoints" / "step-00000004"
    assert run_small(died, f"data.path={corpus}", *STEPS, f"checkpoint.resume={missing}") == 4
    assert "no such folder: there are step-0000000" in capsys.readouterr().err
    assert not missing.exists()


def test_a_run_that_saved_nothing_starts_over_loudly_and_keeps_its_rows(corpus, finished, tmp_path, capsys):
    words = [f"data.path={corpus}", *STEPS, f"run.dir={tmp_path / 'run'}"]
    assert run(words, dies_at=3) == 99
    assert run(words) == 0
    assert "WARNING: the run in" in capsys.readouterr().out
    assert figures(tmp_path / "run") == figures(finished)
    assert len((tmp_path / "run" / "metrics.discarded.jsonl").read_text().splitlines()) == 3


def test_last_every_so_manieth_and_best_checkpoints_are_kept(corpus, tmp_path, monkeypatch):
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, wait: save(self, step, best=step == 3, wait=wait))
    words = ["checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=4", "train.max_steps=10"]
    assert run_small(tmp_path / "run", f"data.path={corpus}", *words) == 0
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == [f"step-{step:08d}" for step in (3, 4, 8, 9, 10)]
    assert (tmp_path / "run" / "checkpoints" / "best").read_text() == "step-00000003\n"
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000010\n"


def test_nothing_is_deleted_for_a_newer_checkpoint_that_is_not_whole(corpus, tmp_path, monkeypatch, capsys):
    import train.checkpoint.checkpoints as module

    publish = module.Checkpoints._publish

    def publish_and_damage(self, pending, files):
        publish(self, pending, files)
        if pending.step > 2:
            (pending.target / "state.json").write_text("{}")

    monkeypatch.setattr(module.Checkpoints, "_publish", publish_and_damage)
    words = ["checkpoint.every=1", "checkpoint.keep_last=1", "train.max_steps=4"]
    assert run_small(tmp_path / "run", f"data.path={corpus}", *words) == 0
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").exists()
    assert not (tmp_path / "run" / "checkpoints" / "step-00000001").exists()
    assert "no older checkpoint is deleted" in capsys.readouterr().out


def test_checkpoints_that_cannot_be_written_end_the_run_before_its_first_step(corpus, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "checkpoints").write_text("not a folder")
    assert run_small(tmp_path / "run", f"data.path={corpus}") == 6
    assert "checkpoints cannot be written" in read_json(tmp_path / "run" / "exit.json")["message"]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_six_and_leaves_what_was_saved(corpus, finished, tmp_path):
    """Files may not grow past 700 kB from the fifth step on; a checkpoint's has 920."""
    words = [f"data.path={corpus}", *STEPS]
    done = launch_ranks(1, "tests.train.small_disk", "0", "5", "700000", *SMALL, *words, f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 6, done.stderr[-3000:]
    assert "the checkpoint of step 6 was not written, those before it are untouched" in done.stderr
    assert "rank-00000.safetensors: File too large" in done.stderr
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"latest", "step-00000003"}
    assert read_json(tmp_path / "run" / "exit.json")["code"] == 6
    assert run_small(tmp_path / "run", *words) == 0
    assert figures(tmp_path / "run") == figures(finished)


@pytest.mark.slow
def test_figures_that_the_disk_does_not_take_end_the_run_with_six(corpus, finished, tmp_path):
    words = [f"data.path={corpus}", *STEPS]
    done = launch_ranks(1, "tests.train.small_disk", "0", "5", "2700", *SMALL, *words, f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 6, done.stderr[-3000:]
    assert "metrics.jsonl cannot be written: File too large" in done.stderr
    assert read_json(tmp_path / "run" / "exit.json")["code"] == 6
    assert run_small(tmp_path / "run", *words) == 0
    assert figures(tmp_path / "run") == figures(finished)


def test_a_second_request_to_stop_changes_nothing_until_the_launchers_grace_is_over(engine, monkeypatch):
    with signals_as_errors(), Preemption(engine, enabled=True) as preemption:
        assert not preemption.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.agreed()
        monkeypatch.setattr("train.checkpoint.preemption.GRACE_SECONDS", -1.0)
        with pytest.raises(StopSignal, match="stopped by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_what_another_processs_death_leads_to_while_stopping_is_said_to_be_that(engine):
    def stop_beside_a_dead_process():
        with Preemption(engine, enabled=True):
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("Connection closed by peer")

    with signals_as_errors(), pytest.raises(StopSignal, match="another process was gone"):
        stop_beside_a_dead_process()


@pytest.fixture
def living(corpus, tmp_path):
    """A long run in another process that has begun to train, and its folder."""
    folder = tmp_path / "living"
    words = [*SMALL, f"data.path={corpus}", f"run.dir={folder}", "train.max_steps=100000"]
    process = subprocess.Popen(
        [*PYTHON, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield process, folder
    kill_group(process)
    process.wait()


@pytest.mark.slow
def test_a_terminated_run_saves_its_step_and_exits_with_seventy_five(living, corpus):
    process, folder = living
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # a launcher's echo
    said = process.communicate(timeout=25)
    assert process.returncode == 75, said
    ended = read_json(folder / "exit.json")
    (saved,) = folder.glob("checkpoints/step-*")
    assert (ended["reason"], ended["code"]) == ("preempted", 75)
    assert int(saved.name[5:]) == metrics(folder)[-1]["step"]
    assert f"after step {int(saved.name[5:])}" in ended["message"]
