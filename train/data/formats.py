"""What a row of data is: its format, recognised by its columns, and its content, checked and in one form.

A document is a row in that form: plain text, with its label as JSON where it has one, or a sample as JSON with the
columns of its format, sharegpt's written as `messages`. A row that is no such thing is kept as a document with a
`problem`, so that it can be counted.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.config import FORMATS, PROBLEMS
from train.errors import DataError

ROLES = {  # sharegpt's names for them
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
BLANK = "blank text"  # tolerated: many corpora hold empty lines


class RowError(ValueError):
    """A row that cannot be trained on.

    Args:
        kind: under which it is counted; without a colon.
        detail: what is wrong, and the fix.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclass(frozen=True)
class Schema:
    """How the rows of one source are read.

    Attributes:
        format: one of `FORMATS`, or auto.
        columns: names that columns and message keys have in the source, by their usual ones.
    """

    format: str
    columns: Mapping[str, str]

    def name(self, column: str) -> str:
        """Gives a column's name in the source."""
        return self.columns.get(column, column)

    def recognised(self, row: Mapping[str, Any], where: str) -> "Schema":
        """Settles `auto` by a row's columns.

        Raises:
            DataError: when they are no format's.
        """
        if self.format != "auto":
            return self
        for form, columns in FORMATS.items():
            needed = [self.name(column) for column in columns if not column.startswith("[")]
            if all(column in row for column in needed):
                if form == "sharegpt" and _keys_of_first(row[needed[0]]) >= {self.name("role"), self.name("content")}:
                    return Schema("messages", {**self.columns, "messages": needed[0]})
                if form == "messages" and _keys_of_first(row[needed[0]]) >= {self.name("from"), self.name("value")}:
                    return Schema("sharegpt", {**self.columns, "conversations": needed[0]})
                return Schema(form, self.columns)
        absent = " and ".join(repr(name) for name in sorted(set(self.columns.values())) if name not in row)
        formats = "; ".join(f"{form} has {', '.join(columns)}" for form, columns in FORMATS.items())
        raise DataError(
            f"{where}: it has the columns {', '.join(sorted(row)) or '(none)'}, but {absent or 'none of a format'} is "
            f"not among them: name them in data.columns, such as {{text: NAME}} ({formats})"
        )


def _keys_of_first(messages: Any) -> set[str]:
    first = messages[0] if isinstance(messages, list) and messages else None
    return set(first) if isinstance(first, dict) else set()


def as_document(row: Any, where: str, schema: Schema) -> dict[str, Any]:
    """Brings a row into the one form of its format.

    Args:
        row: of the source, or the `RowError` that was met in reading it.
        where: file and line, or dataset and index.
        schema: of the source, its format settled.

    Returns:
        A document: `text`, `label`, `format`, `source` and `problem`.
    """
    try:
        if isinstance(row, RowError):
            raise row
        if not isinstance(row, Mapping):
            raise RowError("wrong type", f"expected an object with columns, found {_type(row)}")
        text = _READERS[schema.format](row, schema)
        label = _dump(_LABELS[schema.format](row, schema)) if schema.format in PROBLEMS else None
        for written in (text, label or ""):
            refuse_half_characters(written)
    except RowError as bad:
        problem = writable(str(bad))
        return {"text": "", "label": None, "format": schema.format, "source": where, "problem": problem}
    form = "messages" if schema.format == "sharegpt" else schema.format
    return {"text": text, "label": label, "format": form, "source": where, "problem": None}


def refuse_half_characters(text: str) -> None:
    """Refuses a text that cannot be written as UTF-8.

    Raises:
        RowError: for a lone surrogate.
    """
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RowError("half a character", "it holds a lone surrogate escape; mend the text")


