"""Prompts with a known answer: the likeliest of several choices, and what a model writes by itself.

A row of `evaluate.prompts` is {"prompt": ..., "choices": [...], "answer": 1}, the answer counted from 0, or
{"prompt": ..., "answer": "..."}. A prompt may be a list of messages, which the tokenizer's chat template writes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.data.files import read_each
from train.data.formats import RowError
from train.data.share import Share
from train.data.templates import Encoder
from train.errors import DataError
from train.generate.writing import write
from train.parallel.engine import Engine, Model


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered.

    Attributes:
        ids: of its tokens.
        choices: ids of each choice's tokens; none where the answer is to be written.
        sizes: bytes of each choice.
        answer: the right choice, or the text to be written.
    """

    ids: list[int]
    choices: list[list[int]]
    sizes: list[int]
    answer: int | str


class Continuation(NamedTuple):
    """Tokens, of which those from `start` on are scored."""

    ids: list[int]
    start: int


class Prompts:
    """The prompts of a file.

    Args:
        path: a file of rows.
        encoder: writes them.
        longest: what the model can take, in tokens.
        answer_tokens: bound on a written answer.
        ends: tokens that end one; see `end_marks`.

    Raises:
        DataError: for a row that is no prompt with an answer, by file and line.
    """

    def __init__(self, path: str, encoder: Encoder, longest: int, answer_tokens: int, ends: Sequence[int]) -> None:
        self._encoder, self._longest, self._answer_tokens, self._ends = encoder, longest, answer_tokens, ends
        self.rows = read_each("evaluate.prompts", path, self._read)

    def _read(self, row: Any) -> Prompt:
        prompt = self._prompt(row)
        written = 0 if prompt.choices else self._answer_tokens
        length = len(prompt.ids) + max([written, *map(len, prompt.choices)])
        if length > self._longest:
            raise RowError("too long", f"{length} tokens with its answer; the model takes {self._longest}")
        return prompt

    def _prompt(self, row: Any) -> Prompt:
        if not isinstance(row, dict) or not {"prompt", "answer"} <= row.keys():
            raise RowError("missing column", 'expected {"prompt": ..., "answer": ...}, with "choices" or without')
        prompt, choices, answer = row["prompt"], row.get("choices"), row["answer"]
        if choices is None:
            if not isinstance(answer, str) or not answer.strip():
                raise RowError(
                    "wrong type", f"'answer' is {answer!r}: give a text, or 'choices' and the right one's number"
                )
            return Prompt(self._encoder.prompt(prompt), [], [], answer.strip())
        if not (
            isinstance(choices, list) and len(choices) > 1 and all(isinstance(one, str) and one for one in choices)
        ):
            raise RowError("wrong type", "'choices' is no list of two texts or more, none of them empty")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise RowError(
                "answer out of range", f"{answer!r}, expected the number of a choice, 0 to {len(choices) - 1}"
            )
        prompt, blanks = _without_blanks(prompt)
        ids = self._encoder.prompt(prompt)
        found = [self._encoder.prompt(prompt, blanks + choice)[len(ids) :] for choice in choices]
        if not all(found):
            raise RowError("empty choice", "a choice adds no token to the prompt")
        return Prompt(ids, found, [len(choice.encode()) for choice in choices], answer)

    def check_metric(self, metric: str) -> None:
        """Refuses the figure of a kind of prompt that there is none of.

        Raises:
            DataError: naming it.
        """
        are_written = {not prompt.choices for prompt in self.rows}
        if (metric == "exact_match" and True not in are_written) or ("choice" in metric and False not in are_written):
            raise DataError(f"evaluate.metric={metric}, but evaluate.prompts has no row of that kind")

    @torch.no_grad()
    def figures(self, engine: Engine, size: int) -> dict[str, float]:
        """Answers every prompt, each once over all processes, which must all call it.

        Args:
            engine: holds the model, in evaluation.
            size: prompts per process and forward pass.

        Returns:
            `eval_choice_accuracy`, by the choices' log-likelihoods, `eval_choice_accuracy_normalised`, by those per
            byte (both as lm-evaluation-harness has them); `eval_exact_match`, of greedy answers up to their end mark or
            first line break. Those alone that there are prompts for.
        """
        choosing = [prompt for prompt in self.rows if prompt.choices]
        writing = [prompt for prompt in self.rows if not prompt.choices]
        return (self._choose(engine, choosing, size) if choosing else {}) | (
            self._write(engine, writing, size) if writing else {}
        )

    def _choose(self, engine: Engine, prompts: list[Prompt], size: int) -> dict[str, float]:
        asked = [Continuation(prompt.ids + choice, len(prompt.ids)) for prompt in prompts for choice in prompt.choices]

        def score(chosen: list[Continuation]) -> Tensor:
            return scores(engine.module, chosen or asked[:1], engine.device)[: len(chosen)]

        scored = each(engine, asked, [len(one.ids) for one in asked], size, score)
        sizes = torch.tensor([one for prompt in prompts for one in prompt.sizes], dtype=torch.float64)
        counts = [len(prompt.choices) for prompt in prompts]
        right = [
            sum(
                part.argmax().item() == prompt.answer
                for part, prompt in zip(values.split(counts), prompts, strict=True)
            )
            for values in (scored, scored / sizes)
        ]
        plain, normalised = (count / len(prompts) for count in right)
        return {"eval_choice_accuracy": plain, "eval_choice_accuracy_normalised": normalised}

    def _write(self, engine: Engine, prompts: list[Prompt], size: int) -> dict[str, float]:
        def match(chosen: list[Prompt]) -> Tensor:
            answers = self._answers(engine, [prompt.ids for prompt in chosen or prompts[:1]])
            right = [one.answer in said for said, one in zip(answers, chosen, strict=False)]
            return torch.tensor(right, dtype=torch.float64)

        matched = each(engine, prompts, [len(prompt.ids) for prompt in prompts], size, match)
        return {"eval_exact_match": matched.mean().item()}

    def _answers(self, engine: Engine, prompts: list[list[int]]) -> list[tuple[str, str]]:
        """Writes greedy answers: each up to its end mark, and up to its first line break."""
        written = write(engine, prompts, ends=self._ends, max_new_tokens=self._answer_tokens)
        answers = [tokens[:-1] if tokens[-1] in self._ends else tokens for tokens in written]
        texts = self._encoder.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [(text.strip(), text.strip().partition("\n")[0].strip()) for text in texts]


