"""A run that died goes on as if it had not: bit by bit in its own layout, and to rounding in any other."""

import json
import re
import signal
from itertools import product

import pytest

from tests.multiprocess.layouts import (
    ADAPTED,
    ADAPTERS,
    LAYOUTS,
    STEP_3,
    TOLERANCES,
    TRANSITIONS,
    cross,
    launch_jobs,
    pairs,
)
from tests.train.helpers import SMALL, metrics, read_json, run_small, write_corpus
from tests.train.test_checkpoint import write_pairs
from tests.train.test_labelled import labelled
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
    "replicated, moments of bf16": ["optim.moments=bf16"],
    "ZeRO-1, bf16, EP 2, moments of bf16": [
        *("parallel.zero=1", "train.precision=bf16", "parallel.expert=2", "optim.moments=bf16"),
    ],
    "ZeRO-3, bf16, EP 2, moments of bf16": [
        *("parallel.zero=3", "train.precision=bf16", "parallel.expert=2", "optim.moments=bf16"),
    ],
}

BESIDE = next(index for index, name in enumerate(TWO_PROCESSES) if "written beside" in name)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Eight steps of it are two epochs."""
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl", documents=24)


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
    """Checkpoints are after steps 3, the last of an epoch, and 6; deaths in step 5, mid-epoch, and then in step 7.

    What is written beside later steps has its name by the first death, and by the second, a step after it, not yet.
    """
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
        assert steps == ["3", "3" if died == names[BESIDE][1] else "6"]


def test_two_processes_go_on_with_the_rows_that_follow_whatever_the_data_is(tmp_path):
    """A death in step 5, after a checkpoint of step 3; an epoch of the rows at hand ends in a later step."""
    corpus, pairs, classes = (tmp_path / f"{name}.jsonl" for name in ("corpus", "pairs", "classes"))
    write_corpus(corpus, documents=24)
    write_pairs(pairs, 40)
    classes.write_text("".join(json.dumps(row) + "\n" for row in labelled("classification", 20)))
    big = ["data.tokenizer=mixtral", "model.vocab_size=32000"]
    streamed = [*big, "data.streaming=true", "data.shuffle_buffer=8"]
    samples = ["data.chat_template=none", "data.packing_window=8", f"data.path={pairs}"]
    cases = {
        "samples": [*samples, "parallel.zero=2", "parallel.expert=2"],
        "a stream": [*streamed, f"data.path={corpus}", "train.gradient_accumulation_steps=2"],
        "a stream of samples": [*streamed, *samples, "parallel.zero=1", "parallel.expert=2"],
        "labels": [*big, f"data.path={classes}", "data.format=classification", "data.too_long=cut", "parallel.zero=3"],
    }
    jobs = []
    for name, words in cases.items():
        whole_run, died = ([*EVERY, *words, f"run.dir={tmp_path / kind / name}"] for kind in ("whole", "died"))
        jobs += [{"words": whole_run}, {"words": died, "dies_at": 5}, {"words": died}]
    assert launch_jobs(tmp_path, 2, jobs)[0] == [0, 99, 0] * len(cases)
    for name in cases:
        assert_same(tmp_path / "died" / name, tmp_path / "whole" / name)


def test_the_transitions_cover_every_pair_of_processes_experts_zero_and_precision():
    """Before and after: of any two of these seven, each two values that go together are in at least one transition."""
    tried = [(precision, pair) for precision, pairs_of in TRANSITIONS.items() for pair in pairs_of]
    wanted = {found for one in product(TOLERANCES, product(LAYOUTS, LAYOUTS)) for found in pairs(*one)}
    assert len(LAYOUTS) == 18
    assert len(wanted) == 165
    assert wanted <= {found for one in tried for found in pairs(*one)}
    assert len(tried) == len(set(tried)) <= 30


@pytest.mark.parametrize("precision", TRANSITIONS)
def test_any_layout_takes_up_any_others_state_bit_by_bit_and_trains_on_alike(tmp_path, corpus, precision):
    """Every element is there once; then losses, and rows seen, are the first layout's own, to rounding."""
    problems = list(cross(tmp_path, corpus, precision, TRANSITIONS[precision]))
    assert len(problems) == len(TRANSITIONS[precision])
    assert [line for found in problems for line in found] == []


def test_any_layout_takes_up_any_others_adapters_bit_by_bit_and_trains_on_alike(tmp_path, corpus):
    """Of weights that are not saved but read again, by processes that hold other experts than those before."""
    assert run_small(tmp_path / "base", f"data.path={corpus}", "train.max_steps=1", "evaluate.sample_tokens=0") == 0
    words = [f"model.init_from={tmp_path / 'base' / 'export'}", *ADAPTERS]
    problems = list(cross(tmp_path, corpus, "fp32", ADAPTED, *words))
    assert problems == [[]] * len(ADAPTED)
    assert all("lora_" in name for name in read_json(tmp_path / "1-1-0" / STEP_3 / "state.json")["parameters"])


