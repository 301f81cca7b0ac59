"""The launches of the tests by forks end as torchrun's do, and leave nothing behind."""

import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.multiprocess import sleeper
from tests.train.helpers import launch, torchrun
from tests.warm import Server, launch_ranks

pytestmark = pytest.mark.multiprocess
MODULE = "tests.multiprocess.sleeper"


def await_ranks(folder, count=2):
    """Waits until the processes of a launch run; returns their ids."""
    deadline = time.monotonic() + 60
    while not all((folder / str(rank)).exists() for rank in range(count)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int((folder / str(rank)).read_text()) for rank in range(count)]


def await_end(pids):
    """Waits until processes are gone, or dead and not yet waited for by their new parent."""
    deadline = time.monotonic() + 20
    for pid in pids:
        status = Path(f"/proc/{pid}/stat")
        while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline, f"process {pid} is alive"
            time.sleep(0.05)


@pytest.fixture
def bare():
    """A server that imports nothing."""
    server = Server(())
    yield server
    server.process.kill()
    server.close()


def test_each_process_has_its_place_its_environment_and_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = launch_ranks(2, MODULE, str(tmp_path), "0", "0", MINE="set")
    assert (done.returncode, done.returncodes, done.stderr) == (0, [0, 0], "")
    said = [f"{rank} of 2 set {tmp_path} {sleeper.__file__}" for rank in range(2)]
    assert sorted(done.stdout.splitlines()) == said
    done = launch_ranks(1, MODULE, str(tmp_path), "0")
    assert done.stdout == f"0 of None None {tmp_path} {sleeper.__file__}\n"


def test_one_that_fails_ends_the_others_as_under_torchrun(tmp_path):
    words = [str(tmp_path), "sleep", "3"]
    forked = launch_ranks(2, MODULE, *words)
    assert (forked.returncode, forked.returncodes) == (3, [-signal.SIGTERM, 3])
    done = launch([*torchrun(2), "-m", MODULE], *words, timeout=60)
    assert "exitcode  : 3" in done.stderr


def test_a_launch_that_takes_too_long_is_killed(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        launch_ranks(2, MODULE, str(tmp_path), "sleep", "sleep", timeout=3)
    await_end(await_ranks(tmp_path))


@pytest.mark.parametrize("how", ["the tests end", "the server is killed"])
def test_no_process_outlives_what_started_it(bare, tmp_path, how):
    words = [MODULE, str(tmp_path), "sleep", "sleep"]
    with ThreadPoolExecutor() as pool:
        launched = pool.submit(bare.launch, 2, words, bare.environment, timeout=60)
        pids = await_ranks(tmp_path)
        if how == "the tests end":
            bare.channel.close()
        else:
            bare.process.kill()
        await_end(pids)
        with pytest.raises(RuntimeError, match="the fork server ended"):
            launched.result()


def test_what_libraries_read_while_they_are_imported_cannot_be_set(tmp_path):
    with pytest.raises(ValueError, match="HF_HOME is read while libraries are imported"):
        launch_ranks(1, MODULE, str(tmp_path), "0", HF_HOME=str(tmp_path))
