"""A launcher that is told to stop: its processes save one step that they agree on, within its grace."""

import os
import signal
import subprocess
import time

import pytest

from tests.train.helpers import SMALL, kill_group, metrics, read_json, torchrun, write_corpus
from train.checkpoint.find import listed, read_name
from train.checkpoint.manifest import check_folder, read_state

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
GRACE_SECONDS = 25.0  # of the 30 that torchrun waits before it kills
WORDS = ["train.max_steps=100000", "parallel.expert=2", "parallel.zero=2", "evaluate.sample_tokens=0"]


@pytest.fixture
def start(tmp_path):
    """Starts two processes under torchrun, and leaves none behind."""
    corpus, started = write_corpus(tmp_path / "corpus.jsonl"), []

    def start(module, *words):
        words = [*words, *SMALL, *WORDS, f"data.path={corpus}", f"run.dir={tmp_path / 'run'}"]
        with (tmp_path / "said").open("w") as said:
            command = [*torchrun(2), "-m", module, *words]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            started.append(subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        kill_group(process)
        process.wait()


def wait_for(process, condition):
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_saved(folder, said, told):
    """Both stopped in time, after the step that is saved last, and all of it is there; nothing was cut off."""
    ended = read_json(folder / "exit.json")
    assert (folder / "exit.json").stat().st_mtime - told < GRACE_SECONDS
    step, saved = listed(folder / "checkpoints")[0]
    assert (ended["reason"], ended["code"]) == ("preempted", 75), (ended, said.read_text()[-3000:])
    assert ended["message"] == f"stopped by SIGTERM after step {step}, which is saved"
    assert read_name(folder / "checkpoints" / "latest") == saved.name
    assert metrics(folder)[-1]["step"] == step == read_state(saved)["step"]
    assert len(list(saved.glob("rank-*.safetensors"))) == 2
    check_folder(saved)
    assert not list((folder / "checkpoints").glob(".*"))
    return step


def test_a_launcher_that_is_told_to_stop_has_its_processes_save_one_step_within_its_grace(start, tmp_path):
    run = start("train")
    wait_for(run, lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(metrics(tmp_path / "run")) > 3)
    told = time.time()
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) != 0
    assert assert_saved(tmp_path / "run", tmp_path / "said", told) >= 3


def test_told_twice_while_they_save_they_finish_and_save_the_step_that_follows(start, tmp_path):
    """The launcher passes on the second request too, more than three seconds after the first."""
    run = start("tests.multiprocess.slow_saves", "2.5", "checkpoint.every=20")
    checkpoints = tmp_path / "run" / "checkpoints"
    wait_for(run, lambda: any(checkpoints.glob(".step-00000020.partial")))
    told = time.time()
    run.send_signal(signal.SIGTERM)
    time.sleep(3.5)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) != 0
    assert assert_saved(tmp_path / "run", tmp_path / "said", told) == 21
    assert [step for step, _ in listed(checkpoints)] == [21, 20]
