"""Rows of a data set: their four formats, and the ones that cannot be used.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}
    {"instruction": "…", "input": "…", "output": "…"}        input may be missing or empty
    {"text": "…"}

Other columns are ignored. A row with the columns of several formats has the first of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemkit.errors import GemkitError, UsageError, brief, listed
from gemkit.text.chat import turns

FORMATS = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "instruction and output": ("instruction", "output"),
    "text": ("text",),
}
COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output", "text")
# Keys of a message that change its meaning and that no sample can follow.
_REFUSED = ("tool_calls", "function_call", "weight")


class RowError(GemkitError):
    """A row that cannot be used. where: file and line. reason: the same for all rows with the same fault."""

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        self.where, self.reason = where, reason
        super().__init__(f"{where}: {reason}" + (f": {detail}" if detail else ""))


@dataclass(frozen=True)
class Conversation:
    """messages: {"role": …, "content": …}, as `gemkit.text.chat.render` takes them."""

    messages: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion; an instruction with its input is a prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Text without a prompt."""

    text: str


@dataclass(frozen=True)
class Row:
    """where: file and line, or file and row, counted from 1."""

    content: Conversation | Pair | Text
    where: str


def format_of(fields: object, where: str) -> str:
    """Return the name in FORMATS of a row's format. Raises RowError if it has none."""
    if not isinstance(fields, Mapping):
        raise RowError(where, "the row is no object", f"it is {brief(fields)}")
    for name, columns in FORMATS.items():
        if all(column in fields for column in columns):
            return name
    raise RowError(
        where,
        "the row has no known format",
        f"it has {listed(fields) or 'no column'}; give messages, or prompt and completion, or instruction and output, "
        "or text",
    )


def parse_row(fields: Mapping[str, Any], format: str, where: str) -> Row:
    """Return the row of a record. format: of `format_of`. Raises RowError for wrong types and empty texts."""
    if format == "messages":
        return Row(Conversation(_messages(fields["messages"], where)), where)
    if format == "text":
        return Row(Text(_text(fields, "text", where)), where)
    if format == "prompt and completion":
        return Row(Pair(_text(fields, "prompt", where), _text(fields, "completion", where)), where)
    given = "" if fields.get("input") in (None, "") else _text(fields, "input", where, empty=True)
    instruction = _text(fields, "instruction", where)
    prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    return Row(Pair(prompt, _text(fields, "output", where)), where)


def _text(fields: Mapping[str, Any], column: str, where: str, empty: bool = False) -> str:
    value = fields[column]
    if not isinstance(value, str):
        raise RowError(where, f"{column} is no text", f"it is {brief(value)}")
    if not value.strip() and not empty:
        raise RowError(where, f"{column} is empty")
    _check_unicode(value, where)
    return value


def _messages(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str):  # a column of CSV
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(where, "messages is text that is no JSON") from None
    if not isinstance(value, list | tuple):
        raise RowError(where, "messages is no list", f"it is {brief(value)}")
    messages = tuple(
        {key: item for key, item in message.items() if item is not None} if isinstance(message, Mapping) else message
        for message in value
    )
    try:
        conversation = turns(messages)
    except GemkitError as error:
        raise RowError(where, "messages is no conversation", str(error)) from None
    for number, message in enumerate(messages):
        if refused := [key for key in _REFUSED if key in message]:
            raise RowError(where, f"a message has {refused[0]}", f"message {number}, which gemkit cannot tune on")
    for _, text in conversation:
        _check_unicode(text, where)
    if not any(role == "model" and text for role, text in conversation):
        raise RowError(where, "messages has no assistant turn with text")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(where, "half a surrogate pair", f"U+{ord(text[error.start]):04X} is no character") from None


@dataclass
class Reason:
    """count: of the rows. examples: the first few messages, each with file and line."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


class BadRows:
    """Keeps count of rows that cannot be used. on_bad_row: "fail" raises the first, "skip" leaves all of them out.

    reasons: of the rows that were left out.
    """

    def __init__(self, on_bad_row: str = "fail") -> None:
        if on_bad_row not in ("fail", "skip"):
            raise UsageError(f"on_bad_row is {brief(on_bad_row)}: give 'fail' or 'skip'")
        self.reasons: dict[str, Reason] = {}
        self._fail = on_bad_row == "fail"

    @property
    def count(self) -> int:
        """Number of rows that were left out."""
        return sum(reason.count for reason in self.reasons.values())

    def handle(self, error: RowError) -> None:
        """Raise GemkitError or leave the row out, as `on_bad_row` says."""
        if self._fail:
            raise GemkitError(
                f"{error}; correct the row, or leave such rows out with on_bad_row='skip' (--on-bad-row skip)"
            ) from None
        self.leave_out(error)

    def leave_out(self, error: RowError) -> None:
        """Leave a row out and count it."""
        reason = self.reasons.setdefault(error.reason, Reason())
        reason.count += 1
        if len(reason.examples) < 3:
            reason.examples.append(str(error))
