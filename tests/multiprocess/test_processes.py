"""Several processes over gloo train what one does."""

import socket

import pytest
import torch
from safetensors.torch import load_file

from tests.train.helpers import SMALL, launch, metrics, read_json, torchrun, write_corpus
from tests.warm import launch_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
MODULE = ["-m", "train"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl", documents=300)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """Launches a small run of so many processes, and returns its folder."""
    folders = tmp_path_factory.mktemp("runs")

    def start(name, processes, *words):
        folder = folders / name
        words = [*SMALL, f"data.path={corpus}", f"run.dir={folder}", *words]
        done = launch_ranks(processes, "train", *words)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return start


def assert_same_weights(mine, other, tolerance):
    expected = load_file(other / "export" / "model.safetensors")
    for name, tensor in load_file(mine / "export" / "model.safetensors").items():
        assert (tensor - expected[name]).norm() <= tolerance * expected[name].norm(), name


@pytest.fixture(scope="module")
def one_process(run):
    return run("one", 1, "train.max_steps=30", "train.micro_batch_size=8", "evaluate.every=10")


def test_two_processes_log_the_losses_of_one_at_every_step(run, one_process):
    two = run("two", 2, "train.max_steps=30", "train.micro_batch_size=4", "evaluate.every=10")
    for mine, other in zip(metrics(two), metrics(one_process), strict=True):
        for figure in ("loss", "router_loss", "router_objective", "grad_norm", "eval_loss"):
            assert (figure in mine) == (figure in other)
            if figure in mine:
                assert mine[figure] == pytest.approx(other[figure], abs=1e-4), (mine["step"], figure)
        assert mine["tokens"] == other["tokens"]
    assert_same_weights(two, one_process, 1e-4)
    assert read_json(two / "environment.json")["processes"] == 2


def test_gradients_do_not_depend_on_processes_or_accumulation(run):
    """Plain gradient descent in fp32 through the engine: a wrong scale would show in the weights at once."""
    words = ["optim=sgd", "optim.lr=0.3", "train.max_steps=3", "model.router_aux_loss_coef=0.0", "tracker=none"]
    words += ["train.router_z_loss_coef=0.01", "schedule=constant", "schedule.warmup_steps=0"]
    whole = run("whole", 1, *words, "train.micro_batch_size=8")
    accumulated = run("accumulated", 1, *words, "train.micro_batch_size=2", "train.gradient_accumulation_steps=4")
    both = run("both", 2, *words, "train.micro_batch_size=2", "train.gradient_accumulation_steps=2")
    for split in (accumulated, both):
        assert_same_weights(split, whole, 1e-5)
        assert metrics(split)[-1]["grad_norm"] == pytest.approx(metrics(whole)[-1]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_averaged_once_a_step_and_in_fp32(precision):
    """Before the last pass a process has its own alone: each pass would be sent else, and what is not finite spread."""
    done = launch_ranks(2, "tests.multiprocess.passes_worker", precision, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "held"


def test_sums_travel_in_one_order_whatever_order_they_are_computed_in():
    done = launch_ranks(2, "tests.multiprocess.collected_worker", timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "held"


def test_bf16_keeps_the_processes_together(run):
    words = ["train.precision=bf16", "train.max_steps=10", "train.gradient_accumulation_steps=2"]
    two = run("bf16-two", 2, *words, "train.micro_batch_size=2")
    one = run("bf16-one", 1, *words, "train.micro_batch_size=4")
    for mine, other in zip(metrics(two)[1:], metrics(one)[1:], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=2e-2)
    assert load_file(two / "export" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_a_stream_gives_two_processes_the_rows_of_one(run):
    words = ["data.streaming=true", "data.tokenizer=mixtral", "model.vocab_size=32000", "data.shuffle_buffer=16"]
    two = run("stream-two", 2, *words, "train.micro_batch_size=2")
    one = run("stream-one", 1, *words, "train.micro_batch_size=4")
    for mine, other in zip(metrics(two)[1:], metrics(one)[1:], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-4)


def test_an_error_of_the_first_process_is_everyones_and_is_said_once(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    words = [*SMALL, f"data.path={tmp_path / 'bad.jsonl'}", f"run.dir={tmp_path / 'run'}"]
    done = launch([*torchrun(2), *MODULE], *words, timeout=60)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "bad.jsonl:2: not JSON" in said[0]
    assert done.stderr.count("Traceback") == 1  # torchrun's own, which closes with the process that failed
    assert "exitcode  : 3" in done.stderr
    assert read_json(tmp_path / "run" / "exit.json")["code"] == 3


def test_the_wrapped_model_is_gone_before_the_process_group(corpus, tmp_path):
    """Else it would be the group's last owner, and might wait for gloo's thread, and that for it, for ever."""
    words = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path / 'run'}", "train.max_steps=1"]
    done = launch_ranks(2, "tests.multiprocess.parting", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("owners: [0]") == 2, done.stdout


def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        environment = address | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        done = launch_ranks(1, "train", *SMALL, "data.path=x.jsonl", f"run.dir={tmp_path}", timeout=60, **environment)
    assert done.returncode == 6, done.stderr
    assert f"cannot meet at 127.0.0.1:{environment['MASTER_PORT']}" in done.stderr


def test_every_process_exits_by_the_code_of_a_mistake(tmp_path):
    done = launch_ranks(2, "train", "recipe=demo", "train.max_step=3", timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("error: unknown key train.max_step") == 1
    assert not list(tmp_path.iterdir())
