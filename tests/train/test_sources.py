"""Documents: what is read, what is refused by file and line, and what is held out."""

import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from tests.train.helpers import WORDS, write_corpus
from train.config import DataConfig, SourceConfig
from train.data.build import open_documents
from train.data.reading import hash_of
from train.data.sources import as_dataset, load_documents, split_documents, split_stream
from train.errors import DataError, MachineError


def read(path, **changes):
    return list(load_documents(DataConfig(path=str(path), **changes)))


def documents_of(texts):
    common = {"label": None, "format": "text", "source": "book.txt", "problem": None, "part": 0}
    rows = [{"text": text, "hash": hash_of(text)} | common for text in texts]
    return as_dataset(rows)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_holds_its_text_files_and_jsonl_rows_in_sorted_order(tmp_path, streaming):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "one.txt", "a text\nof two lines")
    write(tmp_path / "a.jsonl", '\n{"text": "first"}\n\n{"text": "second", "other": 1}\n')
    write(tmp_path / "ignored.bin", b"\xff")
    rows = read(tmp_path, streaming=streaming)
    assert [row["text"] for row in rows] == ["first", "second", "a text\nof two lines"]
    assert [row["source"] for row in rows] == [
        f"{tmp_path}/a.jsonl:2",
        f"{tmp_path}/a.jsonl:4",
        f"{tmp_path}/b/one.txt",
    ]


def test_a_changed_file_is_read_anew(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "old"}\n')
    assert read(path)[0]["text"] == "old"
    write(path, '{"text": "new"}\n')
    os.utime(path, ns=(1, 1))
    assert read(path)[0]["text"] == "new"


def test_another_field_can_hold_the_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "here"}\n')
    assert read(path, text_field="body")[0]["text"] == "here"


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello"))[0]["text"] == "hello"


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets_are_read_with_and_without_splits(tmp_path, streaming):
    dataset = Dataset.from_dict({"body": ["one", "two"], "label": [0, 1]})
    dataset.save_to_disk(tmp_path / "plain")
    DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "splits")
    options = {"text_field": "body", "streaming": streaming}
    assert [row["text"] for row in read(tmp_path / "plain", **options)] == ["one", "two"]
    assert [row["text"] for row in read(tmp_path / "splits", split="test", **options)] == ["two"]
    with pytest.raises(DataError, match=r"data.split=valid: .* train \| test"):
        read(tmp_path / "splits", split="valid", **options)
    with pytest.raises(DataError, match="plain:0: it has the columns body, label, but 'text' is not among them"):
        read(tmp_path / "plain", streaming=streaming)


def test_the_interpreter_brings_megabytes_of_source_and_prose():
    documents = load_documents(DataConfig(path="python_stdlib"))
    sources = set(documents["source"])
    assert {"json/decoder.py", "topic assignment"} <= sources
    assert not any({"test", "tests", "site-packages"} & set(source.split("/")) for source in sources)
    assert sum(map(len, documents["text"])) > 5_000_000


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_whose_name_is_no_utf8_is_read(tmp_path, streaming):
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    write(name.with_suffix(".txt"), "a text")
    parquet.write_table(pa.table({"text": ["a row"]}), tmp_path / "b.parquet")
    (tmp_path / "b.parquet").rename(name.with_suffix(".parquet"))
    rows = read(tmp_path, streaming=streaming)
    assert [(row["text"], row["source"]) for row in rows] == [
        ("a row", f"{tmp_path}/caf\\udce9.parquet:1"),
        ("a text", f"{tmp_path}/caf\\udce9.txt"),
    ]