def _without_blanks(prompt: Any) -> tuple[Any, str]:
    """Takes the blanks off the end of a text: they belong to the token after them, as lm-evaluation-harness has it."""
    kept = prompt.rstrip() if isinstance(prompt, str) else ""
    return (kept, prompt[len(kept) :]) if kept else (prompt, "")


def each(
    engine: Engine, items: Sequence[Any], lengths: list[int], size: int, answer: Callable[[list[Any]], Tensor]
) -> Tensor:
    """Gives a number to each of several items, which the processes share out; every process gets all of them.

    Args:
        engine: of the processes.
        items: whatever `answer` takes a few of, none of them where a process has none left; all call it as often.
        lengths: of the items: those alike go together.
        size: items per process and call.
        answer: gives as many numbers.
    """
    found = torch.zeros(len(items), dtype=torch.float64, device=engine.device)
    order = np.argsort(lengths, kind="stable").tolist()
    share = Share(engine.rank, engine.world_size, size)
    for mine in share.batches(order):
        places = torch.tensor(mine, dtype=torch.long, device=engine.device)
        found[places] = answer([items[index] for index in mine]).to(found)
    return engine.sum(found).cpu()


def scores(model: Model, continuations: list[Continuation], device: torch.device) -> Tensor:
    """Sums the log-likelihoods of the tokens from `start` on, in fp32; the rest of a row is padding, on the right."""
    longest = max(len(one.ids) for one in continuations)
    ids = torch.tensor([one.ids + [0] * (longest - len(one.ids)) for one in continuations], device=device)
    logits = model(input_ids=ids, use_cache=False).logits
    found = []
    for row, (tokens, start) in enumerate(continuations):
        predicted = logits[row, start - 1 : len(tokens) - 1].float().log_softmax(dim=-1)
        found.append(predicted.gather(1, ids[row, start : len(tokens), None]).sum())
    return torch.stack(found)
