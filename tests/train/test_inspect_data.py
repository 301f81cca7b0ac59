"""inspect_data: everything that training would say of the data, and no training."""

import io
import json
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from tests.train.helpers import SMALL, read_json
from train.cli import main
from train.data.prepare import TWEETS_FILE, chatterbot, divide, divide_tweets, tweets, words_of
from train.data.tokenizer import mixtral_tokenizer
from train.inspect_data.verb import _histogram, marked


@pytest.fixture
def chats(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"question {n}"},
                {"role": "assistant", "content": "answer " * (n % 9 + 1)},
            ]
        }
        for n in range(60)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def inspect(folder, *words):
    return main(["inspect_data", *SMALL, "data.chat_template=mixtral", f"run.dir={folder}", *words])


def test_the_figures_are_those_of_the_rows_and_no_model_is_touched(tmp_path, chats, capsys):
    words = [f"data.path={chats}", "data.sequence_length=128", "model.hidden_size=4096", "model.num_hidden_layers=99"]
    assert inspect(tmp_path / "run", *words) == 0  # a model that would not fit
    shown = capsys.readouterr().out
    assert "rows read  60\n" in shown
    assert "trained on  54\n" in shown
    assert "held out  6\n" in shown
    assert "<s>[INST] question 0 [/INST][[ answer </s>]]" in shown
    assert sum(line.count("#") > 0 for line in shown.splitlines()) >= 5
    figures = read_json(tmp_path / "run" / "data.json")
    assert figures["rows read"] == "60"
    assert (tmp_path / "run" / "plots" / "lengths.png").stat().st_size > 5000
    assert read_json(tmp_path / "run" / "exit.json") == {
        "reason": "done",
        "code": 0,
        "message": "the data can be trained on",
    }
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_every_bad_row_is_listed_and_the_code_is_3(tmp_path, chats, capsys):
    with chats.open("a") as file:
        file.write('{"messages": []}\n{"messages": [{"role": "user", "content": "q"}]}\n')
        file.write(
            json.dumps(
                {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "a"}]}
            )
        )
    words = [f"data.path={chats}", "data.sequence_length=128"]
    assert inspect(tmp_path / "run", *words) == 3
    shown = capsys.readouterr()
    for line, problem in [(61, "no messages"), (62, "nothing to train on"), (63, "too long")]:
        assert f"bad row  {chats}:{line}: {problem}" in shown.out
    assert "left out  1 no messages, 1 nothing to train on, 1 too long" in shown.out
    assert (
        "error: 3 bad rows, listed above: mend them, or set data.bad_rows=skip and data.too_long=cut or skip"
        in shown.err
    )
    assert inspect(tmp_path / "run", *words, "data.bad_rows=skip", "data.too_long=skip") == 0
    assert "bad row" not in capsys.readouterr().out


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_texts_and_streams_are_inspected_too(tmp_path, streaming, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"words {n} " * (n + 1)}) + "\n" for n in range(40)))
    words = ["data.tokenizer=mixtral", "model.vocab_size=32000", f"data.streaming={streaming}"]
    assert inspect(tmp_path / "run", f"data.path={path}", *words, "data.held_out_fraction=0.2") == 0
    shown = capsys.readouterr().out
    assert ("of the stream, the first" in shown) == (streaming == "true")
    assert re.search(r"<s>\[\[ ?words \d", shown)


def test_weights_are_shown_as_passes(tmp_path, chats, capsys):
    other = tmp_path / "b.jsonl"
    other.write_text("".join(chats.read_text().replace("question", "query").splitlines(keepends=True)[:20]))
    sources = f"data.sources=[{{path: {chats}, weight: 1}}, {{path: {other}, weight: 3}}]"
    assert inspect(tmp_path / "run", sources, "data.sequence_length=128") == 0
    shown = capsys.readouterr().out
    passes = [float(number) for number in re.findall(r"jsonl  seen ([\d.]+) times an epoch", shown)]
    assert passes[0] < 0.4 < 2 < passes[1]
    assert f"{other}  seen {passes[1]:.2f} times an epoch (weight 3)" in shown


def test_mistakes_of_the_configuration_have_code_2_and_leave_nothing(tmp_path, chats, capsys):
    assert inspect(tmp_path / "run", f"data.path={chats}", "data.fromat=text") == 2
    assert "did you mean data.format?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_module_is_the_verb(tmp_path, chats):
    words = [*SMALL, "data.chat_template=none", f"data.path={chats}", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "train.inspect_data", *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "data.chat_template=none: the data holds chats, and there is no template" in done.stderr


def test_marks_enclose_exactly_what_is_predicted():
    tokenizer = mixtral_tokenizer()
    ids = np.asarray(tokenizer("a question 漢字 and an answer", add_special_tokens=False)["input_ids"])
    trained = np.zeros(len(ids), bool)
    trained[-2:] = True
    assert marked(ids, trained, tokenizer, "<", ">") == "a question 漢字 and< an answer>"
    assert marked(ids, ~trained, tokenizer, "<", ">") == "a< question 漢字 and> an answer"
    assert marked(ids, trained & False, tokenizer, "<", ">") == "a question 漢字 and an answer"


def test_a_histogram_counts_every_document():
    lengths = np.random.default_rng(0).integers(3, 4000, 5000)
    rows = _histogram(lengths).splitlines()[1:]
    assert sum(int(row.split()[3].replace(",", "")) for row in rows) == 5000
    assert len(_histogram(np.asarray([7, 7])).splitlines()) == 2


def test_chatterbot_conversations_become_messages_with_no_question_on_both_sides():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        english = "conversations:\n- ['Are you?', No]\n- [a, b, c]\n- [alone]\n- ['', x]\n"
        files.writestr("c/data/english/a.yml", english)
        files.writestr("c/data/german/a.yml", "conversations:\n- [Bist du?, Nein]\n")
    rows = list(chatterbot(archive.getvalue()))
    assert [[message["content"] for message in row["messages"]] for row in rows] == [["Are you?", "No"], ["a", "b"]]
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
    many = [{"messages": [{"role": "user", "content": f"q{n % 50}"}]} for n in range(300)]
    training, held_out = divide(many)
    assert len(training) + len(held_out) == 300
    questions = [{row["messages"][0]["content"] for row in side} for side in (training, held_out)]
    assert all(questions)
    assert not questions[0] & questions[1]


def test_tweets_keep_their_labels_and_no_two_say_the_same_on_both_sides():
    archive = io.BytesIO()
    rows = [f'negative,1,"no, {n % 2500} \xe9 http://t.co/{n}"' for n in range(3000)]
    rows += ["positive,0.5,RT @someone: No 7 \xe9!", "neutral,1,http://t.co/x", "positive,1,yes"]
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr(TWEETS_FILE, "\n".join(["sentiment,confidence,text", *rows]).encode("latin-1"))
    found = list(tweets(archive.getvalue()))
    assert len(found) == 2501
    assert found[-1] == {"text": "yes", "label": "positive"}
    assert found[0] == {"text": "no, 0 \xe9 http://t.co/0", "label": "negative"}
    training, held_out = divide_tweets(found)
    assert (len(training), len(held_out)) == (501, 2000)
    assert not {words_of(row["text"]) for row in training} & {words_of(row["text"]) for row in held_out}