def writable(text: str) -> str:
    """Gives a text as UTF-8 can have it, half characters escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def as_row(document: Mapping[str, Any]) -> dict[str, Any]:
    """Gives a document as a row that can be read again, with its `source`."""
    form = document["format"]
    content = {"text": document["text"]} if form in ("text", *PROBLEMS) else json.loads(document["text"])
    if form in PROBLEMS:
        content["labels" if form == "multi_label" else "label"] = json.loads(document["label"])
    return {**content, "source": document["source"]}


def texts_of(document: Mapping[str, Any]) -> list[str]:
    """Lists what a tokenizer sees of a document: its text, or the texts of its messages and columns."""
    if document["problem"] is not None:
        return []
    if document["format"] in ("text", *PROBLEMS):
        return [document["text"]]
    sample = json.loads(document["text"])
    if "messages" in sample:
        return [message["content"] for message in sample["messages"]]
    return [value for value in sample.values() if isinstance(value, str)]


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _column(row: Mapping[str, Any], column: str, schema: Schema, kind: type) -> Any:
    name = schema.name(column)
    if name not in row:
        has = ", ".join(sorted(map(str, row))) or "none"
        fix = "set data.text_field" if column == "text" else "mend the row, or name the column in data.columns"
        raise RowError("missing column", f"no {name!r}; it has {has}; {fix}")
    if not isinstance(row[name], kind):
        expected = "text" if kind is str else "a list"
        raise RowError("wrong type", f"{name!r} holds {_type(row[name])}, not {expected}")
    return row[name]


def _answer(text: str, what: str) -> str:
    if not text.strip():
        raise RowError("empty answer", f"{what} is empty: write an answer, or leave the row out")
    return text


def _text(row: Mapping[str, Any], schema: Schema) -> str:
    text: str = _column(row, "text", schema, str)
    if not text.strip():
        raise RowError(BLANK, f"{schema.name('text')!r} holds nothing")
    return text


def _chat(row: Mapping[str, Any], schema: Schema) -> str:
    is_sharegpt = schema.format == "sharegpt"
    raw = _column(row, "conversations" if is_sharegpt else "messages", schema, list)
    return _dump({"messages": _messages(raw, schema, *(("from", "value") if is_sharegpt else ("role", "content")))})


def _messages(raw: list[Any], schema: Schema, role_key: str, content_key: str) -> list[dict[str, Any]]:
    """Checks messages; what order their roles may have beyond that, the chat template says."""
    if not raw:
        raise RowError("no messages", "the list of messages is empty: leave the row out")
    role_name, content_name, weight_name = map(schema.name, (role_key, content_key, "weight"))
    messages = []
    for number, message in enumerate(raw, start=1):
        if not isinstance(message, Mapping):
            raise RowError("wrong type", f"message {number} is {_type(message)}, not an object")
        for name in (role_name, content_name):
            if name not in message:
                has = ", ".join(sorted(map(str, message))) or "none"
                raise RowError(
                    "missing key", f"message {number} has no {name!r}; it has {has}; name it in data.columns"
                )
            if not isinstance(message[name], str):
                raise RowError("wrong type", f"{name!r} of message {number} holds {_type(message[name])}, not text")
        if message.get("tool_calls"):
            raise RowError("tool calls", f"message {number} calls tools, which are not trained on: leave the row out")
        role, content, weight = message[role_name], message[content_name], message.get(weight_name)
        role = ROLES.get(role, role) if role_key == "from" else role
        if role not in ROLES.values():
            raise RowError("unknown role", f"{role!r} in message {number}: expected {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise RowError("wrong role order", f"message {number} is from system, which may only come first")
        if weight is not None and (isinstance(weight, str) or weight not in (0, 1)):
            raise RowError("wrong type", f"'weight' of message {number} is {weight!r}, neither 0 nor 1")
        if weight == 1 and role != "assistant":
            raise RowError("wrong weight", f"message {number} from {role} has weight 1: only answers can be trained")
        if role == "assistant" and weight != 0:
            _answer(content, f"message {number}, from assistant,")
        messages.append({"role": role, "content": content} | ({} if weight is None else {"weight": int(weight)}))
    return messages


def chat_to_answer(raw: list[Any]) -> list[dict[str, Any]]:
    """Checks messages that a model is to answer.

    Raises:
        RowError: for what is no chat, or one that is answered already.
    """
    messages = _messages(raw, Schema("messages", {}), "role", "content")
    if messages[-1]["role"] == "assistant":
        raise RowError("wrong role order", "the last message is from assistant, and its answer is to be written")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _pair(row: Mapping[str, Any], schema: Schema) -> str:
    """Reads a prompt and its completion, which may also be the messages before the answer and those from it on."""
    name = schema.name("prompt")
    if isinstance(row.get(name), list):
        before = _messages(row[name], schema, "role", "content")
        after = _messages(_column(row, "completion", schema, list), schema, "role", "content")
        return _dump(
            {
                "messages": [message | ({"weight": 0} if message["role"] == "assistant" else {}) for message in before]
                + after
            }
        )
    prompt, completion = (_column(row, column, schema, str) for column in ("prompt", "completion"))
    return _dump({"prompt": prompt, "completion": _answer(completion, repr(schema.name("completion")))})


def _alpaca(row: Mapping[str, Any], schema: Schema) -> str:
    instruction, output = (_column(row, column, schema, str) for column in ("instruction", "output"))
    given = row.get(schema.name("input"))
    if not isinstance(given, str | None):
        raise RowError("wrong type", f"{schema.name('input')!r} holds {_type(given)}, not text")
    output = _answer(output, repr(schema.name("output")))
    return _dump({"instruction": instruction, "input": given or "", "output": output})


def _tokens(row: Mapping[str, Any], schema: Schema) -> str:
    ids = _column(row, "input_ids", schema, list)
    labels = row.get(schema.name("labels"))
    for name, values in (("input_ids", ids), ("labels", labels or [])):
        if any(type(value) is not int for value in values):
            raise RowError("wrong type", f"{schema.name(name)!r} holds what is no whole number")
    if labels is None:
        return _dump({"input_ids": ids})
    if len(labels) != len(ids) or any(label not in (-100, token) for token, label in zip(ids, labels, strict=True)):
        raise RowError("wrong labels", "'labels' must be 'input_ids' unshifted, or -100 where a token is not trained")
    return _dump({"input_ids": ids, "labels": labels})


def _class(row: Mapping[str, Any], schema: Schema) -> str | int:
    """Reads the name of a class, or its index."""
    return _one_label(_column(row, "label", schema, object), schema.name("label"))


def _classes(row: Mapping[str, Any], schema: Schema) -> list[str | int]:
    return [_one_label(label, schema.name("labels")) for label in _column(row, "labels", schema, list)]


def _one_label(label: Any, name: str) -> str | int:
    if isinstance(label, float) and label.is_integer():  # a column with gaps turns whole numbers into these
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise RowError("wrong type", f"{name!r} holds {_type(label)}, neither a label's name nor its number")
    if isinstance(label, str) and not label.strip():
        raise RowError("empty label", f"{name!r} names none: label the row, or leave it out")
    return label


def _number(row: Mapping[str, Any], schema: Schema) -> float:
    value = _column(row, "label", schema, object)
    name = schema.name("label")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError("wrong type", f"{name!r} holds {_type(value)}, not a number")
    try:
        number = float(value)  # a CSV's numbers are text
    except ValueError:
        raise RowError("wrong type", f"{name!r} holds {value!r}, not a number") from None
    except OverflowError:  # a whole number may have any length
        number = math.inf
    if not math.isfinite(number):
        raise RowError("not a number", f"{name!r} is {number}: give a finite one, or leave the row out")
    return number


def _dump(sample: Any) -> str:
    return json.dumps(sample, ensure_ascii=False)


_READERS = {
    "text": _text,
    "messages": _chat,
    "sharegpt": _chat,
    "prompt_completion": _pair,
    "alpaca": _alpaca,
    "tokens": _tokens,
    **dict.fromkeys(PROBLEMS, _text),
}
_LABELS = {"classification": _class, "multi_label": _classes, "regression": _number}
