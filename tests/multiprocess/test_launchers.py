"""Every launcher starts the same run, and what is wrong with a launch is said once, in time."""

import os
import re
import shutil
import socket
import subprocess
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.train.helpers import PYTHON, SMALL, launch, metrics, read_json, torchrun, write_corpus
from tests.warm import launch_ranks

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])
SPLIT = ["parallel.expert=2", "parallel.zero=1"]
STEPS = ["train.max_steps=3", "train.micro_batch_size=4"]
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl", documents=300)


@pytest.fixture(scope="module")
def one_process(corpus, tmp_path_factory):
    """The figures of a lone process, started without a launcher, with all rows of the step."""
    folder = tmp_path_factory.mktemp("one") / "run"
    words = ["parallel.zero=1", "train.max_steps=3", "train.micro_batch_size=8"]
    done = launch(PYTHON, *SMALL, *words, f"data.path={corpus}", f"run.dir={folder}")
    assert (done.returncode, done.stderr) == (0, "")
    return metrics(folder)


def assert_same_figures(folder, expected):
    for mine, other in zip(metrics(folder), expected, strict=True):
        for figure in ("loss", "router_loss", "grad_norm", "eval_loss"):
            assert mine.get(figure) == pytest.approx(other.get(figure), abs=1e-4), (mine["step"], figure)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_lone_process_needs_no_launcher_for_zero(one_process, corpus, tmp_path, stage):
    words = [f"parallel.zero={stage}", "train.max_steps=3", "train.micro_batch_size=8"]
    done = launch_ranks(1, "train", *SMALL, *words, f"data.path={corpus}", f"run.dir={tmp_path / 'run'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_figures(tmp_path / "run", one_process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "layout"),
    [("torchrun", SPLIT), ("deepspeed", SPLIT), ("accelerate", SPLIT), ("accelerate", [])],
    ids=["torchrun", "deepspeed", "accelerate", "accelerate, replicated"],
)
def test_each_launcher_trains_what_one_process_does_without_a_compiler(one_process, corpus, tmp_path, launcher, layout):
    """Accelerate's launcher sets variables that its library reads, which the engine without split experts stands on."""
    tools = tmp_path / "tools"  # all that the launch scripts may call, and neither g++ nor ninja
    tools.mkdir()
    for name in ("torchrun", "deepspeed", "accelerate"):
        (tools / name).symlink_to(Path(sysconfig.get_path("scripts")) / name)
    environment = {"PATH": str(tools), "TORCH_EXTENSIONS_DIR": str(tmp_path / "built"), "PROCESSES": "2"}
    command = [shutil.which("bash"), str(ROOT / "launch" / f"{launcher}.sh")]
    words = [*SMALL, *STEPS, *layout, f"data.path={corpus}", f"run.dir={tmp_path / 'run'}"]
    done = launch(command, *words, **environment, **({"PORT": free_port()} if launcher == "deepspeed" else {}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    assert read_json(tmp_path / "run" / "environment.json")["processes"] == 2
    assert_same_figures(tmp_path / "run", one_process)
    assert not list((tmp_path / "built").rglob("*.so"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_and_say_what_they_are(script):
    """Slurm is not here: of its script and of what each node runs, only the syntax is checked."""
    text = script.read_text()
    comment = text.removeprefix("#!/usr/bin/env bash\n").splitlines()[0]
    assert re.match(r"# [A-Z].{20}", comment)
    for piece in (text, *re.findall(r"bash -c '(.*)'", text)):
        checked = subprocess.run(["bash", "-n"], input=piece, capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(("processes", "hosts", "several"), [("1", "1", False), ("2", "1", True), ("1", "2", True)])
def test_accelerate_is_told_of_several_processes_where_there_are(tmp_path, processes, hosts, several):
    (tmp_path / "accelerate").write_text('#!/usr/bin/env bash\necho "$@"\n')
    (tmp_path / "accelerate").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = ["bash", str(ROOT / "launch/accelerate.sh")]
    done = launch(script, "recipe=demo", PATH=path, PROCESSES=processes, HOSTS=hosts, FIRST_HOST="a")
    assert (done.returncode, done.stderr) == (0, "")
    words = done.stdout.split()
    assert words[0] == "launch"
    assert words[-1] == "recipe=demo"
    assert ("--multi_gpu" in words) == several
    assert words[words.index("--num_processes") + 1] == str(int(processes) * int(hosts))


@pytest.mark.slow
def test_accelerate_starts_a_lone_process(one_process, corpus, tmp_path):
    words = [*SMALL, "train.max_steps=3", "train.micro_batch_size=8", f"data.path={corpus}"]
    environment = {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}", "PROCESSES": "1"}
    done = launch(["bash", str(ROOT / "launch/accelerate.sh")], *words, f"run.dir={tmp_path / 'run'}", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_figures(tmp_path / "run", one_process)


def test_the_slurm_script_has_one_command_for_each_node():
    text = (ROOT / "launch/slurm.sbatch").read_text()
    (command,) = re.findall(r"bash -c '(.*)'", text)
    assert command.startswith("HOST_RANK=$SLURM_NODEID exec bash launch/torchrun.sh")
    assert {"HOSTS", "PROCESSES", "FIRST_HOST", "PORT"} <= set(re.findall(r"\b[A-Z_]+\b", text.split("export ")[1]))


def test_the_slurm_script_hands_a_nodes_cores_on_to_what_runs_there(tmp_path):
    """Since Slurm 22.05 srun does not read SLURM_CPUS_PER_TASK: what does not ask again may get a single core."""
    for name, does in (("srun", 'printf "%s\\n" "$@" threads="$OMP_NUM_THREADS"'), ("scontrol", "echo node0")):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_GPUS_PER_NODE": "h100:8", "SLURM_CPUS_PER_TASK": "64", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = ["bash", str(ROOT / "launch/slurm.sbatch"), "recipe=demo", f"run.dir={tmp_path}/a run"]
    done = launch(script, PATH=path, SLURM_JOB_NODELIST="node[0-1]", **given)
    assert (done.returncode, done.stderr) == (0, "")
    words = done.stdout.splitlines()
    assert "--cpus-per-task=64" in words[: words.index("bash")]
    assert words[-3:] == ["recipe=demo", f"run.dir={tmp_path}/a run", "threads=8"]


@pytest.mark.parametrize(
    ("environment", "word", "code", "says"),
    [
        ({"WORLD_SIZE": "2"}, "parallel.expert=4", 2, "parallel.expert=4 does not divide the number of processes, 2"),
        ({}, "parallel.expert=3", 2, "expected one of 1, 2, 4, 8"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "parallel.expert=2", 6, "RANK=2 is not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "parallel.expert=2", 6, "WORLD_SIZE='two' is not a number"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": ""}, "parallel.expert=2", 6, "MASTER_PORT"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "parallel.expert=2", 6, "MASTER_PORT=70000 is no port"),
        ({"GLOO_SOCKET_IFNAME": "nosuch0"}, "parallel.expert=1", 6, "no network interface nosuch0; expected one of lo"),
        ({"NCCL_SOCKET_IFNAME": "=l"}, "parallel.expert=1", 6, "NCCL_SOCKET_IFNAME==l"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_launch_is_refused_in_seconds(tmp_path, environment, word, code, says):
    words = [*SMALL, "data.path=x.jsonl", f"run.dir={tmp_path / 'run'}", "parallel.zero=1", word]
    started = time.perf_counter()
    done = launch(PYTHON, *words, **(ALONE | {"MASTER_PORT": "1024"} | environment))
    assert time.perf_counter() - started < 10
    assert done.returncode == code
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_processes_of_srun_do_not_train_alone(tmp_path):
    done = launch(PYTHON, *SMALL, "data.path=x.jsonl", f"run.dir={tmp_path / 'run'}", SLURM_STEP_NUM_TASKS="4")
    assert done.returncode == 6
    assert done.stderr.startswith("error: SLURM_STEP_NUM_TASKS=4, but WORLD_SIZE is not set")


def test_a_network_pattern_of_nccl_may_be_a_prefix(monkeypatch):
    from train.parallel.launcher import _check_interface

    for pattern in ("l", "=lo", "^docker", "^=eth9"):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", pattern)
        _check_interface("NCCL_SOCKET_IFNAME")


def test_torchrun_ends_at_once_where_experts_do_not_divide_the_processes(tmp_path):
    words = [*SMALL, "data.path=x.jsonl", f"run.dir={tmp_path / 'run'}", "parallel.zero=1", "parallel.expert=4"]
    done = launch([*torchrun(2), "-m", "train"], *words, timeout=60)
    assert done.stderr.count("error: parallel.expert=4") == 1
    assert "exitcode  : 2" in done.stderr


@pytest.mark.slow
def test_those_that_came_name_the_one_that_did_not(tmp_path):
    """Two of three processes, each the first of its host."""
    port, words = (
        free_port(),
        [*SMALL, "data.path=x.jsonl", f"run.dir={tmp_path / 'run'}", "parallel.meeting_seconds=10"],
    )

    def start(rank):
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
        return launch_ranks(1, "train", *words, timeout=120, **place, MASTER_PORT=port)

    with ThreadPoolExecutor() as pool:
        for done in pool.map(start, (0, 1)):
            assert done.returncode == 6
            assert done.stderr == (
                f"error: process 2 of 3 did not come to 127.0.0.1:{port} within 10 s (parallel.meeting_seconds): "
                "did it start, and can its host reach that address?\n"
            )


@pytest.mark.slow
def test_an_address_where_nothing_answers_is_named_in_time(tmp_path):
    words = [*SMALL, "data.path=x.jsonl", f"run.dir={tmp_path / 'run'}", "parallel.meeting_seconds=1"]
    place = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = launch_ranks(1, "train", *words, timeout=60, **place)
    assert done.returncode == 6
    assert done.stderr.startswith(f"error: nothing answers at 127.0.0.1:{place['MASTER_PORT']} within 1 s")
    assert done.stderr.count("\n") == 1
