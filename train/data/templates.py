"""From documents to samples: token ids, and which of them are trained.

A chat is written by a template, and what of it is trained is found by characters: where the template marks its answers
with {% generation %}, there; else between what it writes of the messages before an answer and of those up to it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from train.config import DataConfig
from train.data.formats import RowError, chat_to_answer, refuse_half_characters
from train.data.tokenizer import document_ids
from train.errors import ConfigError

# Stanford Alpaca's prompts, for where no chat template writes them.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


class Sample(NamedTuple):
    """Token ids, which of them are trained, whether the end was cut off, and what a labelled text is to be told as."""

    ids: np.ndarray
    trained: np.ndarray
    is_cut: bool = False
    target: tuple[float, ...] = ()


class Written(NamedTuple):
    """A sample as text.

    Attributes:
        text: all of it.
        spans: of its characters, those to train.
        by_template: whether a template wrote it, marks such as </s> included; otherwise it gets them as a document.
        mark: a character that was put into marks in the messages, so that they are not taken for the template's.
    """

    text: str
    spans: list[Span]
    by_template: bool
    mark: str = ""


class Encoder:
    """Turns documents into samples.

    Args:
        tokenizer: with its chat template, if it has one.
        data: says how chats are written, what is trained, and how long a sample may be.
        vocab_size: bound on the ids of documents that are tokens already.

    Raises:
        ConfigError: for a tokenizer that does not say which characters a token covers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, vocab_size: int) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(f"data.tokenizer={data.tokenizer}: samples need a tokenizer with a tokenizer.json")
        has_template = data.chat_template != "none" and tokenizer.chat_template is not None
        self.template: str | None = tokenizer.get_chat_template() if has_template else None
        self.marks_answers = self.template is not None and GENERATION.search(self.template) is not None
        self.data, self.vocab_size, self.tokenizer = data, vocab_size, tokenizer
        self._special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = sorted((re.escape(token.content) for token in self._special), key=len, reverse=True)
        self._in_text = re.compile("|".join(longest_first) or "(?!)")
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._aliased: tuple[str, Tokenizer] | None = None

    def described(self) -> list[str]:
        """Lists what its samples depend on besides documents and tokenizer."""
        data = self.data
        options = (data.train_on, data.too_long == "cut", data.sequence_length, self.vocab_size)
        return [*map(str, options), str(self.template), str(self.tokenizer.special_tokens_map)]

    def encode(self, documents: Sequence[Mapping[str, Any]]) -> list[Sample | RowError]:
        """Encodes documents of any format; a `RowError` takes the place of one that cannot be trained on.

        Raises:
            ConfigError: for chats where there is no template.
        """
        result: list[Sample | RowError | None] = [None] * len(documents)
        written: dict[int, Written] = {}
        texts: list[int] = []
        for index, document in enumerate(documents):
            try:
                if document["format"] == "text":
                    texts.append(index)
                elif document["format"] == "tokens":
                    result[index] = self._finished(self._given(json.loads(document["text"])))
                else:
                    written[index] = self._write(document["format"], json.loads(document["text"]))
            except RowError as bad:
                result[index] = bad
        all_ids = document_ids(self.tokenizer, [documents[index]["text"] for index in texts])
        for index, given in zip(texts, all_ids, strict=True):
            result[index] = Sample(np.asarray(given, np.int32), np.ones(len(given), bool))
        for index, (ids, trained) in zip(written, self._tokens(list(written.values())), strict=True):
            try:
                result[index] = self._finished(Sample(ids, trained))
            except RowError as bad:
                result[index] = bad
        return [sample for sample in result if sample is not None]

    def prompt(self, prompt: Any, more: str = "") -> list[int]:
        """Encodes what a model is to go on from: a text, or a chat up to where its next answer begins.

        Args:
            prompt: a text, or a list of messages.
            more: what follows it; where the two join, tokens are those of the whole.

        Returns:
            Token ids, without an end token.

        Raises:
            RowError: for what is neither, what the template refuses, and a text of no token.
        """
        if isinstance(prompt, str):
            refuse_half_characters(prompt + more)
            ids = self._tokens([Written(prompt + more, [], by_template=False)])[0][0][:-1]
            if not len(ids):
                raise RowError("empty prompt", "there is nothing to go on from, since the tokenizer has no begin token")
            return [int(token) for token in ids]
        if not isinstance(prompt, list):
            raise RowError("wrong type", f"the prompt is {prompt!r}, neither a text nor a list of messages")
        if self.template is None:
            raise RowError(
                "no chat template", "the prompt is a list of messages: set data.chat_template, to mixtral or a file"
            )
        messages, mark = [*chat_to_answer(prompt), {"role": "", "content": more}], ""
        for message in messages:
            refuse_half_characters(message["content"])
        if any(self._in_text.search(message["content"]) for message in messages):
            messages, mark = self._marked(messages)
        text = self._render(messages[:-1], prompt=True)[0] + messages[-1]["content"]
        ids = self._tokens([Written(text, [], by_template=True, mark=mark)])[0][0]
        return [int(token) for token in ids]

    def _given(self, sample: dict[str, Any]) -> Sample:
        ids = sample["input_ids"]
        wrong = [token for token in ids if not 0 <= token < self.vocab_size]
        if wrong:
            raise RowError("token out of range", f"{wrong[0]} in 'input_ids'; the model has {self.vocab_size} tokens")
        trained = np.asarray(sample["labels"]) >= 0 if "labels" in sample else np.ones(len(ids), bool)
        return Sample(np.asarray(ids, np.int32), trained)

    def _finished(self, sample: Sample) -> Sample:
        """Applies the bound on the length.

        Raises:
            RowError: for a sample that is too long, or that has nothing to train on.
        """
        ids, trained = sample.ids, sample.trained
        length = self.data.sequence_length
        is_cut = len(ids) > length
        if is_cut and self.data.too_long != "cut":
            fix = "raise it, or set data.too_long=cut or skip"
            raise RowError("too long", f"{len(ids)} tokens, but data.sequence_length={length}: {fix}")
        ids, trained = ids[:length], trained[:length]
        if not trained[1:].any():  # the first is never predicted
            raise RowError(
                "nothing to train on",
                "no answer is left after the cut" if is_cut else "it holds no answer with a weight",
            )
        return Sample(ids, trained, is_cut)

    def _write(self, form: str, sample: dict[str, Any]) -> Written:
        if "messages" in sample:
            return self._chat(sample["messages"])
        if form == "alpaca":
            given = sample["input"]
            if self.template is None:
                prompt = (ALPACA_WITH_INPUT if given.strip() else ALPACA).format(**sample)
            else:
                prompt = "\n\n".join(filter(None, (sample["instruction"], given)))
            sample = {"prompt": prompt, "completion": sample["output"]}
        prompt, answer = sample["prompt"], sample["completion"]
        if self.template is not None:
            return self._chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
        start = len(prompt) if self.data.train_on == "answers" else 0
        return Written(prompt + answer, [(start, len(prompt) + len(answer))], by_template=False)

    def _chat(self, messages: list[dict[str, Any]]) -> Written:
        if self.template is None:
            raise ConfigError(
                f"data.chat_template={self.data.chat_template or 'null'}: the data holds chats, and there is no "
                "template to write them: set it to mixtral, or to a file with one"
            )
        weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
        messages = [{"role": message["role"], "content": message["content"]} for message in messages]
        mark = ""
        if any(self._in_text.search(message["content"]) for message in messages):
            messages, mark = self._marked(messages)
        text, answers = self._answers(messages)
        if len(answers) != len(weights):
            if 0 in weights:
                raise RowError(
                    "chat template", f"it marks {len(answers)} answers of {len(weights)}: leave out 'weight'"
                )
            weights = [1] * len(answers)
        if self.data.train_on == "all":
            ignored = [span for span, weight in zip(answers, weights, strict=True) if not weight]
            edges = [0, *(edge for span in ignored for edge in span), len(text)]
            return Written(text, list(zip(edges[::2], edges[1::2], strict=True)), True, mark)
        return Written(text, [span for span, weight in zip(answers, weights, strict=True) if weight], True, mark)

    def _answers(self, messages: list[dict[str, str]]) -> tuple[str, list[Span]]:
        """Writes a chat, and finds its answers.

        Raises:
            RowError: where the template refuses it, or no answer can be found.
        """
        if self.marks_answers:
            return self._render(messages)
        text, spans = self._render(messages)[0], []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:index], prompt=True)[0]
                with_it = self._render(messages[: index + 1])[0]
                if not (text.startswith(with_it) and with_it.startswith(before)):
                    raise RowError(
                        "chat template",
                        f"what it writes of the first {index + 1} messages does not begin the whole, so the answer "
                        "cannot be found: mark answers with {% generation %}, or set data.train_on=all",
                    )
                spans.append((len(before), len(with_it)))
        return text, spans

    def _render(self, messages: list[dict[str, str]], prompt: bool = False) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template(
                [messages],
                chat_template=self.template,
                return_assistant_tokens_mask=self.marks_answers,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RowError("refused by the chat template", f"{error} (the roles: {roles})") from None
        return texts[0], spans[0] if spans else []

    def _marked(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
        """Puts a character that is not in the messages into every mark, such as </s>, that is."""
        used = {letter for message in messages for letter in message["content"]}
        mark = next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in used)

        def split(found: re.Match[str]) -> str:
            return found[0][0] + mark + found[0][1:]

        return [message | {"content": self._in_text.sub(split, message["content"])} for message in messages], mark

    def _tokens(self, written: list[Written]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokenizes; returns ids and what of them is trained."""
        result: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(written)
        for by_template in (True, False):
            chosen = [i for i, item in enumerate(written) if item.by_template == by_template and not item.mark]
            self._backend.encode_special_tokens = not by_template  # whether a mark in the text is text
            encodings = self._backend.encode_batch([written[i].text for i in chosen], add_special_tokens=False)
            for i, encoding in zip(chosen, encodings, strict=True):
                ids, trained = np.asarray(encoding.ids, np.int32), _overlap(encoding, written[i].spans)
                result[i] = (ids, trained) if by_template else self._between_marks(ids, trained)
        for i, item in enumerate(written):
            if item.mark:
                result[i] = self._marked_tokens(item)
        return [tokens for tokens in result if tokens is not None]

    def _between_marks(self, ids: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        before = [] if begin is None else [begin]
        ids = np.concatenate([before, ids, [end]]).astype(np.int32)
        return ids, np.concatenate([np.zeros(len(before), bool), trained, [True]])

    def _marked_tokens(self, item: Written) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes a chat in whose messages marks are text: the template's get another name for the while."""
        names = {token.content: item.mark + token.content for token in self._special}
        edges = np.asarray(item.spans, np.int64).reshape(-1)
        moved = edges.copy()
        parts, last = [], 0
        for found in re.finditer(f"{self._in_text.pattern}|{item.mark}", item.text):
            new = "" if found[0] == item.mark else names[found[0]]
            parts += [item.text[last : found.start()], new]
            moved[edges >= found.end()] += len(new) - len(found[0])
            last = found.end()
        text = "".join([*parts, item.text[last:]])
        encoding = self._alias(item.mark).encode(text, add_special_tokens=False)
        known = {self._alias(item.mark).token_to_id(alias): name for name, alias in names.items()}
        real = {alias: self.tokenizer.convert_tokens_to_ids(name) for alias, name in known.items()}
        ids = np.asarray([real.get(token, token) for token in encoding.ids], np.int32)
        return ids, _overlap(encoding, [(int(start), int(end)) for start, end in moved.reshape(-1, 2)])

    def _alias(self, mark: str) -> Tokenizer:
        """Returns a tokenizer to which marks are text, and marks after a character are the marks."""
        if self._aliased is None or self._aliased[0] != mark:
            backend = Tokenizer.from_str(self._backend.to_str())
            backend.add_tokens(
                [
                    AddedToken(mark + token.content, normalized=False, lstrip=token.lstrip, rstrip=token.rstrip)
                    for token in self._special
                ]
            )
            backend.encode_special_tokens = True
            self._aliased = mark, backend
        return self._aliased[1]


def _overlap(encoding: Encoding, spans: list[Span]) -> np.ndarray:
    """Says which tokens share a character with a span."""
    places = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    start, end = places[:, 0], np.maximum(places[:, 1], places[:, 0] + 1)
    trained = np.zeros(len(places), bool)
    for first, last in spans:
        trained |= (start < last) & (end > first)
    return trained
