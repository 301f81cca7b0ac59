"""The command line among other programs."""

import os
import signal
import subprocess
import sys

import pytest

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
