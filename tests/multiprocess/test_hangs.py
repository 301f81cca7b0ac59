"""A process that hangs is named, and the run ends rather than waits; one that is slow is waited for."""

import re
import socket

import pytest

from tests.train.helpers import SMALL, metrics, read_json, write_corpus
from tests.warm import launch_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
SECONDS = 8.0  # more than anything takes that does not hang, on a machine that does much besides
SPLIT = ["parallel.expert=2", "parallel.zero=2"]


@pytest.fixture
def start(tmp_path):
    """Starts two processes, of which one hangs at a step, and waits for their end."""
    corpus = write_corpus(tmp_path / "corpus.jsonl")

    def start(rank, kind, step, *words, **environment):
        words = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path / 'run'}", "evaluate.sample_tokens=0", *words]
        words = [str(rank), kind, str(step), *words, f"train.hang_seconds={SECONDS}"]
        return launch_ranks(2, "tests.multiprocess.hanging", *words, timeout=200, **environment)

    return start


def ended(folder):
    found = read_json(folder / "exit.json")
    assert (found["reason"], found["code"]) == ("environment", 6), found
    assert f"for {SECONDS:g} s (train.hang_seconds)" in found["message"]
    return found["message"]


def stacks(folder):
    return {path.name: path.read_text() for path in (folder / "failures").iterdir()}


def test_a_process_that_waits_for_data_for_ever_is_named_with_its_stacks(start, tmp_path):
    done = start(1, "data", 3, "train.max_steps=1000")
    assert done.returncodes == [6, 6], done.stderr
    message = ended(tmp_path / "run")
    assert "process 1 (pid " in message
    assert "at step 3, waiting for data; process 0 waited, at step 3" in message
    assert done.stderr.count(f"error: {message}") == 1
    assert "Traceback" not in done.stderr
    found = stacks(tmp_path / "run")
    assert sorted(found) == ["stacks-rank0.txt", "stacks-rank1.txt"]
    assert "in sleeps_for_ever" in found["stacks-rank1.txt"]
    assert " is prefetch" in found["stacks-rank1.txt"]
    assert "in step_size" in found["stacks-rank0.txt"]
    assert "in sleeps_for_ever" not in found["stacks-rank0.txt"]


def test_the_main_process_that_hangs_in_a_step_is_named_by_the_others_or_itself(start, tmp_path):
    done = start(0, "step", 2, *SPLIT)
    assert done.returncodes == [6, 6], done.stderr
    message = ended(tmp_path / "run")
    assert "process 0 (pid " in message
    assert "process 1 waited, at step 2, a training step" in message
    assert "in sleeps_for_ever" in stacks(tmp_path / "run")["stacks-rank0.txt"]


def test_a_stopped_main_process_that_hosts_the_meeting_is_named_by_another(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = start(0, "stop", 2, TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(port))
    assert done.returncodes == [-9, 6], done.stderr
    message = ended(tmp_path / "run")
    assert f"no sign of life for 8 s (train.hang_seconds) of 127.0.0.1:{port}" in message
    assert list(stacks(tmp_path / "run")) == ["stacks-rank1.txt"]


def test_a_process_that_holds_its_interpreter_is_named_and_says_where_it_is(start, tmp_path):
    done = start(1, "held", 2)
    assert done.returncodes == [6, 6], done.stderr  # it goes on when the launcher ends it, and hears why
    message = ended(tmp_path / "run")
    assert "no sign of life for 8 s (train.hang_seconds) of process 1 (pid " in message
    assert "process 0 waited, at step 2" in message
    assert ", last heard of at " in message
    assert 'tests/multiprocess/hanging.py", line ' in done.stderr
    assert "in hang\n" in done.stderr


def test_a_process_that_is_slow_in_everything_is_waited_for(start, tmp_path):
    """Evaluations and the checkpoint take longer than a hang may, each batch and part of a file does not."""
    words = ["train.max_steps=1", "data.held_out_fraction=0.4", "evaluate.micro_batch_size=1"]
    done = start(1, "slow", 0, *words)
    assert done.returncodes == [0, 0], done.stderr
    assert read_json(tmp_path / "run" / "exit.json")["code"] == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1]
    took = [float(seconds) for seconds in re.findall(r"^took ([0-9.]+)$", done.stdout, re.MULTILINE)]
    assert len(took) == 3
    assert min(took) > 1.4 * SECONDS, took
    assert not (tmp_path / "run" / "failures").exists()
