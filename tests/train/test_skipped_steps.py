"""Steps that are not finite, by weights that make one document of the data so, and losses that leap."""

import json
import re
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train.evaluate.evaluations
import train.loop
from mixtral import MixtralForCausalLM
from tests.multiprocess.many_runs import run
from tests.train.helpers import SMALL, metrics, read_json, run_small, write_corpus
from tests.train.test_checkpoint import figures, tensors
from train.checkpoint import values
from train.checkpoint.find import listed
from train.checkpoint.manifest import check_folder
from train.compose import compose
from train.config import TrainConfig
from train.errors import ConfigError, NumericsError
from train.guard import Guard, Skip, zscore

WORDS = ["train.max_steps=12", "checkpoint.every=5", "checkpoint.keep_last=3", "evaluate.sample_tokens=0"]
STRANGE = "zzz qqq zzz qqq zzz"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """In which one document, of line 31, has letters that no other has."""
    path = write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl")
    rows = path.read_text().splitlines()
    rows.insert(30, json.dumps({"text": STRANGE}))
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def broken(corpus, tmp_path_factory):
    """An export whose embedding of those letters is infinite."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert run_small(folder, f"data.path={corpus}", "checkpoint.every=null", "evaluate.sample_tokens=0") == 0
    weights = load_file(folder / "export" / "model.safetensors")
    vocabulary = read_json(folder / "export" / "tokenizer.json")["model"]["vocab"]
    for token, number in vocabulary.items():
        if set("zq") & set(token):
            weights["model.embed_tokens.weight"][number] = torch.inf
    save_file(weights, folder / "export" / "model.safetensors", {"format": "pt"})
    return folder / "export"


@pytest.fixture(scope="module")
def finished(corpus, broken, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run_small(folder, f"data.path={corpus}", f"model.init_from={broken}", *WORDS) == 0
    return folder


def test_a_document_that_makes_the_loss_infinite_is_skipped_wherever_it_comes_and_the_rest_is_trained(finished):
    rows = metrics(finished)[1:]
    skipped = [row["step"] for row in rows if "loss" not in row]
    assert 1 <= len(skipped) <= 6
    assert rows[-1]["skipped_steps"] == read_json(finished / "summary.json")["skipped_steps"] == len(skipped)
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert row["skipped_steps"] == sum(step <= row["step"] for step in skipped)
    state = read_json(finished / "checkpoints" / "step-00000012" / "state.json")
    assert state["updates"] == 12 - len(skipped)
    assert state["parts"]["guard"]["skipped"] == len(skipped)


def test_the_batch_that_is_kept_is_that_of_the_step_and_is_not_finite_again(finished, broken, corpus):
    model = MixtralForCausalLM.from_pretrained(broken)
    kept = sorted((finished / "failures").glob("*.safetensors"))
    assert len(kept) == metrics(finished)[-1]["skipped_steps"]
    for path in kept:
        described, batch = read_json(path.with_suffix(".json")), load_file(path)
        step = described["step"]
        assert path.stem == f"step-{step:08d}-rank-0"
        assert described["rows"] == [list(range(4 * (step - 1), 4 * step))]
        assert (described["seed"], described["processes"], described["ranks"]) == (0, 1, [0])
        assert f"{corpus}:31" in described["documents"][0]
        names = ("input_ids", "position_ids", "shifted_labels")
        assert all(batch[name].shape == (4, 32) for name in (*names, "token_mask"))
        with torch.no_grad():
            loss = model(**{name: batch[name] for name in names}, num_items_in_batch=1).loss
        assert not torch.isfinite(loss)


def test_going_on_from_a_checkpoint_in_a_folder_of_its_own_replays_the_step(finished, corpus, broken, tmp_path):
    failed = [int(path.stem[5:13]) for path in sorted((finished / "failures").glob("*.json"))]
    last = max(step for step in failed if step > 5)
    words = [f"data.path={corpus}", f"model.init_from={broken}", *WORDS, "train.max_skipped_steps=0"]
    before = finished / "checkpoints" / f"step-{(last - 1) // 5 * 5:08d}"
    assert run_small(tmp_path / "replay", *words, f"checkpoint.resume={before}", "train.log_every=100") == 5
    first = min(step for step in failed if step > (last - 1) // 5 * 5)
    name = f"step-{first:08d}-rank-0.safetensors"
    assert name in read_json(tmp_path / "replay" / "exit.json")["message"]
    assert (
        metrics(tmp_path / "replay")[-1].items()
        >= {"step": first, "skipped_steps": len(failed[: failed.index(first) + 1])}.items()
    )
    assert (tmp_path / "replay" / "failures" / name).read_bytes() == (finished / "failures" / name).read_bytes()


def test_a_run_whose_first_step_is_skipped_goes_on_from_it_as_if_it_had_not_stopped(corpus, broken, tmp_path):
    """There was no update yet, so the optimizer has no moments of its own to save."""
    rows = corpus.read_text().splitlines()
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join([rows.pop(30), *rows]) + "\n")
    words = [f"data.path={corpus}", f"model.init_from={broken}", *WORDS, "data.shuffle=false", "schedule=constant"]
    assert run_small(tmp_path / "whole", *words, "train.max_steps=3") == 0
    assert run_small(tmp_path / "parts", *words, "train.max_steps=1") == 0
    assert [row["skipped_steps"] for row in metrics(tmp_path / "parts")[1:]] == [1]
    assert "loss" not in read_json(tmp_path / "parts" / "summary.json")
    assert run_small(tmp_path / "parts", *words, "train.max_steps=3") == 0
    assert figures(tmp_path / "parts")[2:] == figures(tmp_path / "whole")[2:]
    assert tensors(tmp_path / "parts", 3) == tensors(tmp_path / "whole", 3)


@pytest.mark.parametrize("bad", ["step", "evaluation"])
def test_a_run_that_ends_with_5_first_completes_the_checkpoint_that_is_being_written(
    bad, corpus, tmp_path, monkeypatch
):
    write, begun = values.write_durably, []
    objective_parts, evaluate = train.loop.objective_parts, train.evaluate.evaluations.evaluate

    def write_slowly(path, *inputs, **named):
        begun.append(path)
        time.sleep(1.0)
        return write(path, *inputs, **named)

    def not_finite(output, *inputs):
        parts = objective_parts(output, *inputs)
        parts.cross_entropy = parts.cross_entropy * (torch.nan if begun else 1.0)
        return parts

    def evaluation(*inputs):
        if begun:
            raise NumericsError("the held-out loss is nan")
        return evaluate(*inputs)

    monkeypatch.setattr(values, "write_durably", write_slowly)
    if bad == "step":
        monkeypatch.setattr("train.loop.objective_parts", not_finite)
    else:
        monkeypatch.setattr("train.evaluate.evaluations.evaluate", evaluation)
    words = ["checkpoint.every=2", "checkpoint.asynchronous=true", "evaluate.every=3", "train.max_skipped_steps=1"]
    assert run_small(tmp_path, f"data.path={corpus}", *WORDS, *words) == 5
    assert [path.name for path in begun] == ["rank-00000.safetensors"]
    assert [step for step, _ in listed(tmp_path / "checkpoints")] == [2]
    check_folder(tmp_path / "checkpoints" / "step-00000002")


def test_steps_in_a_row_are_counted_from_the_last_that_was_taken():
    guard = Guard(TrainConfig(max_skipped_steps=2))
    skip = Skip("the loss is not finite", (1,))
    for now, in_a_row in ((skip, 1), (None, 0), (skip, 1)):
        guard.count(1.0, now)
        assert (guard.in_a_row, guard.is_over) == (in_a_row, False)
    again = Guard(TrainConfig(max_skipped_steps=2))
    again.restore(json.loads(json.dumps(guard.state())))
    again.count(1.0, skip)
    assert (again.in_a_row, again.is_over, again.skipped) == (2, True, 3)


def test_a_fault_is_put_where_it_began():
    guard = Guard(TrainConfig())
    assert guard.judge(1.0, [[0, 0, 0]] * 3) is None
    assert guard.judge(1.0, [[0, 1, 1], [1, 1, 1], [0, 0, 1]]) == Skip("the loss is not finite", (1,))
    assert guard.judge(1.0, [[0, 1, 1], [0, 0, 1], [0, 1, 1]]) == Skip("the gradient is not finite", (0, 2))
    assert guard.judge(1.0, [[0, 0, 0], [0, 0, 1]]) == Skip("the gradient of all processes is not finite", (1,))


def test_a_spike_is_as_many_robust_deviations_above_the_median_as_is_said():
    draw = np.random.default_rng(0)
    losses = draw.normal(3.0, 0.2, 100)
    deviation = 1.4826 * np.median(np.abs(losses - np.median(losses)))
    assert zscore(5.0, losses.tolist()) == pytest.approx((5.0 - np.median(losses)) / deviation)
    wild = np.concatenate([losses[:90], [1e6] * 10])
    assert zscore(5.0, wild.tolist()) > 5
    assert zscore(1.05, [1.0] * 100) == pytest.approx(5.0)  # at least 1% of the loss is a deviation
    assert zscore(1e-3, [0.0] * 100) > 10


def test_no_loss_of_a_noisy_run_is_a_spike_and_a_hundredfold_one_is():
    draw = np.random.default_rng(1)
    guard = Guard(TrainConfig(on_spike="skip"))
    for step in range(3000):
        loss = float((2 + 6 * np.exp(-step / 200)) * np.exp(draw.normal(0, 0.1)))
        assert guard.judge(loss, [[0, 0, 0]]) is None, step
        guard.count(loss, None)
    skip = guard.judge(200.0, [[0, 0, 0]] * 2)
    assert skip.ranks == (0, 1)
    assert "the loss 200 is " in skip.reason
    guard.count(200.0, skip)
    assert guard.judge(2.0, [[0, 0, 0]]) is None
    assert Guard(TrainConfig(spike_zscore=None)).judge(1e9, [[0, 0, 0]]) is None


@pytest.mark.parametrize("on_spike", ["log", "skip"])
def test_a_loss_times_a_hundred_is_said_with_its_score_and_skipped_where_that_is_asked_for(
    on_spike, corpus, tmp_path, monkeypatch, capsys
):
    """The window of losses goes through a checkpoint."""
    words = [f"data.path={corpus}", *WORDS, "checkpoint.every=25", "train.max_steps=30", f"train.on_spike={on_spike}"]
    words.append("train.log_every=10")
    objective_parts, taken = train.loop.objective_parts, [0]

    def times_a_hundred(output, *inputs):
        taken[0] += 1
        parts = objective_parts(output, *inputs)
        if taken[0] == 28:
            parts.cross_entropy = 100 * parts.cross_entropy
        return parts

    monkeypatch.setattr("train.loop.objective_parts", times_a_hundred)
    assert run([*words, f"run.dir={tmp_path}"], dies_at=27) == 99
    taken[0] = 25
    assert run([*words, f"run.dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"ALARM step (\d+): the loss [\d.]+ is [\d.]+ deviations above the median", said) == ["28"]
    rows = metrics(tmp_path)
    assert rows[-1]["skipped_steps"] == (on_spike == "skip")
    assert ("loss" in rows[4]) == (on_spike == "log")
    assert [row["step"] for row in rows] == [0, 1, 10, 20, 28, 30]
    (score,) = [row["spike_zscore"] for row in rows if "spike_zscore" in row]
    assert f"is {score:.1f} deviations above" in said
    assert read_json(tmp_path / "checkpoints" / "step-00000030" / "state.json")["updates"] == 30 - (on_spike == "skip")
    assert (tmp_path / "failures" / "step-00000028-rank-0.safetensors").exists() == (on_spike == "skip")


@pytest.fixture
def spiking(corpus, monkeypatch):
    """Runs in which the loss leaps at some steps, counted from where each goes on; and the rows that its steps took."""
    objective_parts, taken, leaps = train.loop.objective_parts, [], set()

    def times_a_hundred(output, batch, *inputs):
        taken.append(batch.input_ids)
        parts = objective_parts(output, batch, *inputs)
        if len(taken) in leaps:
            parts.cross_entropy = 100 * parts.cross_entropy
        return parts

    def run_on(folder, *words, leaps_at=()):
        taken.clear()
        leaps.clear()
        leaps.update(leaps_at)
        words = [f"data.path={corpus}", f"run.dir={folder}", "train.on_spike=rewind", "checkpoint.every=25", *words]
        return run(words), list(taken)

    monkeypatch.setattr("train.loop.objective_parts", times_a_hundred)
    return run_on


def test_a_spike_sends_the_run_back_to_its_checkpoint_and_on_without_the_batches_since(spiking, tmp_path, capsys):
    """Twice to the same one; then the batches stay left out through the next checkpoint. Steps are counted on."""
    _, undisturbed = spiking(tmp_path / "undisturbed", "train.max_steps=37")
    folder = tmp_path / "run"
    words = ["train.max_steps=30", "train.log_every=10", "checkpoint.keep_last=3"]
    assert spiking(folder, *words, leaps_at=[28])[0] == 75
    ended = read_json(folder / "exit.json")
    assert ended["reason"] == "rewound"
    assert re.fullmatch(
        r"step 28: the loss \S+ is \S+ deviations above .*; started again, the run goes on after step 25 with batch "
        "29: those of 3 steps are left out",
        ended["message"],
    )
    code, taken = spiking(folder, *words, leaps_at=[2])
    assert code == 75
    assert len(taken) == 2
    assert all(map(torch.equal, taken, undisturbed[28:30]))
    code, taken = spiking(folder, *words)
    assert code == 0
    assert len(taken) == 5
    assert all(map(torch.equal, taken, undisturbed[30:35]))
    assert read_json(folder / "checkpoints" / "step-00000030" / "state.json")["parts"]["rewind"] == {"left_out": 5}
    code, taken = spiking(folder, *words, "train.max_steps=32")
    assert code == 0
    assert len(taken) == 2
    assert all(map(torch.equal, taken, undisturbed[35:37]))
    assert [row["step"] for row in metrics(folder)] == [0, 1, 10, 20, 30, 32]
    discarded = (folder / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded] == [28, 27]
    kept = read_json(folder / "failures" / "step-00000027-batch-00000030-rank-0.json")
    assert (kept["batch"], kept["rows"]) == (30, [list(range(4 * 29, 4 * 30))])
    assert "the batches of 5 steps are left out: the next is batch 36" in capsys.readouterr().out
    again = ["train.max_steps=34", f"checkpoint.resume={folder / 'checkpoints' / 'step-00000025'}"]
    code, taken = spiking(folder, *words, *again, leaps_at=[2])
    assert taken[0].equal(undisturbed[25])  # nothing is left out any more
    assert code == 0  # those words would not go on from what was gone back to


def test_a_run_that_is_sent_back_too_often_ends_with_five_and_one_that_cannot_be_skips_the_spike(
    spiking, tmp_path, capsys
):
    words = ["train.max_steps=30", "train.max_skipped_steps=0"]
    assert spiking(tmp_path / "never", *words, leaps_at=[28])[0] == 5
    assert "1 in a row, of train.max_skipped_steps=0" in read_json(tmp_path / "never" / "exit.json")["message"]
    words[1] = "train.max_skipped_steps=2"
    assert [spiking(tmp_path / "often", *words, leaps_at=[at])[0] for at in (28, 2, 3)] == [75, 75, 5]
    said = read_json(tmp_path / "often" / "exit.json")["message"]
    assert "went back to step 25 as often as train.max_skipped_steps=2 allows, each time to other batches" in said
    capsys.readouterr()
    assert spiking(tmp_path / "first", *words, leaps_at=[23])[0] == 0
    assert "WARNING step 23: " in capsys.readouterr().out
    assert metrics(tmp_path / "first")[-1]["skipped_steps"] == 1


@pytest.mark.parametrize("content", ["", "[[", '{"step": 25}', '{"step": 25, "left_out": Infinity, "times": 1}'])
def test_a_damaged_word_of_where_to_go_on_is_no_reason_to_forget_it(content, spiking, tmp_path):
    assert spiking(tmp_path, "train.max_steps=1")[0] == 0
    (tmp_path / "checkpoints" / "rewind.json").write_text(content)
    assert spiking(tmp_path, "train.max_steps=2")[0] == 4
    assert "rewind.json is damaged: expected step, left_out, times" in read_json(tmp_path / "exit.json")["message"]


@pytest.mark.parametrize("word", ["train.spike_zscore=null", "checkpoint.every=null", "train.epochs=2"])
def test_going_back_needs_something_to_see_a_spike_by_and_to_go_back_to_and_no_end_of_the_data(word):
    with pytest.raises(ConfigError, match=r"^train\.on_spike=rewind "):
        compose([*SMALL, "train.on_spike=rewind", "checkpoint.every=1", word])
