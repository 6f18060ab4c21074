"""A conversation with a model, which keeps its own history."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

from gemkit.api.options import GenerateKeywords, GenerateOptions, merged
from gemkit.api.output import Completion
from gemkit.errors import GemkitWarning, UsageError, brief, check_flag
from gemkit.text import window

if TYPE_CHECKING:
    from gemkit.api.model import Model
    from gemkit.api.stream import Stream


class Chat:
    """A conversation with a model; `Model.chat` makes one.

    model: the model.
    options: the options of every answer that is not given others.
    context_shift: leave out the oldest messages when the context is full.
    messages: the history, dictionaries with "role" and "content".
    dropped: the number of its oldest messages that the model does not see, the system's not counted.
    """

    def __init__(self, model: Model, system: str | None, options: GenerateOptions, context_shift: bool = False) -> None:
        if system is not None and not isinstance(system, str | list | tuple):
            raise UsageError(f"system is {brief(system)}; give a text")
        self.model = model
        self.context_shift, self.dropped = check_flag("context_shift", context_shift), 0
        model.check_options(options)
        self.options = options
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def send(
        self, text: str, *, options: GenerateOptions | None = None, **keywords: Unpack[GenerateKeywords]
    ) -> Completion:
        """Send a message and return the answer; both join the history, neither does after an error.

        options: in place of the conversation's own. Its fields may be given as keywords too; a keyword replaces the
            field for this answer.
        """
        options = merged(GenerateOptions, self.options if options is None else options, keywords)
        turn = {"role": "user", "content": text}
        answer = self.model.generate(self._seen(turn, options), options=options)
        self._keep(turn, answer)
        return answer

    def stream(
        self, text: str, *, options: GenerateOptions | None = None, **keywords: Unpack[GenerateKeywords]
    ) -> Stream:
        """Send a message and return the answer as an iterator of pieces; an answer that is closed early is kept too.

        The arguments are those of `send`. The history grows when the stream ends, if there was a piece.
        """
        options = merged(GenerateOptions, self.options if options is None else options, keywords)
        turn = {"role": "user", "content": text}
        stream = self.model.stream(self._seen(turn, options), options=options)
        stream.ended = lambda answer: self._keep(turn, answer)
        return stream

    def _keep(self, turn: dict[str, str], answer: Completion) -> None:
        if answer.ids:
            self.messages += [turn, {"role": "assistant", "content": answer.text}]

    def _seen(self, turn: dict[str, str], options: GenerateOptions) -> list[Mapping[str, Any]]:
        """Return the messages that the model sees, this one among them; warn when more of the oldest are left out."""
        messages = [*self.messages, turn]
        if not self.context_shift:
            return messages

        def count(some: list[Mapping[str, Any]]) -> int:
            return len(self.model.render(some))

        dropped = window.shift(messages, self.dropped, count, self.model.ctx_size, options.max_tokens)
        if dropped > self.dropped:
            warnings.warn(
                f"the context is full: the {dropped} oldest messages are left out from here on (context_shift)",
                GemkitWarning,
                stacklevel=3,
            )
        self.dropped = dropped
        return window.visible(messages, dropped)
