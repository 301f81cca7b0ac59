"""One process: a run that died goes on bit by bit, and what is damaged is never used."""

import hashlib
import json
import random
import shutil
import time
from functools import partial

import pytest

from mixtral.weights import write
from tests.multiprocess.many_runs import run
from tests.train.helpers import metrics, read_json, run_small, write_corpus
from tests.train.test_labelled import labelled
from train.checkpoint import durable
from train.checkpoint.checkpoints import Checkpoints
from train.errors import CheckpointError, MachineError
from train.folder import RunFolder

STEPS = ["checkpoint.every=3", "train.max_steps=8", "evaluate.every=4"]
FIGURES = ("step", "tokens", "loss", "grad_norm", "router_loss", "router_objective", "eval_loss", "lr", "expert_load")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "chats.jsonl", 80)


def write_pairs(path, count):
    """Samples of any length, which are packed."""
    draw = random.Random(1)
    rows = [{"prompt": "past " * draw.randint(1, 5), "completion": "wind " * draw.randint(1, 9)} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def figures(folder):
    return [{name: row[name] for name in FIGURES if name in row} for row in metrics(folder)]


def state(folder, step):
    return read_json(folder / "checkpoints" / f"step-{step:08d}" / "state.json")


def tensors(folder, step):
    return (folder / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors").read_bytes()


ONE_PROCESS = {
    "bf16, accumulated": ["train.precision=bf16", "train.gradient_accumulation_steps=2", "train.micro_batch_size=2"],
    "past an epoch's edge": ["train.micro_batch_size=14"],  # an epoch is 41 rows
    "dropout, jitter": ["model.attention_dropout=0.1", "model.router_jitter_noise=0.1"],
    "a bias, the step before's load": ["train.router_bias_rate=0.01", "train.router_loss_scope=previous_step"],
    "part of the weights, tied": ["train.only=attention,experts", "model.tie_word_embeddings=true"],
    "sgd": ["optim=sgd", "schedule=warmup_stable_decay"],
    "a stream": ["data.streaming=true", "data.tokenizer=mixtral", "model.vocab_size=32000", "data.shuffle_buffer=8"],
    "packed samples": ["CHATS", "data.chat_template=none", "data.packing_window=16"],
    "a stream of samples": [
        *("CHATS", "data.chat_template=none", "data.packing_window=16", "data.streaming=true"),
        *("data.tokenizer=mixtral", "model.vocab_size=32000", "data.shuffle_buffer=8"),
    ],
}


def assert_goes_on_bit_by_bit(folder, words):
    """Dies in step 5 and, once it has gone on, in step 7; checkpoints are after steps 3, 6 and 8."""
    whole, died = ([*STEPS, *words, f"run.dir={folder / name}"] for name in ("whole", "died"))
    assert run(whole) == 0
    assert [run(died, dies_at=5), run(died, dies_at=4), run(died)] == [99, 99, 0]
    assert figures(folder / "died") == figures(folder / "whole")
    assert tensors(folder / "died", 8) == tensors(folder / "whole", 8)
    for name in ("random", "parts", "updates", "frozen"):
        mine, other = (state(folder / run, 8)[name] for run in ("died", "whole"))
        if name == "parts":
            assert mine["router"] == other["router"]
        else:
            assert mine == other
    lines = (folder / "died" / "metrics.discarded.jsonl").read_text().splitlines()
    discarded = [json.loads(line)["step"] for line in lines]
    assert discarded == [4]


@pytest.mark.parametrize("case", ONE_PROCESS)
def test_a_run_that_died_twice_ends_as_the_one_that_did_not(case, tmp_path, corpus, chats):
    words = [f"data.path={chats if 'CHATS' in ONE_PROCESS[case] else corpus}"]
    assert_goes_on_bit_by_bit(tmp_path, words + [word for word in ONE_PROCESS[case] if word != "CHATS"])


@pytest.mark.parametrize("patience", [4, 2], ids=["lasting", "at its end"])
def test_the_best_evaluation_its_export_and_patience_live_through_deaths(tmp_path, corpus, patience):
    words = [*STEPS, f"data.path={corpus}", "evaluate.every=2", f"evaluate.patience={patience}", "optim.lr=1e-9"]
    words += ["evaluate.export_best=true"]
    assert run([*words, f"run.dir={tmp_path / 'whole'}"]) == 0
    died = [*words, f"run.dir={tmp_path / 'died'}"]
    assert [run(died, dies_at=5), run(died)] == [99, 0]
    assert run(died) == (6 if patience == 4 else 0)  # all its steps are done, or it is out of patience again
    best = [json.loads((tmp_path / name / "summary.json").read_text())["best"] for name in ("died", "whole")]
    assert best[0] == best[1]
    assert read_export(tmp_path / "died") == read_export(tmp_path / "whole")


@pytest.mark.parametrize(
    "stream", [[], ["data.streaming=true", "data.labels=[rain,sun,wind]", "data.shuffle_buffer=8"]]
)
def test_a_classifier_goes_on_bit_by_bit(tmp_path, stream):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled("classification", 40)))
    words = [f"data.path={path}", "data.format=classification", "data.too_long=cut", "data.tokenizer=mixtral"]
    assert_goes_on_bit_by_bit(tmp_path, [*words, "model.vocab_size=32000", *stream])


