"""The prompts of a file, and the file of what is written for them."""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from train.config import GenerateConfig
from train.data.files import read_each
from train.data.formats import RowError
from train.data.templates import Encoder
from train.errors import MachineError

RESULTS = ("text", "tokens", "finish_reason")


@dataclass(frozen=True)
class Asked:
    """A prompt to go on from.

    Attributes:
        row: that it is from, whatever else is in it.
        ids: of its tokens.
        is_chat: whether what is written is a message of its own.
    """

    row: dict[str, Any]
    ids: list[int]
    is_chat: bool


def ask(prompt: Any, encoder: Encoder, config: GenerateConfig, longest: int) -> Asked:
    """Encodes a prompt: a text, which is a user's message with `generate.chat`, or a list of messages.

    Args:
        prompt: whatever was given for one.
        encoder: writes it.
        config: of the verb.
        longest: what the model can take, in tokens.

    Raises:
        RowError: where it is none, or too long.
    """
    given = [{"role": "user", "content": prompt}] if config.chat and isinstance(prompt, str) else prompt
    ids = encoder.prompt(given)
    if len(ids) + config.max_new_tokens > longest:
        raise RowError(
            "too long",
            f"{len(ids)} tokens and generate.max_new_tokens={config.max_new_tokens}; the model takes {longest}",
        )
    return Asked({"prompt": prompt}, ids, is_chat=isinstance(given, list))


def read_prompts(encoder: Encoder, config: GenerateConfig, longest: int) -> list[Asked]:
    """Reads `generate.prompts`; for the arguments see `ask`.

    Raises:
        DataError: for the first row that is no prompt, by file and line.
    """

    def read(row: Any) -> Asked:
        if not isinstance(row, dict) or "prompt" not in row:
            raise RowError("missing column", 'expected {"prompt": a text or a list of messages}')
        taken = [name for name in RESULTS if name in row]
        if taken:
            raise RowError("column taken", f"{taken[0]!r} is what a result is called: give it another name")
        asked = ask(row["prompt"], encoder, config, longest)
        try:
            _line(row, in_file=config.output is not None).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RowError("not JSON", f"the row cannot be written with its result ({error})") from None
        return Asked(row, asked.ids, asked.is_chat)

    assert config.prompts is not None
    return read_each("generate.prompts", config.prompts, read)


def show(text: str) -> None:
    """Writes to standard output at once.

    Raises:
        MachineError: when nobody reads it any more.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would try again at its end
        raise MachineError(f"standard output: {error.strerror}") from None


def _line(result: dict[str, Any], *, in_file: bool) -> str:
    """Writes a result as a line: in UTF-8 for a file, in ASCII for standard output, whose encoding may be any."""
    return json.dumps(result, ensure_ascii=not in_file) + "\n"


class Results:
    """Writes results as lines of JSON: to a file, which gets its name once all are there, or to standard output.

    Until then it is `NAME.partial`, and what was written stays there when the verb dies.

    Args:
        path: of the file, or None.
    """

    def __init__(self, path: str | None) -> None:
        self._target = None if path is None else Path(path).expanduser()
        self._file: IO[str] | None = None

    def open(self) -> None:
        """Opens the file, if there is to be one."""
        if self._target is not None:
            self._file = self._target.with_name(f"{self._target.name}.partial").open("w", encoding="utf-8")

    def write(self, results: Iterable[dict[str, Any]]) -> None:
        """Writes some.

        Raises:
            OSError, MachineError: when they cannot be written.
        """
        lines = "".join(_line(result, in_file=self._file is not None) for result in results)
        if self._file is None:
            show(lines)
        else:
            self._file.write(lines)
            self._file.flush()

    def close(self) -> None:
        """Gives the file its name."""
        if self._file is not None and self._target is not None:
            self._file.close()
            Path(self._file.name).rename(self._target)