UNEQUAL = {  # a last step whose rows are all one process's; steps in which most experts have no row
    "an uneven end": ["train.max_steps=null", "train.epochs=1.4", "train.micro_batch_size=2"],
    "idle experts": ["data.sequence_length=4", "model.num_experts_per_tok=1", "train.micro_batch_size=1"],
}
SPLIT = {
    "an uneven end": ["parallel.expert=2", "parallel.zero=2"],
    "idle experts": ["parallel.expert=2", "parallel.zero=3", "parallel.persistent_elements=0"],
}
TWICE = {"an uneven end": "train.micro_batch_size=4", "idle experts": "train.micro_batch_size=2"}


def test_two_processes_with_unequal_work_go_on_and_end_as_one_does(tmp_path, corpus):
    both, alone = [], []
    for name, words in UNEQUAL.items():
        words = ["train.max_steps=6", f"data.path={corpus}", "checkpoint.every=3", "optim.eps=1e-6", *words]
        whole_run, died, single = (f"run.dir={tmp_path / kind / name}" for kind in ("whole", "died", "alone"))
        both.append({"words": [*words, *SPLIT[name], whole_run]})
        both.append({"words": [*words, *SPLIT[name], died], "dies_at": 5})
        both.append({"words": [*words, *SPLIT[name], died]})
        alone.append({"words": [*words, TWICE[name], single]})
    assert launch_jobs(tmp_path, 2, both)[0] == [0, 99, 0] * 2
    assert launch_jobs(tmp_path, 1, alone)[0] == [0, 0]
    for name in UNEQUAL:
        assert figures(tmp_path / "died" / name) == figures(tmp_path / "whole" / name)
        random = read_json(next((tmp_path / "died" / name / "checkpoints").glob("step-*")) / "state.json")["random"]
        assert random[0] != random[1]  # or both would drop the same
        rows, expected = metrics(tmp_path / "died" / name), metrics(tmp_path / "alone" / name)
        for row, other in zip(rows, expected, strict=True):
            for figure in {"step", "tokens", "loss", "grad_norm", "router_loss", "eval_loss"} & other.keys():
                assert row[figure] == pytest.approx(other[figure], rel=2e-5), (name, row["step"], figure)
    tokens = [row["tokens"] for row in metrics(tmp_path / "died" / "an uneven end")[1:]]
    assert tokens[-1] - tokens[-2] <= tokens[0] / 2
    loads = [row["expert_load"] for row in metrics(tmp_path / "died" / "idle experts")[1:]]
    assert all(min(layer) == 0 for load in loads for layer in load)


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
    done = launch_ranks(2, "tests.multiprocess.many_runs", str(jobs), timeout=100)
    assert done.returncodes[1] == -signal.SIGKILL
    assert done.returncodes[0] != 0, done.stderr
    logged, ended = ((tmp_path / "killed" / name).stat().st_mtime for name in ("metrics.jsonl", "exit.json"))
    assert ended - logged < 10
    assert read_json(tmp_path / "killed" / "exit.json")["code"] != 0
    codes, said = launch_jobs(tmp_path, 2, [{"words": whole_run}, {"words": killed}])
    assert codes == [0, 0]
    assert f"goes on after step 3 from {tmp_path / 'killed'}" in said
    assert_same(tmp_path / "killed", tmp_path / "whole")


def test_a_disk_that_is_full_for_one_process_ends_both_with_six_and_leaves_what_was_saved(tmp_path, corpus):
    """The second process may write no file past 200 kB from step 5 on; that of its part of a checkpoint has more."""
    words = [f"data.path={corpus}", *EVERY, "evaluate.sample_tokens=0", "parallel.zero=2", "parallel.expert=2"]
    whole_run, full = ([*words, f"run.dir={tmp_path / name}"] for name in ("whole", "full"))
    done = launch_ranks(2, "tests.train.small_disk", "1", "5", "200000", *SMALL, *full, timeout=100)
    assert done.returncodes == [6, 6], done.stderr[-3000:]
    message = read_json(tmp_path / "full" / "exit.json")["message"]
    assert "the checkpoint of step 6 was not written, those before it are untouched" in message
    assert "rank-00001.safetensors: File too large" in message
    assert {path.name for path in (tmp_path / "full" / "checkpoints").iterdir()} == {"latest", "step-00000003"}
    codes, said = launch_jobs(tmp_path, 2, [{"words": whole_run}, {"words": full}])
    assert codes == [0, 0]
    assert f"goes on after step 3 from {tmp_path / 'full'}" in said
    assert_same(tmp_path / "full", tmp_path / "whole")


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
