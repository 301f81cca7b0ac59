"""Files read by several processes: the documents, errors and caches of one."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.train.helpers import run_small, write_corpus
from train.config import DataConfig
from train.data import reading
from train.data.formats import Schema
from train.data.sources import load_documents
from train.errors import DataError, MachineError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, with a file for every file that is read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(reading, "GROUP_BYTES", 1)
    monkeypatch.setattr(reading, "MOST_GROUPS", 10**9)
    return tmp_path / "cache" / "cierzo"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def readers(group=None):
    """Processes that read, of this process or of a group."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            _, parent, its_group = (place / "stat").read_text().rpartition(")")[2].split()[:3]
            is_reader = b"train.data.reading" in (place / "cmdline").read_bytes()
        except OSError:
            continue
        if is_reader and (int(parent) == os.getpid() if group is None else int(its_group) == group):
            found.append(int(place.name))
    return found


SCRIPT = """\
import signal, sys
from pathlib import Path
import datasets
from train.config import DataConfig
from train.data import reading
from train.data.sources import load_documents
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(75))
datasets.config.HF_DATASETS_CACHE = Path(sys.argv[1])
reading.GROUP_BYTES, reading.MOST_GROUPS = 1, 10**9
print(len(load_documents(DataConfig(path=sys.argv[2], workers=2))))
"""  # without a guard of its `__main__`


def mixed(folder):
    """Files of which the first has no row of columns, and the last would be taken for another format alone."""
    (folder / "a.jsonl").write_text('[]\n{"text": \n')
    (folder / "b.csv").write_text("text,n\n" + "".join(f"row {n},{n}\n" for n in range(1500)) + " ,0\n")
    (folder / "c.json").write_text('[{"text": "one"},\n\n{"body": "two"}]')
    (folder / "d.txt").write_text("a whole\ntext")
    parquet.write_table(pa.table({"prompt": ["y"], "completion": ["z"]}), folder / "e.parquet")


@pytest.mark.parametrize("form", ["auto", "text"])
def test_several_processes_read_what_one_does_in_its_order(folder, monkeypatch, tmp_path, form):
    mixed(folder)
    config = DataConfig(path=str(folder), bad_rows="skip", format=form)
    in_turn = reading.rows_of(sorted(folder.iterdir()))
    rows = list(reading.documents_of(in_turn, Schema(form, {}), part=0, strict=False))
    assert [row["source"].rpartition("/")[2] for row in rows[-4:]] == ["c.json:1", "c.json:3", "d.txt", "e.parquet:1"]
    assert {row["format"] for row in rows[2:]} == {"text"}
    found = load_documents(config)
    config.workers = 3
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    again = load_documents(config)
    assert list(found) == list(again) == rows
    assert found._fingerprint == again._fingerprint
    assert not readers()


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_bad_file_is_named_by_its_line(folder, workers, capsys):
    write_corpus(folder / "a.jsonl", 5000)
    (folder / "b.csv").write_text("text\n" + "fine\n" * 30_000 + '"never closed\n')
    (folder / "c.csv").write_text('text\n"never closed\n')
    with pytest.raises(DataError, match=r"data/b.csv:30001: not CSV"):
        load_documents(DataConfig(path=str(folder), workers=workers))
    assert not readers()
    assert run_small(folder.parent / "run", f"data.path={folder}", f"data.workers={workers}") == 3
    assert f"error: {folder}/b.csv:30001: not CSV" in capsys.readouterr().err
    (folder / "b.csv").unlink()
    (folder / "c.csv").write_text('text\n"closed"\n')
    (folder / "b.jsonl").write_text('{"text": "fine"}\n{"text"}\n')
    with pytest.raises(DataError, match=r"data/b.jsonl:2: not JSON"):
        load_documents(DataConfig(path=str(folder), workers=workers))


def test_of_a_folder_with_another_file_at_its_end_that_one_is_read(folder, cache):
    for name in ("a", "b"):
        write_corpus(folder / f"{name}.jsonl")
    config = DataConfig(path=str(folder), workers=2)
    assert len(load_documents(config)) == 120
    before = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    write_corpus(folder / "c.jsonl")
    assert len(load_documents(config)) == 180
    after = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(after) == len(before) + 1 == 3
    assert before.items() <= after.items()


def test_files_are_read_in_groups_of_a_size_and_in_not_too_many(folder, monkeypatch):
    for number in range(40):
        (folder / f"{number:02}.txt").write_text("x" * 10)
    files = sorted(folder.iterdir())
    monkeypatch.setattr(reading, "GROUP_BYTES", 25)
    groups = reading.grouped(files)
    assert [len(group) for group in groups] == [3] * 13 + [1]
    assert [file for group in groups for file in group] == files
    monkeypatch.setattr(reading, "MOST_GROUPS", 5)
    assert [len(group) for group in reading.grouped(files)] == [10] * 4


def test_a_killed_reader_is_named_and_leaves_nothing_that_is_taken_for_whole(folder, cache):
    for name in ("a", "b", "c"):
        write_corpus(folder / f"{name}.jsonl", 30_000)
    config = DataConfig(path=str(folder), workers=2)

    def kill() -> None:
        while not (partial := next(cache.glob("*.partial"), None)) or not partial.stat().st_size:
            time.sleep(0.002)
        for reader in readers():
            if partial in (fd.resolve() for fd in Path(f"/proc/{reader}/fd").iterdir()):
                os.kill(reader, signal.SIGKILL)

    cache.mkdir(parents=True)
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(MachineError, match="a process that read files was killed"):
        load_documents(config)
    killer.join()
    assert not readers()
    assert not list(cache.glob("*.partial"))
    assert len(load_documents(config)) == 90_000


@pytest.mark.parametrize("name", ["script.py", "-"])
def test_a_script_that_guards_nothing_reads_with_several_processes(folder, tmp_path, name):
    for number in range(3):
        write_corpus(folder / f"{number}.jsonl", 10)
    (tmp_path / "script.py").write_text(SCRIPT)
    script = name if name == "-" else str(tmp_path / name)
    command = [sys.executable, script, str(tmp_path / "cache"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(reading.__file__).parents[2])}
    done = subprocess.run(command, input=SCRIPT, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (0, "30\n"), done.stderr[-3000:]


def test_processes_that_are_stopped_together_end_though_a_reader_was_idle(folder, cache):
    write_corpus(folder / "a.jsonl", 10)
    (folder / "b.jsonl").write_text('{"text": "one of many lines"}\n' * 1_000_000)
    environment = os.environ | {"PYTHONPATH": str(Path(reading.__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, str(cache.parent), str(folder)]
    started = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        while not list(cache.glob("*.arrow")):
            assert started.poll() is None
            time.sleep(0.01)
        time.sleep(0.5)
        os.killpg(started.pid, signal.SIGTERM)
        assert started.wait(30) == 75
        assert not readers(started.pid)
        assert not list(cache.glob("*.partial"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