MALFORMED = {
    "empty.txt": (b"", "no text in it"),
    "blank.txt": (b"\n \n\t\n", "no text in it"),
    "empty.jsonl": (b"", "no text in it"),
    "blank.jsonl": (b"\n\n", "no text in it"),
    "hollow.jsonl": (b'{"text": " "}\n', "no text in it"),
    "latin.txt": (b"good\nb\xe9d\n", r"latin.txt:2: not UTF-8"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"latin.jsonl:2: not UTF-8"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": \n', r"broken.jsonl:3: not JSON"),
    "list.jsonl": (b'["text"]\n', r"list.jsonl:1: wrong type: expected an object with columns, found list"),
    "missing.jsonl": (
        b'{"text": "a"}\n{"body": "b"}\n',
        r"missing.jsonl:2: missing column: no 'text'; it has body; set data.text_field",
    ),
    "surrogate.jsonl": (b'{"text": "a \\ud800 b"}\n', r"surrogate.jsonl:1: .* lone surrogate"),
    "digits.jsonl": (b'{"text": ' + b"9" * 5000 + b"}\n", r"digits.jsonl:1: not readable JSON"),
    "rows.yaml": (b'[{"text": "a"}]', r"rows.yaml: expected a file that ends in one of .txt, .jsonl"),
    "number.jsonl": (b'{"text": 3}\n', r"number.jsonl:1: wrong type: 'text' holds int, not text"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_text_is_refused_by_file_and_line(tmp_path, name):
    content, message = MALFORMED[name]
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


def first_batch_of(file):
    """What is there of an Arrow file once it is cut between its batches."""
    with file.open("rb") as raw:
        pa.ipc.open_stream(raw).read_next_batch()
        return file.read_bytes()[: raw.tell()]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"])
def test_a_saved_dataset_that_is_cut_anywhere_is_named(tmp_path, name, streaming):
    Dataset.from_dict({"text": [f"text {n}" for n in range(2500)]}).save_to_disk(tmp_path / "saved")
    file = tmp_path / "saved" / name
    whole = file.read_bytes()
    between = [len(first_batch_of(file))] if file.suffix == ".arrow" else []
    for length in (0, 5, len(whole) // 2, len(whole) - 3, *between):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=re.escape(str(tmp_path / "saved"))):
            read(tmp_path / "saved", streaming=streaming)


def test_a_saved_dataset_with_a_byte_of_no_text_is_named(tmp_path):
    Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    file = tmp_path / "saved" / "data-00000-of-00001.arrow"
    assert len(read(tmp_path / "saved")) == 2
    file.write_bytes(file.read_bytes().replace(b"onetwo", b"one\xfewo"))
    for _ in range(2):
        with pytest.raises(DataError, match=r"saved: not a readable dataset \(.*Invalid UTF8"):
            read(tmp_path / "saved")


@pytest.mark.parametrize("streaming", [False, True])
def test_the_first_row_of_a_source_says_what_the_rows_of_its_other_files_are(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text('7\n{"prompt": "one", "completion": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"prompt": "four", "completion": "five"}\n')
    found = [(row["format"], row["problem"]) for row in read(tmp_path, streaming=streaming, bad_rows="skip")]
    assert [kind for kind, _ in found[1:]] == ["prompt_completion"] * 3
    assert [problem is None for _, problem in found] == [False, True, False, True]


def test_a_saved_dataset_is_looked_through_once_until_its_files_change(tmp_path):
    Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    assert len(read(tmp_path / "saved")) == 2
    file = tmp_path / "saved" / "data-00000-of-00001.arrow"
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"onetwo", b"one\xfewo"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [row["text"] for row in read(tmp_path / "saved")] == ["one", "two"]  # as they were read the first time
    os.utime(file)
    with pytest.raises(DataError, match="Invalid UTF8"):
        read(tmp_path / "saved")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_whose_pages_are_hashed_is_read_right_or_named_whatever_bit_flips_in_them(tmp_path, streaming):
    path, draw = tmp_path / "rows.parquet", random.Random(0)
    rows = [{"text": " ".join(draw.choices([*WORDS, "é"], k=9))} for _ in range(300)]
    parquet.write_table(pa.Table.from_pylist(rows), path, write_page_checksum=True, use_dictionary=False)
    whole, (chunk,) = path.read_bytes(), [parquet.read_metadata(path).row_group(0).column(0)]
    named = []
    for number in range(40):
        at = chunk.data_page_offset + draw.randrange(chunk.total_compressed_size)
        damaged = tmp_path / f"{number}.parquet"
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        try:
            assert [row["text"] for row in read(damaged, streaming=streaming)] == [row["text"] for row in rows]
        except DataError as error:
            named.append((str(damaged), str(error)))
    assert len(named) > 30
    assert all(path in message for path, message in named)


def test_a_parquet_file_with_a_byte_of_no_text_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": ["one", "two"]}), path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"two", b"t\xfeo"))
    with pytest.raises(DataError, match="rows.parquet: not a readable Parquet file"):
        read(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_time_that_python_has_none_for_matters_where_it_is_used(tmp_path, streaming):
    path = tmp_path / "rows.parquet"
    times = pa.array([10**18, 0], pa.timestamp("us"))
    parquet.write_table(
        pa.table({"text": ["one", "two"], "when": times, "all": pa.ListArray.from_arrays([0, 1, 2], times)}), path
    )
    assert [row["text"] for row in read(path, streaming=streaming)] == ["one", "two"]
    with pytest.raises(DataError, match="rows.parquet:1: wrong type: 'when' holds Unconvertible"):
        read(path, streaming=streaming, format="regression", columns={"label": "when"})


def test_what_a_death_cut_off_in_the_cache_is_read_anew(tmp_path):
    path = write_corpus(tmp_path / "a.jsonl", 2500)
    (cached,) = {row["filename"] for row in load_documents(DataConfig(path=str(path))).cache_files}
    whole = Path(cached).read_bytes()
    for left in (b"", whole[:99], first_batch_of(Path(cached))):
        Path(cached).write_bytes(left)
        assert len(read(path)) == 2500
        assert Path(cached).read_bytes() == whole


@pytest.mark.parametrize("path", ["/no/such/place", "no.jsonl", "./nothing", "a/b/c"])
def test_a_path_that_is_not_there_is_refused(path):
    with pytest.raises(DataError, match="no such file or folder"):
        read(path)


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="no file in this folder ends in one of .txt, .jsonl"):
        read(tmp_path)


def test_a_hub_that_cannot_be_reached_is_named(tmp_path):
    code = (
        "from train.config import DataConfig\n"
        "from train.data.sources import FEATURES, load_documents\n"
        "from train.errors import MachineError\n"
        "try: load_documents(DataConfig(path='nobody/nothing'))\n"
        "except MachineError as error: print(error)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    for settings in ({"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": dead}):
        environment = os.environ | {"HF_HOME": str(tmp_path)} | settings
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, env=environment)
        assert "data.path=nobody/nothing: no such file or folder, and the hub" in done.stdout, done.stderr
        assert "cannot be reached" in done.stdout


def test_the_split_depends_on_the_texts_alone(tmp_path):
    documents = load_documents(DataConfig(path=str(write_corpus(tmp_path / "a.jsonl"))))
    training, held_out = split_documents(documents, 0.1, 99)
    assert (len(training), len(held_out)) == (54, 6)
    shuffled = documents.shuffle(seed=3)
    again = split_documents(shuffled, 0.1, 99)[1]
    assert set(again["text"]) == set(held_out["text"])
    assert not set(training["text"]) & set(held_out["text"])
    assert len(split_documents(documents, 0.1, 2)[1]) == 2


def number_of(text):
    """What is made of a text to choose by, without the code that does so."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def rows_of(count, blanks=7):
    draw = random.Random(count)
    return [{"text": "" if n % blanks == 1 else " ".join(draw.choices(WORDS, k=9))} for n in range(count)]


def save(path, rows):
    """Writes rows as what the name says, a file or a folder of `datasets`."""
    if path.suffix:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("weights", [(None, None), (3.0, 1.0)])
@pytest.mark.parametrize("name", ["a.jsonl", "saved"])
def test_the_texts_with_the_lowest_hashes_are_held_out(tmp_path, name, weights):
    rows, others = rows_of(300), rows_of(50, blanks=5)
    paths = [save(tmp_path / name, rows), save(tmp_path / "b.jsonl", others)]
    sources = [SourceConfig(path=path, weight=weight) for path, weight in zip(paths, weights, strict=True)]
    training, held_out = open_documents(DataConfig(path=None, sources=sources, held_out_fraction=0.1))
    texts = sorted((row["text"] for row in rows + others if row["text"]), key=number_of)
    assert sorted(held_out["text"], key=number_of) == texts[: round(0.1 * len(texts))]
    assert sorted(training["text"], key=number_of) == sorted(
        [*texts[round(0.1 * len(texts)) :], *("" for row in rows + others if not row["text"])], key=number_of
    )


@pytest.mark.parametrize("name", ["a.jsonl", "saved"])
def test_a_stream_holds_out_the_texts_whose_hash_is_below_the_share(tmp_path, name):
    rows = rows_of(300)
    config = DataConfig(path=save(tmp_path / name, rows), streaming=True, held_out_fraction=0.1)
    training, held_out = open_documents(config)
    texts = [row["text"] for row in rows]
    expected = [text for text in texts if text and number_of(text) < int(0.1 * 2**64)]
    assert held_out["text"][:] == expected
    assert [row["text"] for row in training] == [text for text in texts if text not in expected]


def test_a_second_start_does_not_read_the_texts(tmp_path):
    config = DataConfig(path=save(tmp_path / "a.jsonl", rows_of(300)), held_out_fraction=0.1)
    documents, (_, held_out) = load_documents(config), open_documents(config)
    kept = held_out["source"][:]
    (cached,) = {Path(file["filename"]) for file in documents.cache_files}
    for word in ("wind", "valley", "expert", "router", "token", "carries"):
        cached.write_bytes(cached.read_bytes().replace(word.encode(), word.upper().encode()))
    again = open_documents(config)[1]
    assert "VALLEY" in "".join(again["text"])
    assert again["source"][:] == kept


def test_equal_texts_stay_on_one_side():
    documents = documents_of([WORDS[i % 5] for i in range(20)])
    training, held_out = split_documents(documents, 0.1, 99)
    assert not set(training["text"]) & set(held_out["text"])
    assert len(held_out) == 4
    with pytest.raises(DataError, match="same text"):
        split_documents(documents_of(["x"] * 3), 0.1, 99)


def test_of_a_single_document_the_end_is_held_out():
    one = documents_of(["abcdefghij"])
    training, held_out = split_documents(one, 0.2, 99)
    assert (training["text"][0], held_out["text"][0]) == ("abcdefgh", "ij")
    with pytest.raises(DataError, match="book.txt: too short"):
        split_documents(documents_of(["a"]), 0.2, 99)


def test_a_stream_is_split_without_overlap(tmp_path):
    path = write_corpus(tmp_path / "a.jsonl")
    training, held_out = split_stream(load_documents(DataConfig(path=str(path), streaming=True)), 0.2, count=5)
    trained, kept = [row["text"] for row in training], held_out["text"]
    assert len(kept) == 5
    assert not set(trained) & set(kept)
    assert 60 > len(trained) > 30
    with pytest.raises(DataError, match="data.held_out_fraction=1e-09 holds out no document"):
        split_stream(load_documents(DataConfig(path=str(path), streaming=True)), 1e-9, count=5)


@pytest.mark.parametrize("name", ["broken.jsonl", "latin.jsonl"])
def test_a_malformed_stream_is_refused_by_file_and_line(tmp_path, name):
    content, message = MALFORMED[name]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        split_stream(load_documents(DataConfig(path=str(path), streaming=True)), 0.5, count=5)


def test_suffixes_are_known_in_capitals_too(tmp_path):
    assert read(write(tmp_path / "A.JSONL", '{"text": "row"}\n'))[0]["text"] == "row"


def test_the_errors_tell_data_from_machine():
    assert (DataError.code, MachineError.code) == (3, 6)
    assert json.dumps(DataError("x").reason) == '"data"'


@pytest.mark.parametrize(
    ("text", "ways"),
    [
        ("a", "name other documents"),
        ("abcd" + " " * 6, "name other documents"),
        ("a b" + " ", "set it between 0.5 and 0.5, or name"),
        ("ab" * 40 + " " * 20, "set it between 0.21 and 0.5, or name"),
    ],
)
def test_a_text_too_short_to_divide_is_told_by_which_key_it_could_be(tmp_path, text, ways):
    (tmp_path / "a.txt").write_text(text)
    documents = load_documents(DataConfig(path=str(tmp_path / "a.txt")))
    found = f"too short for data.held_out_fraction=0.01 to divide: {ways}"
    with pytest.raises(DataError, match=re.escape(found)):
        split_documents(documents, 0.01, 5)
    if ways.startswith("set"):
        least = float(ways.split()[3])
        assert all(part["text"][0].strip() for part in split_documents(documents, least, 5))
