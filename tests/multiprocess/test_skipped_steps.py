"""A step that is not finite on one process is taken by none, and nothing of it is left in any engine."""

import json

import pytest

from tests.multiprocess.test_resume import assert_same
from tests.train.helpers import metrics, read_json, write_corpus
from tests.warm import launch_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
STEPS = ["checkpoint.every=3", "train.max_steps=8", "train.micro_batch_size=2"]
ROUTER = ["train.router_loss_scope=previous_step", "train.router_bias_rate=0.01"]
ENGINES = {
    "replicated, accumulated": ["train.gradient_accumulation_steps=2"],
    "replicated, bf16, accumulated": ["train.precision=bf16", "train.gradient_accumulation_steps=2"],
    "ZeRO-1, bf16, EP 2": ["parallel.zero=1", "parallel.expert=2", "train.precision=bf16"],
    "ZeRO-2, fp32, EP 2, accumulated": ["parallel.zero=2", "parallel.expert=2", "train.gradient_accumulation_steps=2"],
    "ZeRO-3, bf16, EP 2": ["parallel.zero=3", "parallel.expert=2", "train.precision=bf16"],
}
DYING = ("replicated, bf16, accumulated", "ZeRO-2, fp32, EP 2, accumulated")
FAULTS = {1: (1, "loss"), 4: (0, "gradient"), 5: (1, "expert")}  # step: rank, what
LATE = {"replicated": (1, "reduced"), "ZeRO": (1, "unseen")}  # in step 7
SAID = {
    1: "WARNING step 1: the loss is not finite on process 1 (rows ",
    4: "WARNING step 4: the gradient is not finite on process 0 (rows ",
    5: "WARNING step 5: the gradient is not finite on process 1 (rows ",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl", documents=24)


def launch_jobs(folder, jobs):
    """Runs jobs in two processes; returns the exit codes, the steps that changed nothing by rank, and what was said."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = launch_ranks(2, "tests.multiprocess.faulty_steps", str(path), timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    unchanged = [read_json(path.with_suffix(f".{rank}.unchanged")) for rank in range(2)]
    return read_json(path.with_suffix(".codes")), unchanged, done.stdout


def test_no_engine_keeps_anything_of_a_step_that_is_not_finite_on_one_process(tmp_path, corpus):
    """What was skipped before a death is skipped again, and the end is the uninterrupted run's, bit by bit."""
    jobs = []
    for name, words in ENGINES.items():
        words = [f"data.path={corpus}", *STEPS, *ROUTER, *words]
        faults = FAULTS | {7: LATE[name.split(",")[0].split("-")[0]]}
        jobs.append({"words": [*words, f"run.dir={tmp_path / name}"], "faults": faults})
        if name in DYING:
            died = [*words, f"run.dir={tmp_path / 'died' / name}"]
            jobs += [{"words": died, "faults": faults, "dies_at": 6}, {"words": died, "faults": faults}]
    codes, unchanged, said = launch_jobs(tmp_path, jobs)
    assert codes == [0, 0, 99, 0, 0, 0, 99, 0, 0]
    whole, died, gone_on = [1, 4, 5, 7], [1, 4, 5], [4, 5, 7]
    assert unchanged == [[whole, whole, died, gone_on, whole, whole, died, gone_on, whole]] * 2
    for name in ENGINES:
        rows = metrics(tmp_path / name)
        assert [row["skipped_steps"] for row in rows[1:]] == [1, 1, 1, 2, 3, 3, 4, 4]
        assert [row["step"] for row in rows if "loss" not in row] == [0, *whole]
        assert read_json(tmp_path / name / "checkpoints" / "step-00000008" / "state.json")["updates"] == 4
        kept = sorted(path.stem for path in (tmp_path / name / "failures").glob("*.safetensors"))
        everywhere = ["step-00000007-rank-0"] if name.startswith("ZeRO") else []
        assert kept == [
            *("step-00000001-rank-1", "step-00000004-rank-0", "step-00000005-rank-1"),
            *everywhere,
            "step-00000007-rank-1",
        ]
    for name in DYING:
        assert_same(tmp_path / "died" / name, tmp_path / name)
    for step, line in SAID.items():
        assert said.count(line) == len(ENGINES) + (len(DYING) if step == 1 else 2 * len(DYING)), line
    assert said.count("step 7: the gradient of all processes is not finite on process 1 (rows ") == 3
    assert said.count("step 7: the gradient norm is not finite on process 0 (rows ") == 4


FINITE = {  # beside those that no engine of DeepSpeed's trains
    "replicated": [],
    "replicated, accumulated": ["train.gradient_accumulation_steps=2"],
    "ZeRO-1, bf16": ["parallel.zero=1", "train.precision=bf16"],
    "ZeRO-2, offloaded": ["parallel.zero=2", "parallel.expert=2", "parallel.offload_optimizer=true"],
    "ZeRO-3, accumulated": ["parallel.zero=3", "parallel.expert=2", "train.gradient_accumulation_steps=2"],
    "ZeRO-3, bf16, offloaded, accumulated": [
        *("parallel.zero=3", "parallel.expert=2", "train.gradient_accumulation_steps=2"),
        *("parallel.offload_optimizer=true", "train.precision=bf16"),
    ],
}


def test_a_step_that_is_skipped_though_it_is_finite_leaves_nothing_for_the_next(tmp_path, corpus):
    """The norm of the step after them is that of its own gradient, as where none is kept between steps."""
    words = [f"data.path={corpus}", "train.max_steps=4", "train.micro_batch_size=2", "checkpoint.every=2"]
    jobs = [
        {"words": [*words, *engine, f"run.dir={tmp_path / name}"], "faults": {2: (None, "spike"), 3: (1, "gradient")}}
        for name, engine in FINITE.items()
    ]
    codes, unchanged, _ = launch_jobs(tmp_path, jobs)
    assert codes == [0] * len(FINITE)
    assert unchanged == [[[2, 3]] * len(FINITE)] * 2
    for name in FINITE:
        assert read_json(tmp_path / name / "checkpoints" / "step-00000004" / "state.json")["updates"] == 2
        alike = tmp_path / ("replicated, accumulated" if "accumulated" in name else "replicated")
        norms = [metrics(folder)[-1]["grad_norm"] for folder in (tmp_path / name, alike)]
        assert norms[0] == pytest.approx(norms[1], rel=2e-2 if "bf16" in name else 1e-5), name


def test_a_spike_sends_every_process_back_in_every_engine(tmp_path, corpus):
    """What follows is the same in all of them, and is not what the batches that were left out lead to."""
    words = [f"data.path={corpus}", "train.max_steps=6", "train.micro_batch_size=2", "checkpoint.every=3"]
    words += ["train.on_spike=rewind", "train.log_every=1"]
    engines = {"replicated": [], "ZeRO-1": ["parallel.zero=1"]}
    engines |= {f"ZeRO-{stage}": [f"parallel.zero={stage}", "parallel.expert=2"] for stage in (2, 3)}
    jobs = [{"words": [*words, f"run.dir={tmp_path / 'undisturbed'}"], "faults": {}}]
    for name, engine in engines.items():
        job = {"words": [*words, *engine, f"run.dir={tmp_path / name}"]}
        jobs += [job | {"faults": {5: (None, "spike")}}, job | {"faults": {}}]
    codes, *_ = launch_jobs(tmp_path, jobs)
    assert codes == [0, *(75, 0) * len(engines)]
    expected = [row["loss"] for row in metrics(tmp_path / "replicated")[1:]]
    for name in engines:
        state = read_json(tmp_path / name / "checkpoints" / "step-00000006" / "state.json")
        assert (state["updates"], state["parts"]["rewind"]) == (6, {"left_out": 2})
        rows = metrics(tmp_path / name)
        assert [row["step"] for row in rows] == list(range(7))
        assert [row["loss"] for row in rows[1:]] == pytest.approx(expected, rel=1e-5), name
    undisturbed = [row["loss"] for row in metrics(tmp_path / "undisturbed")[1:]]
    assert undisturbed[:3] == pytest.approx(expected[:3], rel=1e-6)
    assert all(abs(one - other) > 1e-3 for one, other in zip(undisturbed[3:], expected[3:], strict=True))


def test_so_many_skipped_steps_in_a_row_end_the_run_with_five_on_every_process(tmp_path, corpus):
    words = [f"data.path={corpus}", *STEPS, "parallel.zero=2"]
    cases = {"train.max_skipped_steps=0": [2], "train.max_skipped_steps=2": [2, 4, 5]}
    jobs = [
        {"words": [*words, word, f"run.dir={tmp_path / word}"], "faults": dict.fromkeys(steps, (1, "loss"))}
        for word, steps in cases.items()
    ]
    codes, unchanged, _ = launch_jobs(tmp_path, jobs)
    assert codes == [5, 5]
    assert unchanged == [[[2], [2, 4, 5]]] * 2
    for word, steps in cases.items():
        ended = read_json(tmp_path / word / "exit.json")
        assert (ended["reason"], ended["code"]) == ("numerics", 5)
        assert f"step {steps[-1]}: the loss is not finite on process 1 (rows " in ended["message"]
        assert f"failures/step-{steps[-1]:08d}-rank-1.safetensors" in ended["message"]
        assert not (tmp_path / word / "checkpoints" / f"step-{steps[-1]:08d}").exists()
