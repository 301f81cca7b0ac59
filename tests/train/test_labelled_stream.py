"""Streams of labelled texts: the samples that are at hand too, in steps of the same make, from any step on."""

import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.train.helpers import metrics, read_json, run_small
from tests.train.test_labelled import labelled, write
from train.config import Config, DataConfig, SourceConfig
from train.data.build import open_documents, pack
from train.data.labelled import WINDOW
from train.data.share import Share
from train.data.tokenizer import open_tokenizer
from train.errors import ConfigError, DataError

NAMES = ["rain", "sun", "wind"]
STREAM = ["data.streaming=true", "data.tokenizer=mixtral", "model.vocab_size=32000", "data.too_long=cut"]
CLASSES = ["data.format=classification", "data.labels=[rain,sun,wind]"]


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer("mixtral", 32_000, None, None)


@pytest.fixture
def config(tmp_path):
    """128 rows to train on, 20 held out, 4 of them a step's: an epoch is four windows."""
    path, held_out = write(tmp_path / "a.jsonl", labelled("classification", 128)), tmp_path / "h.jsonl"
    write(held_out, [{"text": f"held {row['text']}", "label": row["label"]} for row in labelled("classification", 20)])
    config = Config(data=DataConfig(path=str(path), held_out_path=str(held_out), format="classification", labels=NAMES))
    config.data.sequence_length, config.data.shuffle_buffer = 64, 16
    return config


def load(config, tokenizer, *, streaming):
    config.data.streaming = streaming
    return pack(*open_documents(config.data), tokenizer, config)


def taken(data, steps, share, first=0):
    return [tensor for batches in islice(data.steps(share, first), steps) for batch in batches for tensor in batch]


def texts(batches):
    """The rows of batches: their ids and their label."""
    return [
        (tuple(ids[mask].tolist()), int(label))
        for batch in batches
        for ids, label, mask in zip(batch.input_ids, batch.labels, batch.token_mask, strict=True)
    ]


@pytest.mark.parametrize("kind", ["classification", "multi_label", "regression"])
def test_in_their_own_order_a_stream_has_the_batches_that_are_at_hand_on_any_process(config, tokenizer, kind):
    config.data.format, config.data.shuffle = kind, False
    config.data.labels = [] if kind == "regression" else NAMES
    write(open_path(config), labelled(kind, 50))
    write(open_path(config, held_out=True), labelled(kind, 5))
    at_hand, stream = (load(config, tokenizer, streaming=streaming) for streaming in (False, True))
    for rank in range(2):
        share = Share(rank, 2, 2, 2)
        expected = [tensor for step in range(20) for batch in at_hand.rows.step(step, share) for tensor in batch]
        found = taken(stream, 20, share)
        assert len(expected) == 20 * 2 * 4
        assert_same(found, expected)
    held_out = [list(data.evaluation(Share(0, 1, 4))) for data in (at_hand, stream)]
    assert_same(*([tensor for batch in batches for tensor in batch] for batches in held_out))


