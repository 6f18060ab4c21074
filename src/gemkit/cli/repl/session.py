"""A conversation as the chat keeps it: messages, settings, how the last answer went; saved and loaded as JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemkit.cli.common import decode_text
from gemkit.cli.repl import transcript
from gemkit.cli.repl.transcript import Message
from gemkit.engine.sampling import Sampling
from gemkit.errors import GemkitError, UsageError
from gemkit.text import chat as template
from gemkit.text import window

if TYPE_CHECKING:
    from gemkit.api.model import Model
    from gemkit.api.output import Piece

# The settings of a conversation; those that were not given take the values of `gemkit.api.model.Model.generate`.
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


def check_settings(settings: dict[str, object]) -> dict[str, object]:
    """Return settings as `Model.stream` takes them, None left out; raises UsageError for an unknown name or value."""
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
    """Statistics of an answer.

    first_seconds: from the question to its first token. rate: tokens per second after that one, 0 if there is none.
    ended: "stop" (the model ended it), "length" (max_tokens), "context" (it is full) or "stopped" (the user did).
    """

    prompt_tokens: int
    tokens: int
    first_seconds: float
    rate: float
    ended: str


@dataclass(frozen=True)
class Attachment:
    """A file that goes with the next message."""

    name: str
    text: str
    tokens: int


class Answer:
    """A streaming answer: an iterator of pieces. `Session.keep` adds its text to the conversation.

    before: the messages that it answers. dropped: number of oldest messages that the model does not get. begun: the
    text that it continues, empty for a new answer.
    """

    def __init__(
        self,
        model: Model,
        before: list[Message],
        ids: list[int],
        settings: dict[str, object],
        dropped: int = 0,
        begun: str = "",
    ) -> None:
        self.before, self.dropped, self.begun = before, dropped, begun
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
        """Cancel the rest; return the statistics, None without a token."""
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
    shift: leave out the oldest messages when the context is full; dropped: how many the model does not see now, the
    system's not counted. attached: files for the next message. at_terminal: there is someone to give commands.
    """

    model: Model
    settings: dict[str, object] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    last: Turn | None = None
    shift: bool = False
    dropped: int = 0
    attached: list[Attachment] = field(default_factory=list)
    at_terminal: bool = True

    @property
    def name(self) -> str:
        return self.model.checkpoint.name

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else None

    def clear(self, system: str | None = None) -> None:
        """Start a new conversation, with these instructions; attached files stay for its first message."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.last, self.dropped = None, 0

    def count(self, messages: list[Message] | None = None) -> int:
        """Return the tokens of messages, by default of those that the model gets; 0 for none."""
        messages = window.visible(self.messages, self.dropped) if messages is None else messages
        try:
            return len(self.model.render(messages, add_generation_prompt=False)) if messages else 0
        except GemkitError:  # a template may refuse a part of a conversation
            return sum(len(self.model.tokenizer.encode(message["content"], bos=False)) for message in messages)

    def last_question(self) -> int | None:
        """Return the index of the user's last message."""
        return next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "user"), None)

    def ask(self, text: str | None) -> Answer:
        """Start the answer to a new message, with the attached files, or with None another answer to the last one.

        Raises UsageError if the conversation does not fit in the context; it is then as it was.
        """
        if text is None:
            question = self.last_question()
            if question is None:
                raise UsageError("there is nothing to answer again: write a message first")
            return self._answer(self.messages[: question + 1])
        parts = [text, *(f"File {file.name}:\n\n{file.text}" for file in self.attached)]
        return self._answer([*self.messages, {"role": "user", "content": "\n\n".join(parts)}])

    def go_on(self) -> Answer:
        """Continue the last answer where it ended.

        Raises UsageError if there is none, and as `ask` does.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UsageError("there is no answer to go on with: write a message first")
        return self._answer(self.messages[:-1], self.messages[-1]["content"])

    def _answer(self, before: list[Message], begun: str = "") -> Answer:
        room = self.model.ctx_size
        tail = self.model.tokenizer.encode(begun, bos=False) if begun else []

        def rendered(messages: list[Message]) -> list[int]:
            return [*self.model.render(messages), *tail]

        dropped = self.dropped
        if self.shift:
            limit = self.settings.get("max_tokens")
            dropped = window.shift(before, dropped, lambda messages: len(rendered(messages)), room, limit)
        ids = rendered(window.visible(before, dropped))
        if len(ids) >= room:
            alone = self.shift or self.count(before[-1:]) >= room
            raise UsageError(self._full(len(ids), alone, continued=bool(begun)))
        defaults = {name: value for name, value in DEFAULTS.items() if value is not None}
        return Answer(self.model, before, ids, defaults | self.settings, dropped, begun)

    def _full(self, tokens: int, alone: bool, continued: bool) -> str:
        """Return the message about a full context; alone: the user's message does not fit by itself."""
        what = "the conversation" if continued else "with this message the conversation"
        remedy = "Shorten the message, or start" if alone and not continued else "Start"
        if not alone and self.at_terminal:
            remedy = "/clear or /undo makes room (/save first to keep it), or start"
        kept = " Nothing is lost: arrow up brings the message back." if self.at_terminal and not continued else ""
        shift = "" if self.shift else " or with --context-shift" if not alone else ""
        return (
            f"the context is full: {what} takes {tokens:,} of {self.model.ctx_size:,} tokens. {remedy} with a larger "
            f"--ctx-size{shift}.{kept}"
        )

    def keep(self, answer: Answer) -> Turn | None:
        """End an answer and add it to the conversation, unless it is empty; return its statistics."""
        turn = answer.close()
        if turn is not None:
            message: Message = {"role": "assistant", "content": answer.begun + answer.text}
            if turn.ended == "stopped":
                message["stopped"] = True
            self.messages, self.last = [*answer.before, message], turn
            self.dropped, self.attached = answer.dropped, []
        return turn

    def attach(self, path: str) -> Attachment:
        """Read a text file that goes with the next message.

        Raises UsageError for what is no UTF-8 text, is empty, or alone does not fit in the context.
        """
        target = transcript.expand(path)
        data = transcript.read_bytes(target, f"there is no file {target}: check the path", "no context holds it")
        text = decode_text(data, str(target)).strip("\n")
        if not text.strip():
            raise UsageError(f"{target} is empty")
        tokens = len(self.model.tokenizer.encode(text, bos=False))
        if tokens >= self.model.ctx_size:
            raise UsageError(
                f"{target} has {tokens:,} tokens, the context {self.model.ctx_size:,}: give a part of it, or start "
                "with a larger --ctx-size"
            )
        self.attached.append(Attachment(target.name, text, tokens))
        return self.attached[-1]

    def undo(self) -> bool:
        """Forget the last message and its answer; return whether there was one."""
        question = self.last_question()
        if question is None:
            return False
        self.messages, self.last, self.dropped = self.messages[:question], None, 0
        return True

    def record(self) -> dict[str, Any]:
        """Return the data to save."""
        return {"model": self.name, "settings": self.settings, "messages": self.messages}

    def save(self, path: str) -> Path:
        """Write the conversation as JSON. Raises UsageError rather than overwrite another kind of file."""
        target = transcript.expand(path)
        transcript.check_target(target)
        transcript.write(target, self.record())
        return target

    def load(self, path: str | Path) -> str | None:
        """Load a conversation, and settings if the file has any; return the name of the model it was saved with.

        Raises UsageError, with the conversation as it was, for a file that is not one of `save`'s.
        """
        target = transcript.expand(str(path))
        record = transcript.read(target)
        messages = transcript.messages(target, record)
        try:
            settings = check_settings(record["settings"]) if "settings" in record else self.settings
            if messages:
                template.turns(messages)
        except GemkitError as error:
            raise UsageError(f"{target}: {error!s:.300}") from None
        self.clear()
        self.messages, self.settings = messages, settings
        name = record.get("model")
        return name[:80] if isinstance(name, str) else None


def share(part: int, whole: int) -> str:
    """Return a part of a whole in percent, rounded up."""
    return f"{math.ceil(100 * part / whole)}%"
