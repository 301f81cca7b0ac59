"""Formats: what a row is recognised as, what is made of it, and what is refused by file and line."""

import json
import tracemalloc
from collections import Counter

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from tests.train.helpers import read_json, run_small
from train.config import DataConfig, SourceConfig
from train.data.build import open_documents
from train.data.formats import as_row, texts_of
from train.data.problems import Problems, refuse
from train.data.sources import as_dataset, load_documents
from train.errors import DataError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS = {  # a row as it is found, and the form it is given
    "text": ({"text": "some words"}, {"text": "some words"}),
    "messages": ({"messages": CHAT, "id": 7}, {"messages": CHAT}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0.0}]},
        {"messages": [CHAT[0], CHAT[1] | {"weight": 0}]},
    ),
    "prompt_completion": ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}),
    "alpaca": ({"instruction": "q", "output": "a"}, {"instruction": "q", "input": "", "output": "a"}),
    "tokens": ({"input_ids": [1, 5, 2], "labels": [-100, 5, 2]}, {"input_ids": [1, 5, 2], "labels": [-100, 5, 2]}),
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, **changes):
    return list(load_documents(DataConfig(path=str(path), **changes)))


def content(document):
    row = as_row(document)
    del row["source"]
    return row


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_recognised_by_its_columns_and_can_be_read_again(tmp_path, name, streaming):
    given, expected = ROWS[name]
    for form in ("auto", name):
        (document,) = read(write_rows(tmp_path / "a.jsonl", [given]), format=form, streaming=streaming)
        assert content(document) == expected
    again = read(write_rows(tmp_path / "b.jsonl", [as_row(document)]), streaming=streaming)
    assert [content(row) for row in again] == [expected]


