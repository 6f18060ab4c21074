"""The answer to one prompt as it is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gemkit.api.output import Completion, Piece
from gemkit.errors import UsageError

if TYPE_CHECKING:
    from gemkit.engine.engine import Engine
    from gemkit.engine.request import Request, Token


class Stream(Iterator[Piece]):
    """An iterator of `Piece`, one per token; a context manager that closes it.

    Generation begins with the first piece. A piece is empty while a character or a possible stop text is incomplete;
    together they are the text that `Model.generate` returns.

    ended: called with the completion when the stream ends or is closed.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self._request = engine, request
        self.ended: Callable[[Completion], None] | None = None
        self._tokens: Iterator[Token] | None = None
        self._count = 0
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion:
        """The pieces so far as a `Completion` with its usage; of a closed stream, the finish reason is "cancelled".

        Raises UsageError before the stream has ended.
        """
        if self._completion is None:
            raise UsageError("the stream has not ended: read it to its end, or close it, before its completion")
        return self._completion

    def close(self) -> None:
        """Cancel the rest; nothing happens if the stream has ended."""
        if self._completion is not None:
            return
        if self._tokens is not None:
            self._engine.cancel(self._request)
        self._completion = Completion._of(self._request, self._count)
        if self.ended is not None:
            self.ended(self._completion)

    def __next__(self) -> Piece:
        if self._completion is not None:
            raise StopIteration
        try:
            if self._tokens is None:
                self._tokens = self._engine.stream(self._request)
                self._engine.submit(self._request)
            token = next(self._tokens)
        except BaseException:
            self.close()
            raise
        self._count += 1
        return Piece._of(token)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
