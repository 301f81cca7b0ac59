"""Tokenizers: Mixtral's own against sentencepiece, the trained one against the text itself."""

import importlib.resources
import random
import subprocess
import sys

import pytest
from datasets import Dataset
from jinja2 import TemplateError
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from train.config import DataConfig
from train.data.sources import load_documents
from train.data.tokenizer import (
    add_instruct_template,
    document_ids,
    mixtral_tokenizer,
    open_tokenizer,
    sentencepiece_tokenizer,
    train_bpe,
)
from train.errors import CheckpointError, ConfigError, MachineError

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
    documents = load_documents(DataConfig(path="python_stdlib"))
    return documents.select(range(0, len(documents), len(documents) // 20))  # a Python may come with fewer sources


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


DAMAGED = {
    "no tokenizer": ("tokenizer.json", lambda whole: b"{}"),
    "no object": ("tokenizer.json", lambda whole: b"[]"),
    "no model": ("tokenizer.json", lambda whole: b'{"added_tokens": [], "model": {"type": "Other"}}'),
    "cut": ("tokenizer.json", lambda whole: whole[: len(whole) // 2]),
    "cut settings": ("tokenizer_config.json", lambda whole: whole[: len(whole) // 2]),
    "no UTF-8": ("tokenizer.json", lambda whole: b"\xff\xfe"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_of_a_tokenizers_folder_is_named(tmp_path, corpus, case):
    name, damage = DAMAGED[case]
    train_bpe(corpus, 300).save_pretrained(tmp_path)
    open_tokenizer(str(tmp_path), 300)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(CheckpointError, match=rf"^{tmp_path / name}: no tokenizer that can be read"):
        open_tokenizer(str(tmp_path), 300)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}: no tokenizer that can be read"):
        open_tokenizer(str(tmp_path), 300)


@pytest.fixture(scope="module")
def instruct():
    tokenizer = mixtral_tokenizer()
    add_instruct_template(tokenizer)
    return tokenizer


def conversations(count):
    """Random chats of pieces of text that tokenizers trip over, without the marks that a template cannot carry."""
    rng = random.Random(0)
    pieces = [text for text in AWKWARD if text and "<s>" not in text]
    pieces += ["a", " ", "\n", "[INST]", "[/INST]", "Why is the sky blue?", "def f(x):\n    return x", "0.5", "▁", "ß"]
    messages = {"user": UserMessage, "assistant": AssistantMessage}
    for index in range(count):
        chat = [SystemMessage(content=rng.choice(pieces))] if index % 3 == 0 else []
        for turn in range(2 * rng.randint(0, 3) + 1):
            text = "".join(rng.choices(pieces, k=rng.randint(1, 3)))
            chat.append(messages["assistant" if turn % 2 else "user"](content=text))
        yield chat


def test_the_instruct_template_gives_the_ids_of_mistral_common(instruct):
    reference = MistralTokenizer.v1()
    for chat in conversations(1000):
        expected = reference.encode_chat_completion(ChatCompletionRequest(messages=chat)).tokens
        found = instruct.apply_chat_template([{"role": m.role, "content": m.content} for m in chat])
        assert found["input_ids"] == expected, chat


def test_the_assistant_mask_covers_each_answer_and_its_end_and_nothing_else(instruct):
    pieces = MistralTokenizer.v1().instruct_tokenizer.tokenizer
    for chat in conversations(300):
        messages = [{"role": m.role, "content": m.content} for m in chat]
        messages.append({"role": "assistant", "content": "  an answer\n"})
        found = instruct.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        trained = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert trained == [token for text in answers for token in [*pieces.encode(text, bos=False, eos=False), 2]]


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["system", "assistant"], ["user", "system"]])
def test_roles_out_of_order_are_refused(instruct, roles):
    with pytest.raises(TemplateError, match="roles must be user, assistant, user"):
        instruct.apply_chat_template([{"role": role, "content": "x"} for role in roles])


def test_a_base_model_has_no_chat_template_and_an_instruct_one_is_reloaded_exactly(mixtral, instruct, tmp_path):
    assert mixtral.chat_template is None
    instruct.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == instruct.chat_template
    for chat in conversations(50):
        messages = [{"role": m.role, "content": m.content} for m in chat]
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        assert again.apply_chat_template(messages, **options) == instruct.apply_chat_template(messages, **options)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_later_releases_tokenizers_are_built_id_for_id_and_refuse_the_first_ones_template(corpus, version):
    folder = importlib.resources.files("mistral_common") / "data"
    (path,) = [path for path in folder.iterdir() if path.name.endswith(f".model.{version}")]
    tokenizer = sentencepiece_tokenizer(path.read_bytes())
    pieces = SentencePieceProcessor(model_proto=path.read_bytes())
    assert len(tokenizer) == 32768
    texts = [*AWKWARD, *(text[:500] for text in corpus["text"])]
    for text, ids in zip(texts, document_ids(tokenizer, texts), strict=True):
        assert ids == [1, *pieces.encode(text), 2], text
    assert tokenizer.convert_tokens_to_ids("[INST]") == pieces.piece_to_id("[INST]") == 3
    assert 3 in tokenizer.all_special_ids or "[INST]" in tokenizer.get_added_vocab()
    with pytest.raises(ConfigError, match=r"has a token \[INST\]"):
        add_instruct_template(tokenizer)


def test_a_file_that_is_no_sentencepiece_model_is_refused():
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        sentencepiece_tokenizer(b"nothing of the kind")