def read_export(folder):
    return (folder / "export" / "model.safetensors").read_bytes()


def test_adapters_go_on_bit_by_bit_and_frozen_weights_are_not_saved_but_told_apart(tmp_path, corpus, capsys):
    words = [f"data.path={corpus}"]
    assert run_small(tmp_path / "base", *words, "train.max_steps=1") == 0
    shutil.copytree(tmp_path / "base" / "export", tmp_path / "given")
    words += [f"model.init_from={tmp_path / 'given'}", "lora.rank=4", "lora.dropout=0.1"]
    assert_goes_on_bit_by_bit(tmp_path, words)
    saved = state(tmp_path / "whole", 8)
    assert all("lora_" in name for name in saved["parameters"])
    assert len(saved["frozen"]) == 3 + 2 * (7 + 2 * 8)  # of two layers with eight experts each
    with (tmp_path / "given" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert run_small(tmp_path / "died", *STEPS, *words, "train.max_steps=9") == 4
    assert "is not of this model: " in capsys.readouterr().err


def test_what_is_written_beside_later_steps_is_the_step_it_was_asked_for(tmp_path, corpus, monkeypatch):
    """The disk is slow: of step 2 only a part is written when steps 3 and on are taken."""
    words = [f"data.path={corpus}", "train.max_steps=8", "checkpoint.every=4", "checkpoint.keep_last=3"]
    assert run([*words, f"run.dir={tmp_path / 'waiting'}"]) == 0
    put, when, publish = durable.write_whole, [], Checkpoints._publish
    monkeypatch.setattr(durable, "write_whole", lambda *inputs: (time.sleep(0.003), put(*inputs))[1])
    monkeypatch.setattr(
        Checkpoints,
        "_publish",
        lambda self, pending, files: (when.append(self._parts["figures"].last["step"]), publish(self, pending, files)),
    )
    assert run([*words, f"run.dir={tmp_path / 'beside'}", "checkpoint.asynchronous=true"]) == 0
    assert when[0] > 4
    for step in (4, 8):
        assert tensors(tmp_path / "beside", step) == tensors(tmp_path / "waiting", step)
        mine, other = (state(tmp_path / name, step) for name in ("beside", "waiting"))
        assert mine["random"] == other["random"]
        assert mine["parts"]["router"] == other["parts"]["router"]
        assert mine["parts"]["figures"]["tokens"] == other["parts"]["figures"]["tokens"]


def test_a_folder_is_not_free_before_the_checkpoint_of_the_run_that_ended_is_complete(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.held():
        folder.close("crash", 1, "ended")
        with pytest.raises(MachineError, match="is in use by process"):
            RunFolder(tmp_path)
    RunFolder(tmp_path).close("done", 0, "")


@pytest.mark.parametrize("change", [b"", b"\x00"], ids=["what was meant", "a flipped bit"])
def test_what_is_written_is_hashed_and_read_back_whole(tmp_path, monkeypatch, change):
    """Of three parts, the second of which the disk is given in pieces, and forced to begin early."""
    parts = [b"one", bytes(range(256)) * 64, b"\x01"]
    put = durable.write_whole
    monkeypatch.setattr(write, "WRITE_BYTES", 1000)
    monkeypatch.setattr(durable, "EARLY_BYTES", 2)
    monkeypatch.setattr(durable, "write_whole", lambda file, part: put(file, (part == b"\x01" and change) or part))
    write_all = partial(durable.write_durably, tmp_path / "file", map(memoryview, parts), read_back=True)
    if change:
        with pytest.raises(CheckpointError, match="is damaged"):
            write_all()
    else:
        assert write_all() == (len(b"".join(parts)), hashlib.sha256(b"".join(parts)).hexdigest())
        assert (tmp_path / "file").read_bytes() == b"".join(parts)


@pytest.mark.slow
def test_trackers_see_one_run_whose_steps_come_once(tmp_path, corpus, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("train.observe.trackers.IMPATIENT_SECONDS", 60.0)  # of a busy machine
    for tracker in ("wandb", "tensorboard"):
        words = [*STEPS, f"data.path={corpus}", f"tracker={tracker}", f"run.dir={tmp_path / tracker}"]
        assert [run(words, dies_at=5), run(words)] == [99, 0]
    first, second = sorted((tmp_path / "wandb" / "wandb").glob("offline-run-*"))
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2] == state(tmp_path / "wandb", 8)["tracker_id"]
    losses = {row["step"]: json.dumps(row["loss"]).encode() for row in metrics(tmp_path / "wandb")[1:]}
    sent = [next(part.glob("run-*.wandb")).read_bytes() for part in (first, second)]
    assert [losses[3] in part for part in sent] == [True, False]
    assert [losses[8] in part for part in sent] == [False, True]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))