def assert_same(found, expected):
    """Holds tensors to be equal, NaN too."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def open_path(config, *, held_out=False):
    """The file that a configuration reads."""
    return Path(config.data.held_out_path if held_out else config.data.path)


def test_a_shuffled_stream_sees_each_sample_once_an_epoch_nearly_as_long_as_its_neighbours(config, tokenizer):
    at_hand, stream = (load(config, tokenizer, streaming=streaming) for streaming in (False, True))
    share = Share(0, 1, 4)
    epochs = list(islice(stream.steps(share), 64))
    first, second = (texts(batch for batches in steps for batch in batches) for steps in (epochs[:32], epochs[32:]))
    expected = texts(at_hand.rows.step(step, share)[0] for step in range(32))
    assert Counter(first) == Counter(second) == Counter(expected)
    assert first != second
    of_the_first = [batches[0] for batches in epochs[:32]]
    padded = sum(batch.token_mask.numel() for batch in of_the_first)
    assert sum(int(batch.token_mask.sum()) for batch in of_the_first) / padded > 0.85
    widths = [batch.input_ids.shape[1] for batch in of_the_first[:WINDOW]]
    assert widths != sorted(widths)


def test_the_rows_of_a_streamed_step_do_not_depend_on_how_it_is_split(config, tokenizer):
    stream = load(config, tokenizer, streaming=True)

    def rows(step, *split):
        shares = [Share(rank, *split) for rank in range(split[0])]
        return Counter(row for share in shares for row in texts(next(islice(stream.steps(share), step, None))))

    for step in (0, 9, 20):
        assert rows(step, 2, 2, 2) == rows(step, 4, 1, 2) == rows(step, 1, 8, 1)


@pytest.mark.parametrize("first", [1, WINDOW, WINDOW + 3, 40])
def test_a_stream_goes_on_from_any_step(config, tokenizer, first):
    stream, share = load(config, tokenizer, streaming=True), Share(1, 2, 2)
    expected, found = taken(stream, 50, share)[first * 4 :], taken(stream, 50 - first, share, first)
    assert_same(found, expected)


def test_weights_say_how_much_of_a_labelled_stream_is_of_which_source(config, tokenizer, tmp_path):
    rows = [{"text": "sun " * 3, "label": "sun"}] * 400
    other = write(tmp_path / "b.jsonl", [{"text": "rain", "label": "rain"}] * 100)
    path = write(open_path(config), rows)
    config.data.sources = [SourceConfig(path=str(path), weight=1.0), SourceConfig(path=str(other), weight=3.0)]
    stream = load(config, tokenizer, streaming=True)
    found = Counter(
        label for _, label in texts(b for batches in islice(stream.steps(Share(0, 1, 8)), 60) for b in batches)
    )
    assert 2.2 < found[NAMES.index("rain")] / found[NAMES.index("sun")] < 4


def test_a_stream_holds_out_a_share_that_it_never_trains_on(config, tokenizer):
    config.data.held_out_path, config.data.held_out_fraction, config.data.held_out_documents = None, 0.1, 128
    stream = load(config, tokenizer, streaming=True)
    held_out = set(stream.held_out_documents["text"])
    seen = {
        tokenizer.decode(ids, skip_special_tokens=True)
        for ids, _ in texts(batch for batches in islice(stream.steps(Share(0, 1, 4)), 64) for batch in batches)
    }
    assert 4 < len(held_out) < 30
    assert seen
    assert not held_out & seen


def test_labels_of_a_stream_must_be_named_and_those_at_its_beginning_are(config, tokenizer, tmp_path, capsys):
    config.data.labels = []
    with pytest.raises(ConfigError, match=r"set 'data.labels=\[rain,sun,wind\]', which its first rows have"):
        load(config, tokenizer, streaming=True)
    assert run_small(tmp_path / "run", f"data.path={config.data.path}", *STREAM, CLASSES[0]) == 2
    assert "set 'data.labels=[rain,sun,wind]', which its first rows have" in capsys.readouterr().err
    config.data.format = "regression"
    write(open_path(config), labelled("regression", 40))
    write(open_path(config, held_out=True), labelled("regression", 5))
    assert load(config, tokenizer, streaming=True).labels.names == ("value",)


LABELS = {
    "data.labels=[0,1,2,3,4,5,6,7,8,9,10]": [*range(11)],
    "the labels 1, 2, 3, ... are not the numbers from 0 on": [1, 2, 3],
    'data.labels=["a,b",c]': ["a,b", "c"],
    "named before: set data.labels$": [None],
}


@pytest.mark.parametrize("message", LABELS)
def test_labels_are_proposed_in_the_order_of_their_indices_or_not_at_all(config, tokenizer, message):
    config.data.labels, config.data.bad_rows = [], "skip"
    write(open_path(config), [{"text": "a", "label": label} for label in reversed(LABELS[message])])
    expected = message if message.endswith("$") else re.escape(message)
    with pytest.raises((ConfigError, DataError), match=expected):
        load(config, tokenizer, streaming=True)


@pytest.mark.parametrize("change", [{"label": "wind"}, {"text": "other"}])
def test_a_stream_is_told_from_one_with_other_texts_or_labels(config, tokenizer, change):
    rows = [{"text": f"text {number}", "label": "sun"} for number in range(9)]
    write(open_path(config), rows)
    first = load(config, tokenizer, streaming=True).fingerprint()
    assert load(config, tokenizer, streaming=True).fingerprint() == first
    write(open_path(config), [*rows[:3], rows[3] | change, *rows[4:]])
    assert load(config, tokenizer, streaming=True).fingerprint() != first


BAD = {
    "unknown label": {"text": "a", "label": "fog"},
    "missing column": {"text": "a", "lable": "sun"},
    "too long": {"text": "word " * 200, "label": "sun"},
}


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_row_of_a_stream_stops_the_run_by_file_and_line_or_is_counted(tmp_path, problem, capsys):
    path = write(tmp_path / "a.jsonl", [*labelled("classification", 30), BAD[problem], *labelled("classification", 9)])
    words = [f"data.path={path}", *CLASSES, *STREAM[:-1], "data.shuffle=false", "train.max_steps=2"]
    assert run_small(tmp_path / "run", *words, "data.held_out_fraction=0.3") == 3
    assert f"{path}:31: {problem}: " in capsys.readouterr().err
    words += ["data.bad_rows=skip", "data.too_long=skip", "data.held_out_fraction=0.3"]
    assert run_small(tmp_path / "skipped", *words) == 0
    assert read_json(tmp_path / "skipped" / "summary.json")["left_out"][problem] >= 1


def test_a_stream_of_which_nothing_can_be_used_is_not_read_for_ever(config, tokenizer):
    write(open_path(config), [{"text": f"text {number}", "label": "fog"} for number in range(30)])
    config.data.bad_rows = "skip"
    stream = load(config, tokenizer, streaming=True)
    with pytest.raises(DataError, match=r"nothing of the stream can be trained on \(left out: 30 unknown label\)"):
        next(stream.steps(Share(0, 1, 4)))


def test_a_classifier_learns_from_a_stream(tmp_path):
    path = write(tmp_path / "a.jsonl", labelled("classification", 600))
    words = [f"data.path={path}", *CLASSES, *STREAM, "train.max_steps=40", "train.micro_batch_size=16"]
    assert run_small(tmp_path / "run", *words, "schedule.warmup_steps=4", "optim.lr=5e-3") == 0
    assert metrics(tmp_path / "run")[-1]["eval_accuracy"] > 0.9
    assert read_json(tmp_path / "run" / "export" / "config.json")["label2id"] == {"rain": 0, "sun": 1, "wind": 2}
