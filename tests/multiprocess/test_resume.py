"""A run that died goes on as if it had not: bit by bit in its own layout, and to rounding in any other."""

import json
import re
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.train.helpers import metrics, read_json, write_corpus
from tests.warm import launch_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
EVERY = ["checkpoint.every=3", "train.max_steps=8", "evaluate.every=5", "train.micro_batch_size=2"]
TWO_PROCESSES = {
    "replicated, bf16, accumulated": ["train.precision=bf16", "train.gradient_accumulation_steps=2"],
    "ZeRO-1, fp32": ["parallel.zero=1"],
    "ZeRO-1, bf16, EP 2": ["parallel.zero=1", "train.precision=bf16", "parallel.expert=2"],
    "ZeRO-2, fp32, EP 2, accumulated": ["parallel.zero=2", "parallel.expert=2", "train.gradient_accumulation_steps=2"],
    "ZeRO-2, bf16, dropout and jitter": [
        *("parallel.zero=2", "train.precision=bf16"),
        *("model.attention_dropout=0.1", "model.router_jitter_noise=0.1"),
    ],
    "ZeRO-3, fp32": ["parallel.zero=3", "parallel.persistent_elements=500"],
    "ZeRO-3, bf16, EP 2, written beside": [
        *("parallel.zero=3", "train.precision=bf16", "parallel.expert=2", "checkpoint.asynchronous=true"),
    ],
    "a bias, the step before's load": [
        *("parallel.zero=1", "parallel.expert=2"),
        *("train.router_bias_rate=0.01", "train.router_loss_scope=previous_step"),
    ],
    "sgd": ["parallel.zero=2", "optim=sgd"],
}

BESIDE = next(index for index, name in enumerate(TWO_PROCESSES) if "written beside" in name)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Eight steps of it are two epochs."""
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl", documents=24)


def launch_jobs(folder, processes, jobs, timeout=280):
    """Runs jobs one after the other and returns their exit codes; 99 is a death that was asked for."""
    path = folder / f"{processes}.json"
    path.write_text(json.dumps(jobs))
    done = launch_ranks(processes, "tests.multiprocess.many_runs", str(path), timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return read_json(path.with_suffix(".codes")), done.stdout


def whole(checkpoint):
    """Puts the slices of a checkpoint together: `KIND/NAME` to a flat array. Each element must come exactly once."""
    sizes = {name: int(np.prod(shape)) for name, shape in read_json(checkpoint / "state.json")["parameters"].items()}
    found, seen = {}, {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        for key, values in load_file(path).items():
            name, start, stop = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", key).groups()
            size = sizes[name.partition("/")[2]]
            found.setdefault(name, np.full(size, np.nan, values.dtype))[int(start) : int(stop)] = values
            seen.setdefault(name, np.zeros(size, int))[int(start) : int(stop)] += 1
    assert all((count == 1).all() for count in seen.values())
    return found


def figures(folder):
    names = ("step", "tokens", "loss", "grad_norm", "router_loss", "router_objective", "eval_loss", "lr", "expert_load")
    return [{name: row[name] for name in names if name in row} for row in metrics(folder)]


def assert_same(mine, other):
    """Compares runs bit by bit: figures, and every byte of what the last checkpoints hold of weights and moments."""
    assert figures(mine) == figures(other)
    files = [read_json(run / "checkpoints" / "step-00000008" / "manifest.json")["files"] for run in (mine, other)]
    for name in files[0]:
        if name != "state.json":
            assert files[0][name] == files[1][name]
    states = [read_json(run / "checkpoints" / "step-00000008" / "state.json") for run in (mine, other)]
    assert states[0]["random"] == states[1]["random"]
    assert states[0]["parts"]["router"] == states[1]["parts"]["router"]


def test_two_processes_go_on_bit_by_bit_after_two_deaths_in_every_layout(tmp_path, corpus):
    """Checkpoints are after steps 3, the last of an epoch, and 6; deaths in step 5, mid-epoch, and then in step 7."""
    jobs, names = [], []
    for index, words in enumerate(TWO_PROCESSES.values()):
        words = [f"data.path={corpus}", *EVERY, *words]
        names.append((tmp_path / f"whole-{index}", tmp_path / f"died-{index}"))
        jobs.append({"words": [*words, f"run.dir={names[-1][0]}"]})
        died = [*words, f"run.dir={names[-1][1]}"]
        jobs += [{"words": died, "dies_at": 5}, {"words": died, "dies_at": 4}, {"words": died}]
    codes, said = launch_jobs(tmp_path, 2, jobs)
    assert codes == [0, 99, 99, 0] * len(names)
    for uninterrupted, died in names:
        assert_same(died, uninterrupted)
        assert [row["step"] for row in metrics(died)] == list(range(9))
        steps = re.findall(f"goes on after step ([0-9]+) from {died}/", said)
        assert steps == ["3", "6"] or (died == names[BESIDE][1] and steps == ["3", "3"])  # what was not yet written


STEP_3 = "checkpoints/step-00000003"
LAYOUTS = {  # processes, and words; a step has 8 rows in each
    "1": (1, ["train.micro_batch_size=4", "train.gradient_accumulation_steps=2"]),
    "1, ZeRO-3": (1, ["parallel.zero=3", "train.micro_batch_size=8"]),
    "2": (2, ["train.micro_batch_size=4"]),
    "2, ZeRO-1": (2, ["parallel.zero=1", "train.micro_batch_size=2", "train.gradient_accumulation_steps=2"]),
    "2, ZeRO-2, EP 2": (2, ["parallel.zero=2", "parallel.expert=2", "train.micro_batch_size=4"]),
    "2, ZeRO-3": (2, ["parallel.zero=3", "parallel.persistent_elements=500", "train.micro_batch_size=4"]),
    "4, ZeRO-1, EP 2": (4, ["parallel.zero=1", "parallel.expert=2", "train.micro_batch_size=2"]),
    "4, ZeRO-3, EP 2": (4, ["parallel.zero=3", "parallel.expert=2", "train.micro_batch_size=2"]),
    "4, ZeRO-2, EP 4": (4, ["parallel.zero=2", "parallel.expert=4", "train.micro_batch_size=2"]),
}
JUMPS = {"fp32": (2, 3), "bf16": (5,)}  # from each layout to those so many places further on


@pytest.mark.parametrize("precision", JUMPS)
def test_any_layout_takes_up_any_others_state_bit_by_bit_and_trains_on_alike(tmp_path, corpus, precision):
    """Every element is there once; then losses, and rows seen, are the first layout's own, to rounding."""
    common = [f"data.path={corpus}", "checkpoint.every=3", "train.max_steps=6", f"train.precision={precision}"]
    common += ["checkpoint.keep_last=3", "optim.eps=1e-6", "train.router_loss_scope=previous_step"]
    names = list(LAYOUTS)
    transitions = [
        (name, names[(index + jump) % len(names)]) for index, name in enumerate(names) for jump in JUMPS[precision]
    ]
    folders = {pair: tmp_path / " to ".join(pair) for pair in transitions} | {name: tmp_path / name for name in names}

    def launch_where(of_layout):
        for processes in (1, 2, 4):
            jobs = [job for layout, job in of_layout if LAYOUTS[layout][0] == processes]
            codes, _ = launch_jobs(tmp_path, processes, jobs)
            assert codes == [0] * len(jobs)

    def job(layout, folder, *words, **how):
        return {"words": [*common, *LAYOUTS[layout][1], f"run.dir={folder}", *words], **how}

    launch_where([(name, job(name, folders[name])) for name in names])
    launch_where(
        [
            (pair[1], job(pair[1], folders[pair], f"checkpoint.resume={folders[pair[0]] / STEP_3}", resaves=True))
            for pair in transitions
        ]
    )
    tolerance = 2e-5 if precision == "fp32" else 3e-2
    for pair in transitions:
        wanted, found = whole(folders[pair[0]] / STEP_3), whole(folders[pair] / STEP_3)
        assert wanted.keys() == found.keys()
        for name in wanted:
            assert wanted[name].tobytes() == found[name].tobytes(), (pair, name)
        rows = metrics(folders[pair])
        assert [row["step"] for row in rows] == [4, 5, 6]
        for row, expected in zip(rows, metrics(folders[pair[0]])[4:], strict=True):
            assert row["tokens"] == expected["tokens"]
            for figure in ("loss", "grad_norm", "router_loss"):
                assert row[figure] == pytest.approx(expected[figure], rel=tolerance), (pair, row["step"])


