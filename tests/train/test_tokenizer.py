"""Tokenizers: Mixtral's own against sentencepiece, the trained one against the text itself."""

import importlib.resources
import subprocess
import sys

import pytest
from datasets import Dataset
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from train.config import DataConfig
from train.data.sources import load_documents
from train.data.tokenizer import document_ids, mixtral_tokenizer, open_tokenizer, train_bpe
from train.errors import ConfigError, MachineError

AWKWARD = [
    "Hello world, Mixtral!",
    " leading space",
    "trailing space ",
    "two  spaces   three",
    "tab\tnewline\n\nend\n",
    "naïve café — “quotes”",
    "漢字かな交じり文",
    "👩‍🚀🇪🇸 emoji",
    "<s> </s> <unk> are text? [INST]",
    "\x00\x7f control",
    "▁ the mark itself",
    "",
]


@pytest.fixture(scope="module")
def mixtral():
    return mixtral_tokenizer()


@pytest.fixture(scope="module")
def corpus():
    return load_documents(DataConfig(path="python_stdlib")).select(range(0, 800, 40))


def test_mixtral_ids_equal_sentencepiece_on_code_prose_and_scripts(mixtral, corpus):
    model = importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    pieces = SentencePieceProcessor(model_proto=model.read_bytes())
    chunks = [text[start : start + 500] for text in corpus["text"] for start in range(0, len(text), 500)]
    texts = [*AWKWARD, *chunks]
    assert len(texts) > 300
    for text, ids in zip(texts, document_ids(mixtral, texts), strict=True):
        assert ids == [1, *pieces.encode(text), 2], text


def test_mixtral_ids_are_the_published_ones(mixtral):
    expected = [22557, 1526, 28725, 19630, 434, 282, 28808]
    assert mixtral("Hello world, Mixtral!", add_special_tokens=False)["input_ids"] == expected
    assert mixtral("Hello world, Mixtral!")["input_ids"] == [1, *expected]
    assert len(mixtral) == 32000


@pytest.mark.parametrize("kind", ["mixtral", "trained"])
def test_a_saved_tokenizer_is_reloaded_exactly(tmp_path, mixtral, corpus, kind):
    tokenizer = mixtral if kind == "mixtral" else train_bpe(corpus, 400)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')  # as in an export
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(AWKWARD)["input_ids"] == tokenizer(AWKWARD)["input_ids"]
    assert (again.bos_token_id, again.eos_token_id) == (1, 2)


def test_a_trained_tokenizer_gives_every_text_back(corpus):
    tokenizer = train_bpe(corpus, 400)
    assert len(tokenizer) == 400
    for text in [*AWKWARD, corpus["text"][0]]:
        begin, *ids, end = document_ids(tokenizer, [text])[0]
        assert (begin, end) == (1, 2)
        assert not {0, 1, 2} & set(ids)  # marks in a text are text
        assert tokenizer.decode(ids) == text


def test_documents_begin_and_end_with_their_marks(mixtral):
    assert document_ids(mixtral, ["Hello", ""]) == [[1, 22557, 2], [1, 2]]


def test_training_twice_gives_the_same_tokenizer(corpus):
    first, second = (train_bpe(corpus, 600).get_vocab() for _ in range(2))
    assert first == second


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="data.tokenizer=mixtral has 32000 tokens.*model.vocab_size=32000 or more"):
        open_tokenizer("mixtral", 4096)
    gaps = Tokenizer(WordLevel({"<unk>": 0, "a": 500}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=gaps, eos_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has 501 tokens"):
        open_tokenizer(str(tmp_path), 10)
    with pytest.raises(ConfigError, match="model.vocab_size=200.*needs 259"):
        open_tokenizer("train_bpe", 200, Dataset.from_dict({"text": ["a"]}))


def test_a_tokenizer_that_is_nowhere_is_named():
    code = (
        "from train.data.tokenizer import open_tokenizer\n"
        "from train.errors import MachineError\n"
        "try: open_tokenizer('nobody/nothing', 100)\n"
        "except MachineError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "data.tokenizer=nobody/nothing: no such folder, and not to be had from the hub" in done.stdout, done.stderr
    assert MachineError.code == 6
