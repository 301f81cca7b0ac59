"""Samples: ids as the chat template's own reference gives them, and the loss on the answers alone."""

import functools
import json
import random

import numpy as np
import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from train.config import DataConfig
from train.data.templates import Encoder
from train.data.tokenizer import give_template, mixtral_tokenizer
from train.errors import ConfigError

PIECES = [
    "a",
    " ",
    "\n",
    "[INST]",
    "[/INST]",
    "Why is it?",
    "def f(x):\n    return x",
    "漢字",
    "👩‍🚀",
    "▁",
    " </s>",
    "<s>",
    "<unk>",
    "0.5",
]
CHATML = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{%- if message['role'] == 'assistant' -%}
MARK{{- message['content'] + eos_token + '\\n' -}}KRAM
{%- else -%}{{- message['content'] + '\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""
PLAIN_TEMPLATE = CHATML.replace("MARK", "").replace("KRAM", "")
MARKED_TEMPLATE = CHATML.replace("MARK", "{%- generation -%}").replace("KRAM", "{%- endgeneration -%}")


def chats(count, pieces=PIECES):
    """Random chats that end with an answer, some with a system message."""
    draw = random.Random(1)
    for index in range(count):
        chat = [{"role": "system", "content": draw.choice(pieces)}] if index % 3 == 0 else []
        for turn in range(2 * draw.randint(1, 3)):
            text = "".join(draw.choices(pieces, k=draw.randint(1, 4)))
            chat.append({"role": "assistant" if turn % 2 else "user", "content": text if turn % 2 == 0 else f"{text}."})
        yield chat


def document(form, **sample):
    return {"text": sample["text"] if form == "text" else json.dumps(sample), "format": form}


base_tokenizer = functools.cache(mixtral_tokenizer)


def encoder(template="mixtral", **changes):
    tokenizer = base_tokenizer()  # an encoder keeps the template that it finds
    tokenizer.chat_template = None if template == "mixtral" else template
    give_template(tokenizer, "mixtral" if template == "mixtral" else None)
    return Encoder(tokenizer, DataConfig(**changes), vocab_size=32_000)


@pytest.fixture
def instruct():
    return encoder()


def encode_chats(encoder, chats):
    return encoder.encode([document("messages", messages=chat) for chat in chats])


def test_chat_ids_and_the_trained_ones_are_mistral_commons_also_with_marks_in_the_text(instruct):
    reference = MistralTokenizer.v1()
    pieces = reference.instruct_tokenizer.tokenizer
    types = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    given = list(chats(400))
    assert sum("</s>" in message["content"] for chat in given for message in chat) > 100
    for chat, sample in zip(given, encode_chats(instruct, given), strict=True):
        messages = [types[message["role"]](content=message["content"]) for message in chat]
        prompt = reference.encode_chat_completion(ChatCompletionRequest(messages=messages[:-1])).tokens
        answers = [[*pieces.encode(m["content"], bos=False, eos=False), 2] for m in chat if m["role"] == "assistant"]
        assert sample.ids.tolist() == prompt + answers[-1]
        assert sample.ids[sample.trained].tolist() == [token for answer in answers for token in answer]
        assert (sample.ids == 1).sum() == 1  # the begin token, once
        assert sample.ids[0] == 1


def test_the_mask_is_the_one_of_apply_chat_template(instruct):
    given = list(chats(200, [piece for piece in PIECES if piece not in (" </s>", "<s>", "<unk>")]))
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    found = instruct.tokenizer.apply_chat_template(given, **options)
    for index, sample in enumerate(encode_chats(instruct, given)):
        assert sample.ids.tolist() == found["input_ids"][index]
        assert sample.trained.astype(int).tolist() == found["assistant_masks"][index]


def test_a_template_without_generation_marks_gives_the_same_samples():
    given = list(chats(200))
    marked, plain = (encode_chats(encoder(template), given) for template in (MARKED_TEMPLATE, PLAIN_TEMPLATE))
    for one, other in zip(marked, plain, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.trained, other.trained)
        assert 0 < one.trained.sum() < len(one.ids)


def test_an_answer_that_cannot_be_found_is_refused():
    counting = "{{ messages | length }}" + PLAIN_TEMPLATE
    (bad,) = encode_chats(encoder(counting), [next(chats(1))])
    assert "does not begin the whole, so the answer cannot be found: mark answers with {% generation %}" in str(bad)


@pytest.mark.parametrize("template", ["mixtral", PLAIN_TEMPLATE])
def test_weights_choose_among_the_answers(template):
    chat = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "qarb", strict=True)]
    found = {}
    for weights in [(1, 1), (1, 0), (0, 1), (0, 0)]:
        weighted = [chat[0], chat[1] | {"weight": weights[0]}, chat[2], chat[3] | {"weight": weights[1]}]
        (found[weights],) = encode_chats(encoder(template), [weighted])
    both, first, second = (found[key].trained for key in [(1, 1), (1, 0), (0, 1)])
    assert np.array_equal(both, first | second)
    assert first.any()
    assert second.any()
    assert not (first & second).any()
    assert str(found[0, 0]).startswith("nothing to train on: it holds no answer with a weight")
    everything, but_first = (
        encode_chats(encoder(template, train_on="all"), [[chat[0], chat[1] | {"weight": weight}, *chat[2:]]])[0].trained
        for weight in (1, 0)
    )
    assert everything.all()
    assert np.array_equal(but_first, ~first)


