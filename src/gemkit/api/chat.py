"""A conversation with a model, which keeps its own history."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gemkit.api.output import Completion, Piece
from gemkit.errors import GemkitWarning, UsageError, brief, check_flag
from gemkit.text import window

if TYPE_CHECKING:
    from gemkit.api.model import Model


class Chat:
    """A conversation with a model. ``messages`` is its history: dictionaries with "role" and "content".

    dropped: how many of its oldest messages the model does not see, the system's not counted.
    """

    def __init__(self, model: Model, system: str | None, options: dict[str, Any], context_shift: bool = False) -> None:
        if system is not None and not isinstance(system, str | list | tuple):
            raise UsageError(f"system is {brief(system)}; give a text")
        self.model = model
        self.context_shift, self.dropped = check_flag("context_shift", context_shift), 0
        model._check_options(options)
        self.options = {"temperature": 1.0, **options}
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def send(self, text: str, **options: Any) -> Completion:
        """Says something and returns the answer; both join the history, neither does after an error."""
        self.model._check_options(options)
        turn = {"role": "user", "content": text}
        answer = self.model.generate(self._seen(turn, options), **self.options | options)
        self.messages += [turn, {"role": "assistant", "content": answer.text}]
        return answer

    def stream(self, text: str, **options: Any) -> Iterator[Piece]:
        """Says something and yields the answer piece by piece; what was said until the iterator is closed is kept."""
        self.model._check_options(options)
        turn = {"role": "user", "content": text}
        return self._stream(turn, self.model.stream(self._seen(turn, options), **self.options | options))

    def _seen(self, turn: dict[str, str], options: dict[str, Any]) -> list[Mapping[str, Any]]:
        """The messages that the model sees, this one among them; warns when more of the oldest are left out."""
        messages = [*self.messages, turn]
        if not self.context_shift:
            return messages

        def count(some: list[Mapping[str, Any]]) -> int:
            return len(self.model.render(some))

        asked = (self.options | options).get("max_tokens")
        dropped = window.shift(
            messages, self.dropped, count, self.model.ctx_size, asked if isinstance(asked, int) else None
        )
        if dropped > self.dropped:
            warnings.warn(
                f"the context is full: the {dropped} oldest messages are left out from here on (context_shift)",
                GemkitWarning,
                stacklevel=3,
            )
        self.dropped = dropped
        return window.visible(messages, dropped)

    def _stream(self, turn: dict[str, str], pieces: Iterator[Piece]) -> Iterator[Piece]:
        said = []
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            pieces.close()
            if said:
                self.messages += [turn, {"role": "assistant", "content": "".join(said)}]
