"""Two hosts, as network namespaces joined by a cable, train what one host does."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.train.helpers import SMALL, launch, metrics, torchrun, write_corpus
from tests.warm import launch_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def hosts():
    """Names of two namespaces and of the interface in each; gone afterwards, with the cable."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` (iproute2) here to make network namespaces with")
    names = [f"cierzo-{os.getpid()}-{index}" for index in range(2)]
    cables = [f"cz{os.getpid() % 10**6}x{index}" for index in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip(
                "link",
                "add",
                cables[0],
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                cables[1],
                "netns",
                names[1],
            )
        except OSError as error:
            pytest.skip(f"network namespaces may not be made here: {error}")
        for index, (name, cable) in enumerate(zip(names, cables, strict=True)):
            ip("-n", name, "addr", "add", f"10.231.77.{index + 1}/24", "dev", cable)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", cable, "up")
        yield list(zip(names, cables, strict=True))
    finally:
        for name in names:  # the cable goes with its ends
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_on(hosts, words, *, named_interface):
    """Starts one torchrun with one process on each host."""

    def start(index):
        name, cable = hosts[index]
        meeting = ["--nnodes", "2", "--node_rank", str(index), "--master_addr", "10.231.77.1", "--master_port", "29500"]
        command = ["ip", "netns", "exec", name, *torchrun(1)[:-4], *meeting, "--rdzv_conf", "timeout=60", "-m", "train"]
        return launch(command, *words, **({"GLOO_SOCKET_IFNAME": cable} if named_interface else {}))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(start, (0, 1)))


@pytest.fixture
def words(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents=300)
    return [*SMALL, f"data.path={corpus}", "parallel.expert=2", "parallel.zero=2", "train.max_steps=3"]


def test_two_hosts_train_what_one_does(hosts, words, tmp_path):
    for done in start_on(hosts, [*words, f"run.dir={tmp_path / 'two'}"], named_interface=True):
        assert done.returncode == 0, done.stderr[-3000:]
    done = launch_ranks(2, "train", *words, f"run.dir={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr[-3000:]
    for mine, other in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for figure in ("loss", "router_loss", "grad_norm", "eval_loss"):
            assert mine.get(figure) == pytest.approx(other.get(figure), abs=1e-6), (mine["step"], figure)


def test_hosts_that_know_only_their_loopback_are_told_which_variable_to_set(hosts, words, tmp_path):
    """A namespace resolves its own name as the machine does, to an address that is its alone."""
    for done in start_on(hosts, words, named_interface=False):
        assert done.returncode != 0
        assert "exitcode  : 6" in done.stderr
        (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "which no other host can reach: set GLOO_SOCKET_IFNAME" in said