def test_prompts_without_a_template_run_into_their_answer_between_begin_and_end():
    plain = encoder(None)
    (sample,) = plain.encode([document("prompt_completion", prompt="2 + 2 =", completion=" 4 </s>")])
    expected = plain.tokenizer("2 + 2 = 4 </s>", split_special_tokens=True)["input_ids"]
    assert sample.ids.tolist() == [*expected, 2]
    prompt = plain.tokenizer("2 + 2 =")["input_ids"]
    assert sample.trained.tolist() == [False] * len(prompt) + [True] * (len(expected) + 1 - len(prompt))
    (everything,) = encoder(None, train_on="all").encode([document("prompt_completion", prompt="q", completion="a")])
    assert everything.trained[1:].all()


def test_prompts_and_alpaca_are_chats_where_there_is_a_template(instruct):
    chat = [{"role": "user", "content": "do\n\nthis"}, {"role": "assistant", "content": "done"}]
    expected, *found = instruct.encode(
        [
            document("messages", messages=chat),
            document("prompt_completion", prompt="do\n\nthis", completion="done"),
            document("alpaca", instruction="do", input="this", output="done"),
        ]
    )
    for sample in found:
        assert np.array_equal(sample.ids, expected.ids)
        assert np.array_equal(sample.trained, expected.trained)
    (sample,) = encoder("mixtral", chat_template="none").encode(
        [document("alpaca", instruction="do", input="", output="done")]
    )
    text = instruct.tokenizer.decode(sample.ids)
    assert text.endswith("### Instruction:\ndo\n\n### Response:\ndone</s>")
    assert "### Input" not in text


def test_texts_and_tokens_keep_their_ids():
    found = encoder(None).encode(
        [
            document("text", text="Hello"),
            document("tokens", input_ids=[1, 22557, 2]),
            document("tokens", input_ids=[1, 22557, 2], labels=[-100, -100, 2]),
            document("tokens", input_ids=[1, 32_000, 2]),
            document("tokens", input_ids=[7]),
            document("tokens", input_ids=[1, 10**20, 2], labels=[1, 10**20, 2]),
        ]
    )
    assert [sample.ids.tolist() for sample in found[:3]] == [[1, 22557, 2]] * 3
    assert [sample.trained.tolist() for sample in found[:3]] == [[True] * 3] * 2 + [[False, False, True]]
    assert str(found[3]).startswith("token out of range: 32000 in 'input_ids'; the model has 32000 tokens")
    assert str(found[4]).startswith("nothing to train on")
    assert str(found[5]).startswith(f"token out of range: {10**20} in 'input_ids'")


def test_a_sample_longer_than_a_row_is_refused_or_cut():
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 30}]
    late = [{"role": "user", "content": "word " * 30}, {"role": "assistant", "content": "a"}]
    whole = encode_chats(encoder(), [chat])[0]
    error, cut = (encoder(too_long=policy, sequence_length=16) for policy in ("error", "cut"))
    assert str(encode_chats(error, [chat])[0]).startswith(
        f"too long: {len(whole.ids)} tokens, but data.sequence_length=16: raise it, or set data.too_long=cut or skip"
    )
    first, second = encode_chats(cut, [chat, late])
    assert first.ids.tolist() == whole.ids[:16].tolist()
    assert first.is_cut
    assert not whole.is_cut
    assert str(second) == "nothing to train on: no answer is left after the cut"


def test_chats_without_a_template_are_a_mistake_of_the_configuration():
    for template, choice in [(None, None), ("mixtral", "none")]:
        with pytest.raises(ConfigError, match="data.chat_template=(null|none): the data holds chats"):
            encode_chats(encoder(template, chat_template=choice), [next(chats(1))])


def test_a_template_can_come_from_a_file_and_a_broken_one_is_named(tmp_path):
    tokenizer = base_tokenizer()
    (tmp_path / "good.jinja").write_text(PLAIN_TEMPLATE)
    give_template(tokenizer, str(tmp_path / "good.jinja"))
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    (tmp_path / "bad.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match="bad.jinja: no template that can be read"):
        give_template(tokenizer, str(tmp_path / "bad.jinja"))
