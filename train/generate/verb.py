"""`cierzo generate`: writes what follows a prompt as it comes, or what follows the prompts of a file, or chats."""

import functools
import sys
import time
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from train.config import Config
from train.data.formats import RowError
from train.data.share import Share
from train.data.templates import Encoder
from train.data.tokenizer import open_tokenizer
from train.errors import ConfigError
from train.folder import RunFolder
from train.generate.asked import Asked, Results, ask, read_prompts, show
from train.generate.writing import Pieces, Sampling, Streamed, end_marks, write
from train.lora import hold_model
from train.model import find_weights
from train.parallel.engine import Engine

SORTED_BATCHES = 16  # prompts of so many batches are sorted by length, and their results written together


@dataclass(frozen=True)
class Writer:
    """A model that writes.

    Attributes:
        engine: holds it.
        encoder: encodes prompts.
        sampling: how tokens are drawn.
        ends: tokens that end a text.
        max_new_tokens: bound on the tokens of a text.
    """

    engine: Engine
    encoder: Encoder
    sampling: Sampling
    ends: list[int]
    max_new_tokens: int

    def stream(self, asked: Asked, number: int = 0) -> dict[str, Any]:
        """Shows what follows a prompt as it comes, on the main process; all of them write the same.

        Returns:
            The result, see `result`.
        """
        streamed = Streamed(self._pieces(asked), show) if self.engine.is_main else None
        (tokens,) = self._write([asked], [number], streamed)
        if self.engine.is_main:
            show("\n")
        return self.result(asked, tokens)

    def batch(self, asked: list[Asked], numbers: list[int]) -> dict[int, dict[str, Any]]:
        """Gives the results of those prompts of a list that have these numbers; with none, it writes along in vain."""
        written = self._write([asked[number] for number in numbers or [0]], numbers or [0])
        found = zip(numbers, written, strict=False)
        return {number: self.result(asked[number], tokens) for number, tokens in found}

    def _write(self, asked: list[Asked], numbers: list[int], streamed: Streamed | None = None) -> list[list[int]]:
        return write(
            self.engine,
            [one.ids for one in asked],
            ends=self.ends,
            max_new_tokens=self.max_new_tokens,
            processors=self.sampling.processors(numbers),
            streamer=streamed,
        )

    def result(self, asked: Asked, tokens: list[int]) -> dict[str, Any]:
        """Describes what was written: the prompt's row, the text, how many tokens it took, and why it ended.

        The reason is stop, at an end mark, which is one of the tokens, or length, at `generate.max_new_tokens`.
        """
        reason = "stop" if tokens[-1] in self.ends else "length"
        return asked.row | {"text": self._pieces(asked).text(tokens), "tokens": len(tokens), "finish_reason": reason}

    def _pieces(self, asked: Asked) -> Pieces:
        return Pieces(self.encoder.tokenizer, asked.ids, is_answer=asked.is_chat)


def generation(engine: Engine, _: RunFolder | None, config: Config) -> str:
    """Loads a model and writes what `generate.*` asks for; every process takes part.

    Args:
        engine: of the processes.
        config: of the verb.

    Returns:
        The closing message.

    Raises:
        ConfigError, DataError, CheckpointError: for a prompt, a row or a model that cannot be used.
    """
    given, source, vocabulary = config.generate, config.data, config.model.vocab_size
    engine.first_on_each_host(lambda: find_weights(config.model))
    tokenizer = engine.on_main(lambda: open_tokenizer(source.tokenizer, vocabulary, None, source.chat_template))
    encoder = Encoder(tokenizer, source, vocabulary)
    asked = engine.on_main(lambda: _asked(encoder, config))
    config.parallel.overlap_degree = 1  # a token has few rows, and each part costs messages
    hold_model(engine, config, tokenizer)
    sampling = Sampling(given.temperature, given.top_k, given.top_p, config.run.seed)
    ends = engine.on_main(lambda: end_marks(tokenizer, config.model.init_from))
    writer = Writer(engine, encoder, sampling, ends, given.max_new_tokens)
    if not asked:
        return converse(writer, config)
    if given.prompts is None and given.output is None:
        return show_one(writer, asked[0])
    return write_all(writer, asked, config)


def _asked(encoder: Encoder, config: Config) -> list[Asked]:
    """Encodes what is to be gone on from; nothing where there is to be a chat."""
    given, longest = config.generate, config.model.max_position_embeddings
    if given.prompts is not None:
        return read_prompts(encoder, given, longest)
    if given.prompt is None:
        if encoder.template is None:
            raise ConfigError("there is no chat template to chat with: set data.chat_template, or generate.prompt")
        return []
    try:
        return [ask(given.prompt, encoder, given, longest)]
    except RowError as bad:
        raise ConfigError(f"generate.prompt: {bad}") from None


def show_one(writer: Writer, asked: Asked) -> str:
    """Shows what follows one prompt on standard output, and on standard error how much it is."""
    started = time.perf_counter()
    result = writer.stream(asked)
    rate = result["tokens"] / (time.perf_counter() - started)
    message = f"{result['tokens']} tokens, finish_reason {result['finish_reason']}, {rate:.1f} tokens a second"
    if writer.engine.is_main:
        print(message, file=sys.stderr)
    return message


def write_all(writer: Writer, asked: list[Asked], config: Config) -> str:
    """Writes results in the order of the prompts, which the processes share out, those alike in length together."""
    engine, results = writer.engine, Results(config.generate.output)
    share = Share(engine.rank, engine.world_size, config.generate.batch_size)
    engine.on_main(results.open)
    window = SORTED_BATCHES * share.rows_per_step
    with tqdm(total=len(asked), unit="prompt", disable=None if engine.is_main else True) as bar:
        for first in range(0, len(asked), window):
            some = range(first, min(first + window, len(asked)))
            mine: dict[int, dict[str, Any]] = {}
            for numbers in share.batches(sorted(some, key=lambda number: len(asked[number].ids))):
                mine |= writer.batch(asked, list(numbers))
            found = {number: result for part in engine.gather(mine) for number, result in part.items()}
            engine.on_main(functools.partial(results.write, [found[number] for number in some]))
            bar.update(len(some))
    engine.on_main(results.close)
    return f"{len(asked)} prompts"


def converse(writer: Writer, config: Config) -> str:
    """Chats on the terminal until Ctrl-D, or until the chat is longer than the model can take.

    A message that cannot be written is dropped, and asked for again.
    """
    messages: list[dict[str, str]] = []
    turns = 0
    print("Ctrl-D ends the chat", file=sys.stderr)
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
            asked = ask(messages, writer.encoder, config.generate, config.model.max_position_embeddings)
        except EOFError:
            return f"{turns} answers"
        except RowError as bad:
            print(bad, file=sys.stderr)
            if bad.kind == "too long":
                return f"{turns} answers"
            messages.pop()
            continue
        answer = writer.stream(asked, turns)["text"]
        messages.append({"role": "assistant", "content": answer})
        if not answer.strip():  # templates take no empty one
            del messages[-2:]
        turns += 1