def test_all_processes_stop_after_the_step_in_which_one_was_told_to_and_lose_nothing(tmp_path, corpus):
    """SIGTERM comes to the second process alone, in step 2 and, once gone on, in step 5, which is to be evaluated."""
    words = [f"data.path={corpus}", *EVERY, "parallel.zero=2", "parallel.expert=2", "train.precision=bf16"]
    whole_run, told = ([*words, f"run.dir={tmp_path / name}"] for name in ("whole", "told"))
    jobs = [{"words": whole_run}, *({"words": told, "signals": [1, step, "SIGTERM"]} for step in (2, 3))]
    codes, said = launch_jobs(tmp_path, 2, [*jobs, {"words": told}])
    assert codes == [0, 75, 75, 0]
    assert [f"goes on after step {step} from {tmp_path / 'told'}" in said for step in (2, 5)] == [True, True]
    assert_same(tmp_path / "told", tmp_path / "whole")


def test_a_killed_process_takes_the_other_along_and_both_go_on_bit_by_bit(tmp_path, corpus):
    words = [f"data.path={corpus}", *EVERY, "parallel.zero=1", "parallel.expert=2"]
    whole_run, killed = ([*words, f"run.dir={tmp_path / name}"] for name in ("whole", "killed"))
    jobs = tmp_path / "killed.json"
    jobs.write_text(json.dumps([{"words": killed, "signals": [1, 5, "SIGKILL"]}]))
    started = time.monotonic()
    done = launch_ranks(2, "tests.multiprocess.many_runs", str(jobs), timeout=100)
    assert done.returncodes[1] == -signal.SIGKILL
    assert done.returncodes[0] != 0, done.stderr
    assert time.monotonic() - started < 60
    assert read_json(tmp_path / "killed" / "exit.json")["code"] != 0
    codes, said = launch_jobs(tmp_path, 2, [{"words": whole_run}, {"words": killed}])
    assert codes == [0, 0]
    assert f"goes on after step 3 from {tmp_path / 'killed'}" in said
    assert_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("processes", [1, 2])
def test_no_file_of_a_run_that_dies_and_goes_on_is_unpickled(tmp_path, corpus, processes):
    """Two processes send each other the tokenizer, in memory; nothing else looks up a class by a pickle's word."""
    words = [f"data.path={corpus}", *EVERY, "parallel.zero=2", f"parallel.expert={processes}"]
    done = launch_ranks(processes, "tests.train.audited", str(tmp_path), *words)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(processes):
        found = read_json(tmp_path / f"seen-{rank}.json")
        assert found["codes"] == [99, 0]
        foreign = [name for name in found["seen"] if not name.startswith(("tokenizers.", "transformers.tokenization"))]
        assert foreign == []
        assert processes == 2 or found["seen"] == []