def test_columns_and_message_keys_may_have_other_names(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    columns = {"prompt": "question", "completion": "answer"}
    assert content(read(path, columns=columns)[0]) == {"prompt": "q", "completion": "a"}
    path = write_rows(
        tmp_path / "b.jsonl", [{"turns": [{"who": "user", "says": "q"}, {"who": "assistant", "says": "a"}]}]
    )
    columns = {"messages": "turns", "role": "who", "content": "says"}
    assert content(read(path, columns=columns)[0]) == {"messages": CHAT}


def test_conversations_may_hold_roles_and_a_completion_may_be_messages(tmp_path):
    assert content(read(write_rows(tmp_path / "a.jsonl", [{"conversations": CHAT}]))[0]) == {"messages": CHAT}
    row = {"prompt": [*CHAT, CHAT[0]], "completion": [CHAT[1]]}
    (document,) = read(write_rows(tmp_path / "b.jsonl", [row]))
    assert content(document) == {"messages": [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT]}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "saved"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    rows = [{"prompt": "a, b", "completion": 'two\nlines "quoted"'}, {"prompt": "q", "completion": "é"}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif suffix == "jsonl":
        write_rows(path, rows)
    elif suffix == "csv":
        path.write_text('prompt,completion\n"a, b","two\nlines ""quoted"""\nq,é\n')
    elif suffix == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        Dataset.from_list(rows).save_to_disk(path)
    for streaming in (False, True):
        found = read(path, streaming=streaming)
        assert [content(document) for document in found] == rows
    lines = {"json": (2, 6), "jsonl": (1, 2), "csv": (2, 4), "parquet": (1, 2), "saved": (0, 1)}[suffix]
    assert [document["source"] for document in found] == [f"{path}:{line}" for line in lines]


def chat(*messages):
    return {"messages": [dict(zip(("role", "content", "weight"), message, strict=False)) for message in messages]}


USER, ANSWER = ("user", "q"), ("assistant", "a")
BAD = {  # the second row of a file, and what is said of it
    "missing column": ({"prompt": "q"}, "missing column: no 'messages'; it has prompt; mend the row, or name"),
    "no list": ({"messages": "q"}, "wrong type: 'messages' holds str, not a list"),
    "null": ({"messages": None}, "wrong type: 'messages' holds null, not a list"),
    "no messages": ({"messages": []}, "no messages"),
    "no object": ({"messages": ["q"]}, "wrong type: message 1 is str, not an object"),
    "missing key": ({"messages": [{"role": "user"}]}, "missing key: message 1 has no 'content'; it has role"),
    "other schema": (
        {"messages": [{"from": "human", "value": "q"}]},
        "missing key: message 1 has no 'role'; it has from, value; name it in data.columns",
    ),
    "number": (chat(("user", 3)), "wrong type: 'content' of message 1 holds int, not text"),
    "unknown role": (chat(("boss", "q")), "unknown role: 'boss' in message 1: expected human, user"),
    "late system": (chat(USER, ("system", "s"), ANSWER), "wrong role order: message 2 is from system"),
    "empty answer": (chat(USER, ("assistant", " ")), "empty answer: message 2, from assistant, is empty"),
    "half a weight": (chat(USER, ("assistant", "a", 0.5)), "wrong type: 'weight' of message 2 is 0.5, neither 0 nor 1"),
    "weight of a question": (chat(("user", "q", 1), ANSWER), "wrong weight: message 1 from user has weight 1"),
    "tool calls": ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "tool calls: message 1"),
    "no row": ([1], "wrong type: expected an object with columns, found list"),
    "surrogate": (chat(USER, ("assistant", "\ud800")), "half a character"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path, name, streaming):
    row, message = BAD[name]
    path = write_rows(tmp_path / "a.jsonl", [chat(USER, ANSWER), row])
    with pytest.raises(DataError) as caught:
        read(path, streaming=streaming)
    assert str(caught.value).startswith(f"{path}:2: {message}")


OTHER_BAD = {
    "completion": (
        [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""}],
        "empty answer: 'completion'",
    ),
    "output": (
        [{"instruction": "q", "output": "a"}, {"instruction": "q", "output": "\n"}],
        "empty answer: 'output' is",
    ),
    "input": (
        [{"instruction": "q", "output": "a"}, {"instruction": "q", "output": "a", "input": 3}],
        "wrong type: 'input'",
    ),
    "ids": ([{"input_ids": [1, 2]}, {"input_ids": [1, "2"]}], "wrong type: 'input_ids' holds what is no whole number"),
    "labels": ([{"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [2, -100]}], "wrong labels: 'labels' must be"),
    "half a column's name": ([{"text": "a"}, {"\ud800": "a"}], r"missing column: no 'text'; it has \\ud800"),
}
LABELS_BAD = {
    "half a label": ("classification", "\ud83d", "half a character"),
    "half a label of several": ("multi_label", ["a", "\ud83d"], "half a character"),
    "a long number": ("regression", 10**400, "not a number: 'label' is inf"),
    "a long number below 0": ("regression", -(10**400), "not a number: 'label' is inf"),
}


@pytest.mark.parametrize("name", OTHER_BAD)
def test_other_formats_refuse_theirs(tmp_path, name):
    rows, message = OTHER_BAD[name]
    with pytest.raises(DataError, match=f"a.jsonl:2: {message}"):
        read(write_rows(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", LABELS_BAD)
def test_labels_that_cannot_be_kept_are_refused(tmp_path, name, streaming):
    form, label, message = LABELS_BAD[name]
    column = "labels" if form == "multi_label" else "label"
    good = {"classification": "a", "multi_label": ["a"], "regression": 10**300}[form]
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a", column: good}, {"text": "b", column: label}])
    with pytest.raises(DataError, match=f"a.jsonl:2: {message}"):
        read(path, format=form, streaming=streaming)
    kept, left_out = read(path, format=form, streaming=streaming, bad_rows="skip")
    assert kept["problem"] is None
    assert left_out["problem"].startswith(message)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.csv", b"prompt,completion\nq,a\nq\n", "a.csv:3: wrong number of cells: 1, and the header names 2"),
        ("a.csv", b"prompt,completion\nq,a,b\n", "a.csv:2: wrong number of cells: 3, and the header names 2"),
        ("a.csv", b"prompt,completion\nq,\xe9\n", "a.csv:2: not UTF-8"),
        ("a.json", b'[{"text": "a"},\n {"text": ]', "a.json:2: not JSON: Expecting value at column 11"),
        ("a.json", b'[{"text": "a"}\n {"text": "b"}]', "a.json:2: not JSON: Expecting ',' or ']'"),
        ("a.json", b'[{"text": "a"}', "a.json:1: not JSON"),
        ("a.parquet", b"PAR1", "a.parquet: not a readable Parquet file"),
        ("a.jsonl", b'{"body": "a", "n": 1}', "a.jsonl:1: it has the columns body, n, but 'text' is not among them"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, raw, message):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(DataError) as caught:
        read(path)
    assert message in str(caught.value)


def test_bad_rows_are_left_out_and_counted_by_choice(tmp_path):
    rows = [chat(USER, ("assistant", f"a{index}")) for index in range(20)] + [row for row, _ in BAD.values()]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        DataError, match=r"a.jsonl:21: missing column.*\(bad rows: 6 wrong type, 2 missing key, .*bad_rows=skip"
    ):
        read(path)
    config = DataConfig(path=str(path), bad_rows="skip")
    found = list(Problems((load_documents(config),)))
    assert len(found) == len(BAD)
    assert [place for place, _ in found] == [f"{path}:{line}" for line in range(21, 21 + len(BAD))]
    training, held_out = open_documents(config)
    assert not Problems((held_out,)).kinds
    assert len(training) + len(held_out) == len(rows)


def test_blank_texts_are_counted_and_no_error(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": " "}, {"text": "b"}])
    assert list(Problems((load_documents(DataConfig(path=str(path))),))) == [
        (f"{path}:2", "blank text: 'text' holds nothing")
    ]


def test_several_sources_keep_their_own_format_and_number(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"q": "1", "a": "2"}])
    write_rows(tmp_path / "b.jsonl", [{"text": "b"}])
    sources = [
        SourceConfig(path=str(tmp_path / "a.jsonl"), columns={"prompt": "q", "completion": "a"}),
        SourceConfig(path=str(tmp_path / "b.jsonl")),
    ]
    found = list(load_documents(DataConfig(path=None, sources=sources)))
    assert [(row["format"], row["part"]) for row in found] == [("prompt_completion", 0), ("text", 1)]
    assert [text for row in found for text in texts_of(row)] == ["1", "2", "b"]


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_documents_may_have_a_file_of_their_own(tmp_path, streaming):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    kept = write_rows(tmp_path / "b.jsonl", [{"text": "c"}])
    config = DataConfig(path=str(path), held_out_path=str(kept), streaming=streaming)
    training, held_out = open_documents(config)
    assert [row["text"] for row in training] == ["a", "b"]
    assert held_out["text"][:] == ["c"]


def test_a_run_with_bad_rows_ends_with_code_3_before_its_first_step(tmp_path, capsys):
    rows = [chat(USER, ("assistant", f"a{index}")) for index in range(30)] + [chat(ANSWER, USER)]
    words = [f"data.path={write_rows(tmp_path / 'a.jsonl', rows)}", "data.chat_template=mixtral"]
    assert run_small(tmp_path / "run", *words) == 3
    assert "a.jsonl:31: refused by the chat template: after an optional system message" in capsys.readouterr().err
    assert read_json(tmp_path / "run" / "exit.json")["code"] == 3
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert run_small(tmp_path / "run", *words, "data.bad_rows=skip", "data.sequence_length=64") == 0
    assert "left out: 1 refused by the chat template" in capsys.readouterr().out
    assert read_json(tmp_path / "run" / "summary.json")["left_out"] == {"refused by the chat template": 1}


def test_problems_are_counted_and_listed_where_they_lie(tmp_path):
    rows = [chat(USER, ("assistant", f"a{index}")) for index in range(20)] + [row for row, _ in BAD.values()] * 3
    config = DataConfig(path=str(write_rows(tmp_path / "a.jsonl", rows)), bad_rows="skip")
    documents = load_documents(config)
    for some in (documents, documents.select(range(10, 30)), documents.shuffle(seed=1)):
        listed = [(row["source"], row["problem"]) for row in some if row["problem"] is not None]
        kinds = Counter(problem.partition(":")[0] for _, problem in listed)
        problems = Problems((some,)) + Problems() + Problems((some,))
        assert list(problems) == listed * 2
        assert list(problems.kinds.items()) == [(kind, 2 * count) for kind, count in kinds.items()]
        wanted = ["wrong type", "no messages"]
        assert list(Problems((some,)).of(wanted)) == [one for one in listed if one[1].partition(":")[0] in wanted]


def test_many_blank_texts_are_no_list_of_problems():
    common = {"label": None, "format": "text", "problem": "blank text: 'text' holds nothing", "part": 0, "hash": 0}
    documents = as_dataset([common | {"text": "", "source": f"a.jsonl:{line}"} for line in range(50_000)])
    tracemalloc.start()
    try:
        refuse(Problems((documents,)), DataConfig())
        assert Problems((documents,)).kinds == {"blank text": 50_000}
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
