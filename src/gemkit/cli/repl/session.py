"""A conversation as the chat keeps it: messages, settings, how the last answer went; saved and loaded as JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemkit.cache import atomic_write
from gemkit.engine.sampling import Sampling
from gemkit.errors import GemkitError, UsageError
from gemkit.text import chat as template

if TYPE_CHECKING:
    from gemkit.api import Model, Piece

Message = dict[str, Any]

# The settings of a conversation; those that were not given take the values of `gemkit.api.Model.generate`.
DEFAULTS: dict[str, object] = {
    "temperature": 1.0,
    "top_k": 64,
    "top_p": 0.95,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "max_tokens": None,
    "seed": None,
}
MAX_FILE_BYTES = 64 << 20


def check_settings(settings: dict[str, object]) -> dict[str, object]:
    """Returns settings as `Model.stream` takes them, None left out; raises UsageError for an unknown name or value."""
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given:
        if name not in DEFAULTS:
            raise UsageError(f"there is no setting {name!r:.40}: choose from {', '.join(DEFAULTS)}")
    count = given.get("max_tokens", 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 2**31:
        raise UsageError(f"max_tokens is {count!r:.40}; give a whole number from 1 (leave it out: up to the context)")
    checked = Sampling(**{name: value for name, value in given.items() if name != "max_tokens"})
    return {name: count if name == "max_tokens" else getattr(checked, name) for name in given}


@dataclass(frozen=True)
class Turn:
    """How an answer went.

    first_seconds: from the question to its first token. rate: tokens per second after that one, 0 if there is none.
    ended: "stop" (the model ended it), "length" (max_tokens), "context" (no room left) or "stopped" (the user did).
    """

    prompt_tokens: int
    tokens: int
    first_seconds: float
    rate: float
    ended: str


class Answer:
    """An answer as it comes: an iterator of pieces. `Session.keep` puts what was said into the conversation."""

    def __init__(self, model: Model, before: list[Message], ids: list[int], settings: dict[str, object]) -> None:
        self.before = before
        self._model, self._ids, self._limit = model, ids, settings.get("max_tokens")
        self._came: list[tuple[float, Piece]] = []
        self._complete = False
        self._started = time.perf_counter()
        self._pieces = model.stream(ids, **settings)

    @property
    def prompt_tokens(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        try:
            piece = next(self._pieces)
        except StopIteration:
            self._complete = True
            raise
        self._came.append((time.perf_counter(), piece))
        return piece

    @property
    def text(self) -> str:
        return "".join(piece for _, piece in self._came)

    def close(self) -> Turn | None:
        """Cancels what has not come; returns how it went, None if there was not one token."""
        self._pieces.close()
        if not self._came:
            return None
        first, last, count = self._came[0][0], self._came[-1][0], len(self._came)
        rate = (count - 1) / (last - first) if last > first else 0.0
        return Turn(len(self._ids), count, first - self._started, rate, self._ended(count))

    def _ended(self, count: int) -> str:
        if not self._complete:
            return "stopped"
        if self._came[-1][1].id in self._model.stop_ids:
            return "stop"
        return "length" if count == self._limit else "context"


@dataclass
class Session:
    """The conversation. messages: dictionaries with "role" and "content", the system's first; settings: those given.

    last: how the last answer went. An answer that the user stopped has the key "stopped".
    """

    model: Model
    settings: dict[str, object] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    last: Turn | None = None

    @property
    def name(self) -> str:
        return self.model.checkpoint.name

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else None

    def clear(self, system: str | None = None) -> None:
        """Starts anew, with these instructions."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.last = None

    def count(self, messages: list[Message] | None = None) -> int:
        """Tokens of the conversation, 0 for an empty one."""
        messages = self.messages if messages is None else messages
        return len(self.model.render(messages, add_generation_prompt=False)) if messages else 0

    def last_question(self) -> int | None:
        """Where the last message of the user stands."""
        return next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "user"), None)

    def ask(self, text: str | None) -> Answer:
        """Starts the answer to a new message, or with None another answer to the last one.

        Raises UsageError if the conversation does not fit in the context; it is then as it was.
        """
        if text is None:
            question = self.last_question()
            if question is None:
                raise UsageError("there is nothing to answer again: write a message first")
            before = self.messages[: question + 1]
        else:
            before = [*self.messages, {"role": "user", "content": text}]
        ids = self.model.render(before)
        room = self.model.ctx_size
        if len(ids) >= room:
            alone = self.count(before[-1:]) >= room
            raise UsageError(
                f"the context is full: with this message the conversation takes {len(ids):,} of {room:,} tokens. "
                + ("Shorten the message" if alone else "/clear or /undo makes room (/save first to keep it)")
                + ", or start with a larger --ctx-size. Nothing is lost: arrow up brings the message back."
            )
        defaults = {name: value for name, value in DEFAULTS.items() if value is not None}
        return Answer(self.model, before, ids, defaults | self.settings)

    def keep(self, answer: Answer) -> Turn | None:
        """Ends an answer and puts it into the conversation, unless nothing was said; returns how it went."""
        turn = answer.close()
        if turn is not None:
            message: Message = {"role": "assistant", "content": answer.text}
            if turn.ended == "stopped":
                message["stopped"] = True
            self.messages, self.last = [*answer.before, message], turn
        return turn

    def undo(self) -> bool:
        """Forgets the last message and its answer; returns whether there was one."""
        question = self.last_question()
        if question is None:
            return False
        self.messages, self.last = self.messages[:question], None
        return True

    def save(self, path: str) -> Path:
        """Writes the conversation as JSON. Raises UsageError rather than overwrite another kind of file."""
        target = _expand(path)
        if target.exists():
            try:
                _read(target)
            except UsageError:
                raise UsageError(f"{target} exists and is no conversation: choose another name") from None
        record = {"model": self.name, "settings": self.settings, "messages": self.messages}
        atomic_write(target, (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode())
        return target

    def load(self, path: str) -> str | None:
        """Takes messages and settings of a file; returns the name of the model it was saved with.

        Raises UsageError, with the conversation as it was, for a file that is not one of `save`'s.
        """
        target = _expand(path)
        record = _read(target)
        messages = [_message(target, number, message) for number, message in enumerate(record["messages"])]
        try:
            settings = check_settings(record.get("settings", {}))
            if messages:
                template.turns(messages)
        except GemkitError as error:
            raise UsageError(f"{target}: {error!s:.300}") from None
        self.messages, self.settings, self.last = messages, settings, None
        name = record.get("model")
        return name[:80] if isinstance(name, str) else None


def _expand(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path}: there is no such user") from None


def _read(path: Path) -> dict[str, Any]:
    """A file's record, its outermost shape checked. A bare list of messages is one too."""
    if not path.exists():
        raise UsageError(f"{path} does not exist: /save FILE writes a conversation")
    # Reading a pipe or a device could wait forever.
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UsageError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB: it is no conversation")
    try:
        record = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not JSON in UTF-8: /save FILE writes what /load reads") from None
    record = {"messages": record} if isinstance(record, list) else record
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise UsageError(f"{path} has no list of messages: /save FILE writes what /load reads")
    if not isinstance(record.get("settings", {}), dict):
        raise UsageError(f"{path} has settings that are no JSON object")
    return record


def _message(path: Path, number: int, message: object) -> Message:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if role not in ("user", "assistant", "system") or not isinstance(content, str):
        raise UsageError(f'{path}: message {number} is no {{"role": "user" | "assistant" | "system", "content": text}}')
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise UsageError(f"{path}: message {number} is not Unicode text")
    if role == "system" and number:
        raise UsageError(f"{path}: message {number} is the system's: only the first may be")
    stopped = {"stopped": True} if role == "assistant" and message.get("stopped") is True else {}
    return {"role": role, "content": content, **stopped}


def share(part: int, whole: int) -> str:
    """A part of a whole in percent, rounded up."""
    return f"{math.ceil(100 * part / whole)}%"
