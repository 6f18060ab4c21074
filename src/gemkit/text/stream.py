"""Streaming decoder: whole characters only, and no part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol

from gemkit.errors import GemkitError


class TokenBytes(Protocol):
    """Tokenizer interface of a stream."""

    def token_bytes(self, token: int, skip_control: bool = True) -> bytes: ...


class StreamDecoder:
    """Decode ids one by one; a character of several byte tokens is held back until it is complete.

    All pushes and the flush together give what `Tokenizer.decode` gives for all the ids.
    """

    __slots__ = ("_decoder", "_skip_control", "_tokenizer")

    def __init__(self, tokenizer: TokenBytes, skip_control: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_control = skip_control
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that this token completes, often one word, sometimes an empty string."""
        return self._decoder.decode(self._tokenizer.token_bytes(token, self._skip_control))

    def flush(self) -> str:
        """Return U+FFFD for a character that stayed incomplete, and reset the decoder."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class StopMatcher:
    """Pass text on until a stop string is complete; hold back a possible start of one.

    stopped: whether one was found. The first to be complete counts, of several complete at once the longest, so that
    the result does not depend on how the text was cut. Raises GemkitError for an empty stop string.
    """

    __slots__ = ("_held", "_stops", "stopped")

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(isinstance(stop, str) and stop for stop in self._stops):
            raise GemkitError(f"stop strings are {self._stops!r:.80}: each must be a string of at least one character")
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return the text that can be passed on; after the stop string, an empty string."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that is a proper start of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
