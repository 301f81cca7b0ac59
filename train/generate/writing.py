"""How a model goes on from prompts: transformers' own loop, what it is told, and what of its tokens is text."""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from train.errors import CheckpointError
from train.model import generator_of
from train.parallel.engine import Engine

UNFINISHED = "\ufffd"  # what bytes that are no character yet are decoded to


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: that the logits are divided by; 0 takes the likeliest token, whatever the rest says.
        top_k: of the likeliest tokens, as many may be drawn; None: any number.
        top_p: the likeliest tokens may be drawn up to this share of the probability.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def processors(self, prompts: Sequence[int]) -> LogitsProcessorList:
        """Gives what changes the scores of a batch of prompts, named by number, so that the greatest is the draw."""
        if self.temperature == 0:
            return LogitsProcessorList()
        found: list[Any] = [TemperatureLogitsWarper(self.temperature)]
        found += [] if self.top_k is None else [TopKLogitsWarper(self.top_k)]
        found += [] if self.top_p == 1 else [TopPLogitsWarper(self.top_p)]
        return LogitsProcessorList([*found, Noise(self.seed, prompts)])


class Noise(LogitsProcessor):
    """Adds to every score what makes the greatest a draw from the scores' softmax.

    Each prompt has a generator of its own: what is written for it does not depend on the prompts beside it.

    Args:
        seed: of the draws.
        prompts: numbers of those in the batch.

    Source: the Gumbel-max trick, arXiv 1411.0030.
    """

    def __init__(self, seed: int, prompts: Sequence[int]) -> None:
        self._generators = [generator_of(seed, f"prompt/{prompt}") for prompt in prompts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns (B, V)."""
        waits = [torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in self._generators]
        return scores - torch.stack(waits).clamp(min=torch.finfo(torch.float32).tiny).log().to(scores.device)


@torch.no_grad()
def write(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    processors: LogitsProcessorList | None = None,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Goes on from prompts, which may be of different lengths; every process must call it, with one or more.

    Args:
        engine: holds the model.
        prompts: token ids, one or more of each.
        ends: tokens that end a text; the first of them is what shorter prompts are padded with, on the left.
        max_new_tokens: bound on the tokens that are written.
        processors: see `Sampling.processors`; by default the likeliest token is taken.
        streamer: of one prompt, gets the tokens as they come.

    Returns:
        The tokens written for each, its end mark included.
    """
    longest = max(map(len, prompts))
    ids = [[ends[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    engine.module.eval()
    written = engine.module.generate(
        torch.tensor(ids, device=engine.device),
        attention_mask=torch.tensor(mask, device=engine.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=processors,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
        streamer=streamer,
        synced_gpus=engine.world_size > 1,
    )
    return [_up_to_end(row, ends) for row in written[:, longest:].tolist()]


def _up_to_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


def end_marks(tokenizer: PreTrainedTokenizerBase, folder: str | None) -> list[int]:
    """Lists the tokens that end a text: the tokenizer's end token, and those that the model's folder names.

    Raises:
        CheckpointError: when what it says of generation cannot be read.
    """
    ends = [tokenizer.eos_token_id]
    path = Path(folder or "") / "generation_config.json"
    if path.is_file():
        try:
            named = GenerationConfig.from_pretrained(path.parent).eos_token_id
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from None
        ends += named if isinstance(named, list) else [named]
    return list(dict.fromkeys(end for end in ends if end is not None))


class Pieces:
    """Turns tokens into pieces of text as they come, each of whole characters. Special tokens are no text.

    Args:
        tokenizer: decodes them.
        prompt: tokens before; the text is what follows theirs.
        is_answer: whether it is a message of its own, which does not begin with white space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], *, is_answer: bool) -> None:
        self._decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
        self._said, self._new = list(prompt), list[int]()  # the tokens of the last piece, and those since
        self._strips = is_answer

    def add(self, token: int) -> str:
        """Takes in a token; returns the text that is complete with it."""
        self._new.append(token)
        piece = self._piece()
        if not piece or piece.endswith(UNFINISHED):
            return ""
        self._said, self._new = self._new, []
        return self._stripped(piece)

    def rest(self) -> str:
        """Returns the text that is left at the end; a character that lacks its last tokens is none."""
        return self._stripped(self._piece().rstrip(UNFINISHED))

    def text(self, tokens: Sequence[int]) -> str:
        """Takes in all tokens; returns their text."""
        return "".join(map(self.add, tokens)) + self.rest()

    def _piece(self) -> str:
        """Decodes the new tokens behind the ones before, on which their first white space depends."""
        whole: str = self._decode(self._said + self._new)
        return whole[len(self._decode(self._said)) :]

    def _stripped(self, piece: str) -> str:
        if self._strips:
            piece = piece.lstrip()
            self._strips = not piece
        return piece


class Streamed(BaseStreamer):
    """Shows the text of a prompt's tokens piece by piece.

    Args:
        pieces: of the prompt.
        show: is given each piece.
    """

    def __init__(self, pieces: Pieces, show: Callable[[str], None]) -> None:
        self._pieces, self._show = pieces, show

    def put(self, value: Tensor) -> None:
        """Takes in the prompt, which is two-dimensional and not shown, then one token after the other."""
        for token in value.tolist() if value.dim() == 1 else ():
            if piece := self._pieces.add(token):
                self._show(piece)

    def end(self) -> None:
        """Shows what is left."""
        self._show(self._pieces.rest())
