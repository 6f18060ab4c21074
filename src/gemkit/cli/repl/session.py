"""A conversation as the chat keeps it: messages, settings, how the last answer went; saved and loaded as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemkit.api.options import GenerateOptions
from gemkit.cli import sampling
from gemkit.cli.common import decode_text
from gemkit.cli.repl import transcript
from gemkit.cli.repl.transcript import Message
from gemkit.errors import GemkitError, UsageError
from gemkit.text import chat as template
from gemkit.text import window

if TYPE_CHECKING:
    from gemkit.api.model import Model
    from gemkit.api.output import Completion, Piece, Usage

# The settings of a conversation, with the values of those that were not given; `/set` lists them in this order.
_ORDER = (*sampling.NAMES[1:-1], "max_tokens", "seed")
DEFAULTS: dict[str, object] = {name: getattr(GenerateOptions, name) for name in _ORDER}


def check_settings(settings: dict[str, object]) -> dict[str, object]:
    """Return settings as `Model.stream` takes them, None left out; raises UsageError for an unknown name or value."""
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given:
        if name not in DEFAULTS:
            raise UsageError(f"there is no setting {name!r:.40}: choose from {', '.join(DEFAULTS)}")
    checked = GenerateOptions(**given)
    return {name: getattr(checked, name) for name in given}


@dataclass(frozen=True)
class Turn:
    """The end of an answer.

    ended: "stop" (the model ended it), "length" (max_tokens), "context" (it is full) or "stopped" (the user did).
    """

    usage: Usage
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
        options: GenerateOptions,
        dropped: int = 0,
        begun: str = "",
    ) -> None:
        self.before, self.dropped, self.begun = before, dropped, begun
        self.prompt_tokens, self._limit = len(ids), options.max_tokens
        self._stream = model.stream(ids, options=options)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._stream)

    def close(self) -> Completion:
        """Cancel the rest; return what has come."""
        self._stream.close()
        return self._stream.completion

    @property
    def ended(self) -> str:
        """The reason of the end, as in `Turn`."""
        completion = self._stream.completion
        if completion.finish_reason == "length":
            return "length" if len(completion.ids) == self._limit else "context"
        return {"cancelled": "stopped"}.get(completion.finish_reason, completion.finish_reason)


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

        options, dropped = GenerateOptions(**self.settings), self.dropped
        if self.shift:
            dropped = window.shift(before, dropped, lambda messages: len(rendered(messages)), room, options.max_tokens)
        ids = rendered(window.visible(before, dropped))
        if len(ids) >= room:
            alone = self.shift or self.count(before[-1:]) >= room
            raise UsageError(self._full(len(ids), alone, continued=bool(begun)))
        return Answer(self.model, before, ids, options, dropped, begun)

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
        completion = answer.close()
        if not completion.ids:
            return None
        message: Message = {"role": "assistant", "content": answer.begun + completion.text}
        if answer.ended == "stopped":
            message["stopped"] = True
        self.messages, self.last = [*answer.before, message], Turn(completion.usage, answer.ended)
        self.dropped, self.attached = answer.dropped, []
        return self.last

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
