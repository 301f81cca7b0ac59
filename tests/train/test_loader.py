"""From recipes' data to rows: cached, by one process or several, at hand or as a stream."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import disable_progress_bars

from tests.train.helpers import write_corpus
from tests.train.test_sources import first_batch_of
from train.config import Config, SourceConfig
from train.data.build import open_documents, pack
from train.data.share import Share
from train.data.sources import load_documents
from train.data.templates import Encoder
from train.data.tokenized import encode, tokenize
from train.data.tokenizer import open_tokenizer
from train.errors import DataError


def write_chats(path, count, word):
    rows = [
        [{"role": "user", "content": f"{word} {n}"}, {"role": "assistant", "content": f"{word} " * (n % 7 + 1)}]
        for n in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path):
    disable_progress_bars()
    config = Config()
    config.data.path = write_chats(tmp_path / "a.jsonl", 80, "wind")
    config.data.chat_template, config.data.sequence_length, config.train.epochs = "mixtral", 64, 1
    config.data.held_out_fraction, config.model.vocab_size = 0.1, 300
    return config


def load(config, tokenizer=None):
    training, held_out = open_documents(config.data)
    if tokenizer is None:
        tokenizer = open_tokenizer("train_bpe", 300, training, config.data.chat_template)
    return pack(training, held_out, tokenizer, config), tokenizer


def rows_of(data):
    return [data.rows[index] for index in range(len(data.rows))]


def equal(these, others):
    return len(these) == len(others) and all(
        np.array_equal(mine, other)
        for row, twin in zip(these, others, strict=True)
        for mine, other in zip(row, twin, strict=True)
    )


def test_a_second_look_finds_the_first_ones_work_and_a_changed_key_does_not(config, monkeypatch):
    data, tokenizer = load(config)
    calls = []
    real = Encoder.encode

    def counted(self, documents):
        calls.append(len(documents))
        return real(self, documents)

    monkeypatch.setattr(Encoder, "encode", counted)
    again, _ = load(config, tokenizer)
    assert not calls
    assert equal(rows_of(data), rows_of(again))
    config.data.train_on = "all"
    everything, _ = load(config, tokenizer)
    assert sum(calls) == 80
    assert everything.counts.trained_tokens > data.counts.trained_tokens


@pytest.mark.parametrize("form", ["chats", "texts"])
def test_tokens_that_a_death_cut_off_in_the_cache_are_made_anew(config, tmp_path, form):
    """Cut between batches, their file is read without an error, as if it had fewer rows."""
    corpus = write_corpus(tmp_path / "texts.jsonl", 1500)
    config.data.path = str(corpus) if form == "texts" else write_chats(tmp_path / "many.jsonl", 1500, "valley")
    documents, tokenizer = load_documents(config.data), open_tokenizer("mixtral", 32_000, None, "mixtral")

    def tokenized():
        if form == "texts":
            return tokenize(documents, tokenizer)
        return encode(documents, Encoder(tokenizer, config.data, 32_000))

    cached = Path(tokenized().cache_files[0]["filename"])
    whole = cached.read_bytes()
    for left in (whole[: len(whole) // 2], first_batch_of(cached)):
        cached.write_bytes(left)
        assert len(tokenized()) == 1500
        assert cached.read_bytes() == whole


def test_several_processes_tokenize_what_one_does(config, tmp_path):
    config.data.path = write_chats(tmp_path / "many.jsonl", 600, "valley")
    data, tokenizer = load(config)
    config.data.workers = 2
    (tmp_path / "many.jsonl").touch()  # as if it were new
    assert equal(rows_of(data), rows_of(load(config, tokenizer)[0]))


def test_a_stream_trains_on_the_samples_that_are_at_hand(config):
    _, tokenizer = load(config)
    config.data.shuffle = False
    config.data.streaming, config.data.packing_window = True, 10
    config.data.held_out_documents = 80
    stream, _ = load(config, tokenizer)
    held_out = set(stream.held_out_documents["text"])
    taken = list(itertools.islice(stream.steps(Share(0, 1, 1)), 40))
    texts = {tokenizer.decode(batch[0].input_ids[0][batch[0].token_mask[0]]) for batch in taken}
    assert held_out
    assert not any(json.loads(text)["messages"][0]["content"] + " [/INST]" in row for text in held_out for row in texts)
    assert all((batch[0].shifted_labels >= 0).any() for batch in taken)
    assert str(stream).startswith("a stream of documents")


def test_weights_mix_a_stream_and_rows_at_hand_alike(config, tmp_path):
    other = write_chats(tmp_path / "b.jsonl", 400, "expert")
    config.data.sources = [SourceConfig(path=config.data.path, weight=3.0), SourceConfig(path=other, weight=1.0)]
    config.data.packing_window = 200
    for streaming in (False, True):
        config.data.streaming = streaming
        data, tokenizer = load(config, open_tokenizer("mixtral", 32_000, None, "mixtral"))
        ids = [tokenizer.convert_tokens_to_ids(f"▁{word}") for word in ("wind", "expert")]
        batches = itertools.islice(data.steps(Share(0, 1, 4)), 25)
        rows = np.concatenate([batch[0].input_ids.numpy() for batch in batches])
        wind, expert = (int((rows == token).sum()) for token in ids)
        assert 2 < wind / expert < 4.5
    with_text = tmp_path / "c.jsonl"
    with_text.write_text('{"text": "' + "long " * 300 + '"}\n')
    config.data.streaming = False
    config.data.sources = [SourceConfig(path=config.data.path), SourceConfig(path=str(with_text))]
    data, _ = load(config, tokenizer)
    assert max(data.lengths) > config.data.sequence_length  # divided, and no error
    assert data.counts.tokens == data.lengths.sum()


def test_chats_after_many_texts_of_a_stream_are_samples_too(config, tmp_path):
    texts, kept = (write_corpus(tmp_path / f"{name}.jsonl", 150) for name in ("texts", "kept"))
    config.data.sources = [SourceConfig(path=str(texts)), SourceConfig(path=config.data.path)]
    config.data.held_out_path, config.data.streaming, config.data.shuffle = str(kept), True, False
    config.data.packing_window = 10
    data, tokenizer = load(config, open_tokenizer("mixtral", 32_000, None, "mixtral"))
    steps = itertools.islice(data.steps(Share(0, 1, 1)), len(data.held_out) + 20)
    rows = [tokenizer.decode(batch[0].input_ids[0][batch[0].token_mask[0]]) for batch in steps]
    assert any("[INST] wind" in row for row in rows)
    assert not any('"messages"' in row for row in rows)


def test_a_stream_of_texts_refuses_a_sample_by_its_place(config, tmp_path):
    kept = write_corpus(tmp_path / "kept.jsonl", 20)
    tokenizer = open_tokenizer("mixtral", 32_000, None, "mixtral")
    config.data.held_out_path, config.data.streaming, config.data.shuffle = str(kept), True, False
    config.data.sources = [SourceConfig(path=str(kept)), SourceConfig(path=config.data.path)]
    training, held_out = open_documents(config.data)
    config.data.sources = config.data.sources[:1]
    stream = pack(training, held_out, tokenizer, config)
    with pytest.raises(DataError, match="a.jsonl:1: it is of data.format=messages, and the stream holds texts"):
        list(itertools.islice(stream.steps(Share(0, 1, 1)), 40))


def test_packing_can_be_left_out(config):
    packed, tokenizer = load(config)
    config.data.packing = False
    padded, _ = load(config, tokenizer)
    assert len(padded.rows) == padded.counts.documents > len(packed.rows)
    assert padded.counts.trained_tokens == packed.counts.trained_tokens
    assert padded.counts.fullness < 0.8 < packed.counts.fullness


def test_when_nothing_can_be_trained_on_the_first_reason_is_said(config):
    config.data.sequence_length, config.data.too_long = 4, "skip"
    with pytest.raises(DataError, match=r"no held-out sample can be used: the first is .*a.jsonl:\d+: too long"):
        load(config)
