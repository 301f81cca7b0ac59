"""Runs are started again by themselves, as often as is of use."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from tests.train.helpers import SMALL, kill_group, metrics, run_small, write_corpus
from train.checkpoint.find import read_name

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
JOB = {"SLURM_GPUS_PER_NODE": "8", "SLURM_JOB_NODELIST": "host", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}
JOB |= {"SLURM_CPUS_PER_TASK": "64"}


def stub(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


def children(pid):
    """All processes below one."""
    said = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    below = [int(word) for word in said.split()]
    return below + [grandchild for child in below for grandchild in children(child)]


def rank_of(pid):
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(one.removeprefix(b"RANK=")) for one in environment if one.startswith(b"RANK=")), None)


def supervise(folder, processes, step, number, *words):
    """Supervises a run, signals its last process once a step is saved, and returns what was said up to its end."""
    environment = os.environ | {"PROCESSES": str(processes), "OMP_NUM_THREADS": "1", "RESTARTS": "2"}
    environment["PATH"] = f"{sysconfig.get_path('scripts')}:{environment['PATH']}"
    process = subprocess.Popen(
        ["bash", ROOT / "launch/supervise.sh", *SMALL, *words, f"run.dir={folder}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while (read_name(folder / "checkpoints" / "latest") or "") < f"step-{step:08d}":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (last,) = [pid for pid in children(process.pid) if rank_of(pid) == processes - 1]
        os.kill(last, number)
        said = process.communicate(timeout=200)
    finally:
        kill_group(process)
    assert process.returncode == 0, said
    assert "starts again, at most 1 times more" in said[1]
    assert "goes on after step" in said[0]
    return said


def test_a_supervised_run_is_killed_and_ends_as_the_one_that_was_not(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    words = [f"data.path={corpus}", "train.max_steps=200", "checkpoint.every=20", "train.log_every=10"]
    words += ["evaluate.sample_tokens=0"]
    assert run_small(tmp_path / "whole", *words) == 0
    supervise(tmp_path / "killed", 1, 40, signal.SIGKILL, *words)
    names, folders = ("step", "loss", "grad_norm", "tokens"), (tmp_path / "whole", tmp_path / "killed")
    runs = [[[row.get(name) for name in names] for row in metrics(run)] for run in folders]
    assert runs[0] == runs[1]


def test_a_supervised_run_of_which_a_process_is_stopped_ends_by_itself_and_goes_on(tmp_path):
    words = [f"data.path={write_corpus(tmp_path / 'corpus.jsonl')}", "train.max_steps=150", "checkpoint.every=20"]
    words += ["evaluate.sample_tokens=0", "train.hang_seconds=10"]
    said = supervise(tmp_path / "run", 2, 20, signal.SIGSTOP, *words)
    assert "no sign of life for 10 s (train.hang_seconds) of process 1 (pid " in said[1]
    assert "supervise: ended with 6; starts again" in said[1]
    assert [path.name for path in (tmp_path / "run" / "failures").iterdir()] == ["stacks-rank0.txt"]
    assert metrics(tmp_path / "run")[-1]["step"] == 150


@pytest.mark.parametrize(("code", "times"), [(None, 3), (2, 1), (5, 1), (6, 3), (75, 3)])
def test_deaths_in_a_row_are_bounded_and_mistakes_are_not_repeated(tmp_path, code, times):
    folder = tmp_path / "run"
    folder.mkdir()
    writes = "" if code is None else f"echo '{json.dumps({'code': code})}' > {folder}/exit.json; "
    stub(tmp_path / "bin", "torchrun", f"echo started >> {tmp_path}/log; sleep 0.05; {writes}exit 1")
    environment = {"PROCESSES": "1", "RESTARTS": "2", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / "launch/supervise.sh", f"run.dir={folder}"], env=os.environ | environment)
    assert done.returncode == (code or 1)
    assert len((tmp_path / "log").read_text().splitlines()) == times


@pytest.mark.parametrize(
    ("code", "restarted", "queued"), [(75, 0, True), (None, 9, True), (75, 10, False), (2, 0, False), (0, 0, False)]
)
def test_a_slurm_job_queues_itself_again_where_that_is_of_use(tmp_path, code, restarted, queued):
    folder = tmp_path / "run"
    folder.mkdir()
    writes = "" if code is None else f"echo '{json.dumps({'code': code})}' > {folder}/exit.json; "
    stub(tmp_path / "bin", "srun", f"{writes}exit {min(1, 1 if code is None else code)}")
    stub(tmp_path / "bin", "scontrol", f'if [ "$1" = requeue ]; then echo "$2" > {tmp_path}/queued; else echo host; fi')
    environment = JOB | {"SLURM_RESTART_COUNT": str(restarted)}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    script = ["bash", ROOT / "launch/slurm.sbatch", f"run.dir={folder}"]
    done = subprocess.run(script, env=os.environ | environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (code == 0), done.stderr
    assert (tmp_path / "queued").exists() == queued


def slurm_job(folder, srun):
    """Runs a job whose srun is a stub; returns its code, and whether it was queued again."""
    stub(folder / "bin", "srun", srun)
    stub(folder / "bin", "scontrol", f'if [ "$1" = requeue ]; then echo "$2" > {folder}/queued; else echo host; fi')
    environment = os.environ | JOB | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / "launch/slurm.sbatch", f"run.dir={folder / 'run'}"], env=environment)
    return done.returncode, (folder / "queued").exists()


@pytest.mark.parametrize(
    ("srun", "ends"),
    [
        ("exit 1", (1, True)),  # a node died before the run had its folder
        ("exit 2", (2, False)),  # the launcher's own: a variable, or torchrun itself, is missing
        ("echo '{\"code\": 4}' > %s; exit 1", (4, False)),
    ],
    ids=["died at once", "no launcher", "mistaken"],
)
def test_a_slurm_job_takes_no_earlier_jobs_reason_for_its_own(tmp_path, srun, ends):
    reason = tmp_path / "run" / "exit.json"
    reason.parent.mkdir()
    reason.write_text('{"code": 3}')
    assert slurm_job(tmp_path, srun.replace("%s", str(reason))) == ends


@pytest.mark.parametrize("script", ["supervise.sh", "slurm.sbatch"])
def test_a_mistake_that_is_found_before_there_is_a_folder_is_not_repeated(tmp_path, script):
    """A launcher ends with 1, whatever its processes end with."""
    for name in ("torchrun", "srun"):
        stub(tmp_path / "bin", name, f"echo >> {tmp_path}/log; {sys.executable} -m train train.max_step=3; exit 1")
    stub(tmp_path / "bin", "scontrol", f"echo $1 >> {tmp_path}/asked; echo host")
    (tmp_path / "tmp").mkdir()
    environment = os.environ | JOB | {"PROCESSES": "1", "RESTARTS": "2", "TMPDIR": str(tmp_path / "tmp")}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    command = ["bash", ROOT / "launch" / script, f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: unknown key train.max_step") == 1
    assert (tmp_path / "log").read_text() == "\n"
    assert script == "supervise.sh" or (tmp_path / "asked").read_text() == "show\n"
    assert not any((tmp_path / "tmp").iterdir())


def test_a_variable_that_is_missing_is_named_once(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PROCESSES"} | {"RESTARTS": "2"}
    command = ["bash", ROOT / "launch" / "supervise.sh", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("PROCESSES: how many processes on this host") == 1
    assert "starts again" not in done.stderr


@pytest.mark.parametrize("script", ["supervise.sh", "slurm.sbatch"])
def test_a_folder_below_home_is_looked_for_where_the_run_has_it(tmp_path, script):
    (tmp_path / "run").mkdir()
    for name in ("torchrun", "srun"):
        stub(
            tmp_path / "bin",
            name,
            f"echo >> {tmp_path}/log; sleep 0.05; echo '{{\"code\": 3}}' > ~/run/exit.json; exit 1",
        )
    stub(tmp_path / "bin", "scontrol", f"echo $1 >> {tmp_path}/asked; echo host")
    environment = os.environ | JOB | {"PROCESSES": "1", "RESTARTS": "2", "HOME": str(tmp_path)}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    done = subprocess.run(["bash", ROOT / "launch" / script, "run.dir=~/run"], env=environment)
    assert done.returncode == 3
    assert (tmp_path / "log").read_text() == "\n"
    assert script == "supervise.sh" or (tmp_path / "asked").read_text() == "show\n"


def test_a_checkpoint_below_home_lets_the_count_of_deaths_begin_anew(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    saves = f'[ "$(wc -l < {tmp_path}/log)" = 2 ] && echo step-00000001 > ~/run/checkpoints/latest'
    stub(tmp_path / "bin", "torchrun", f"echo >> {tmp_path}/log; {saves}; exit 1")
    environment = os.environ | {"PROCESSES": "1", "RESTARTS": "2", "HOME": str(tmp_path)}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    done = subprocess.run(["bash", ROOT / "launch/supervise.sh", "run.dir=~/run"], env=environment)
    assert done.returncode == 1
    assert len((tmp_path / "log").read_text()) == 2 + 2
