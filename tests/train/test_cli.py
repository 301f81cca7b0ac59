"""The command line among other programs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from train import errors
from train.cli import main

ARGPARSE = ("convert", "export")  # whose help hides the error where output is not buffered


@pytest.mark.parametrize(
    "words", [["--help"], ["keys"], ["convert", "--help"], ["export", "--help"], ["plan", "--help"]]
)
def test_a_reader_that_has_seen_enough_ends_a_verb_quietly(words):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "import sys; from train.cli import main; sys.exit(main())", *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE or (words[0] in ARGPARSE and done.returncode == 0)


def test_another_pipe_that_breaks_is_no_quiet_end(monkeypatch, capfd):
    monkeypatch.setattr("train.cli._do", lambda _: os.write(broken, b"a"))
    reading, broken = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        main(["keys"])
    os.close(broken)


@pytest.mark.parametrize(
    ("rank", "local", "on_host", "says", "waits"),
    [
        ("0", "0", "8", True, False),
        ("1", "1", "8", False, True),
        ("8", "0", "8", True, True),  # Slurm would end the first host before it has said why
        ("9", "1", "8", False, True),
        ("8", "0", None, True, False),  # by no launcher
    ],
)
def test_before_the_processes_meet_each_host_says_its_error_once_and_leaves_the_first_time_to_say_it(
    rank, local, on_host, says, waits, monkeypatch, capsys
):
    monkeypatch.setattr(errors, "LINGER_SECONDS", 0.2)
    places = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": on_host}
    for variable, value in places.items():
        if value is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, value)
    started = time.monotonic()
    errors.report(errors.ConfigError("mistaken"), met=False)
    assert (time.monotonic() - started >= 0.2) == waits
    assert capsys.readouterr().err == "error: mistaken\n" * says
