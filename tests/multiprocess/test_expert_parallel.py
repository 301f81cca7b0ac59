"""Experts split over processes, and ZeRO, train what one process trains."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mixtral import MixtralForCausalLM
from tests.train.helpers import SMALL, metrics, read_json, write_corpus
from tests.warm import launch_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

CASES = ["even", "all to one expert", "none to the first rank", "one rank has no token", "unequal", "a single token"]
CASES += ["capacity, even", "capacity, all to one expert", "capacity, a single token"]
CASES += ["drops by probs", "drops by position"]
CASES += [f"in 3 parts, {case}" for case in CASES[:6]]
CASES += ["overlap of 1", "overlap of 2", "overlap of 3", "freed", "twice in 1", "twice in 2"]


@pytest.mark.parametrize("processes", [2, 4])
def test_any_routing_gives_the_outputs_and_gradients_of_one_process(processes):
    done = launch_ranks(processes, "tests.multiprocess.dispatch_worker", *CASES, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"held: {case}" for case in CASES]


def test_zero_1_reduces_bf16_gradients_in_place_to_what_deepspeed_makes_of_them():
    """Bit by bit over two accumulated steps, dense parameters and split experts, without joining tensors."""
    done = launch_ranks(2, "tests.multiprocess.reduction_worker", timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "held"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Launches a small run and returns its folder."""
    folders = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folders / "corpus.jsonl", documents=300)

    def start(name, processes, *words):
        done = launch_ranks(processes, "train", *SMALL, f"data.path={corpus}", f"run.dir={folders / name}", *words)
        assert done.returncode == 0, done.stderr[-3000:]
        return folders / name

    return start


def assert_same_run(mine, other, tolerance=1e-4):
    for got, expected in zip(metrics(mine), metrics(other), strict=True):
        for figure in ("loss", "router_loss", "grad_norm", "eval_loss"):
            assert (figure in got) == (figure in expected)
            if figure in got:
                assert got[figure] == pytest.approx(expected[figure], abs=tolerance), (got["step"], figure)
    wanted, found = (load_file(folder / "export" / "model.safetensors") for folder in (other, mine))
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert (tensor - wanted[name]).norm() <= tolerance * wanted[name].norm(), name


def assert_loads_in_transformers(folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "export")
    ours = MixtralForCausalLM.from_pretrained(folder / "export")
    ids = torch.arange(40).view(2, 20)
    assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=1e-5)


# Adam with a smaller epsilon magnifies rounding; among fewer tokens, one that rounding routes elsewhere shows
THIRTY = ["train.max_steps=30", "evaluate.every=10", "optim.eps=1e-6", "data.sequence_length=128"]
THIRTY += ["schedule.warmup_steps=60"]


@pytest.fixture(scope="module")
def one_process(run):
    return run("one", 1, *THIRTY, "train.micro_batch_size=8")


LAYOUTS = {
    "2 processes, ZeRO-1": (2, ["parallel.zero=1", "train.micro_batch_size=4"]),
    "2 processes, EP 2": (2, ["parallel.expert=2", "parallel.zero=2", "train.micro_batch_size=4"]),
    "2 processes, EP 2, overlapped": (
        2,
        ["parallel.expert=2", "parallel.zero=2", "train.micro_batch_size=4", "parallel.overlap_degree=2"],
    ),
    "4 processes, EP 2": (4, ["parallel.expert=2", "parallel.zero=3", "train.micro_batch_size=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_thirty_steps_are_those_of_one_process(run, one_process, layout):
    processes, words = LAYOUTS[layout]
    folder = run(layout, processes, *THIRTY, *words)
    assert_same_run(folder, one_process)
    assert_loads_in_transformers(folder)
    crossing = [row["cross_rank_fraction"] for row in metrics(folder) if "loss" in row]
    if "parallel.expert=2" in words:
        assert all(0.3 < fraction < 0.7 for fraction in crossing)  # about half of the rows, with two ranks
    else:
        assert crossing == [0.0] * 30


def test_accumulation_changes_nothing_under_the_previous_step_scope(run):
    words = [*THIRTY, "train.router_loss_scope=previous_step", "model.router_aux_loss_coef=0.1"]
    words += ["train.router_bias_rate=0.001"]
    whole = run("whole", 1, *words, "train.micro_batch_size=8")
    for accumulation in (2, 4):
        split = [f"train.micro_batch_size={4 // accumulation}", f"train.gradient_accumulation_steps={accumulation}"]
        folder = run(f"accumulated {accumulation}", 2, *words, *split, "parallel.expert=2", "parallel.zero=1")
        assert_same_run(folder, whole)


def test_processes_that_read_their_experts_alone_start_from_the_same_weights(run, one_process):
    words = [f"model.init_from={one_process / 'export'}", "train.max_steps=4", "data.sequence_length=128"]
    one = run("continued", 1, *words, "train.micro_batch_size=8")
    assert metrics(one)[0]["eval_loss"] == pytest.approx(metrics(one_process)[-1]["eval_loss"], abs=1e-6)
    two = run("continued by two", 2, *words, "train.micro_batch_size=4", "parallel.expert=2", "parallel.zero=3")
    assert_same_run(two, one)


def test_deepspeeds_own_layer_drops_what_its_buffers_cannot_hold_and_says_how_much(run):
    words = ["parallel.expert=2", "parallel.zero=1", "parallel.dispatch=deepspeed_capacity", "data.sequence_length=128"]
    lossy = run("lossy", 2, *words, "parallel.capacity_factor=0.75")
    lossless = run("lossless", 2, *words, "parallel.capacity_factor=null")
    dropped = [row["dropped_fraction"] for row in metrics(lossy) if "loss" in row]
    assert len(dropped) == 4
    assert all(0.24 <= fraction < 0.8 for fraction in dropped)  # a buffer holds 3/4 of an even share
    assert [row["dropped_fraction"] for row in metrics(lossless) if "loss" in row] == [0.0] * 4
    assert_same_run(lossless, run("dropless", 2, "parallel.expert=2", "parallel.zero=1", "data.sequence_length=128"))


@pytest.mark.parametrize("stage", [2, 3])
def test_offloading_and_tied_embeddings_change_no_figure(run, stage):
    words = ["train.max_steps=3", "model.tie_word_embeddings=true"]
    layout = ["parallel.expert=2", f"parallel.zero={stage}", "parallel.persistent_elements=0"]
    offload = ["parallel.offload_optimizer=true", *(["parallel.offload_parameters=true"] if stage == 3 else [])]
    split = run(f"offloaded {stage}", 2, *words, *layout, *offload, "train.micro_batch_size=4")
    assert_same_run(split, run(f"kept {stage}", 1, *words, "train.micro_batch_size=8"), 1e-5)


@pytest.mark.parametrize(("stage", "precision"), [(2, "fp32"), (3, "fp32"), (1, "bf16")])
def test_a_gradient_that_is_not_finite_ends_every_process_with_code_5(tmp_path, stage, precision):
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents=300)
    words = [f"data.path={corpus}", f"run.dir={tmp_path / 'run'}", "optim=sgd", "optim.lr=1e30", "train.max_steps=5"]
    layout = ["parallel.expert=2", f"parallel.zero={stage}", "schedule=constant", "schedule.warmup_steps=0"]
    done = launch_ranks(2, "train", *SMALL, *words, *layout, f"train.precision={precision}", timeout=120)
    assert done.returncode == 5, done.stderr[-2000:]
    assert read_json(tmp_path / "run" / "exit.json")["reason"] == "numerics"
    assert not (tmp_path / "run" / "export").exists()
