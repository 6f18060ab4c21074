"""Control tokens written as text, as in a prompt that another program rendered."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

# How published vocabularies write their control tokens: a quick look at a text needs no list of them.
SHAPE = re.compile(r"[<\[][^<>\[\]\s]{3,64}[>\]]")

_PREFIX = 4  # characters by which a name is found before it is looked up


class ControlNames:
    """The names of a vocabulary's control tokens, found in text from left to right, the longest first.

    names: ids by name, as text has them. One compiled search finds where a name may begin.
    """

    def __init__(self, names: Mapping[str, int]) -> None:
        self._ids = dict(names)
        lengths: dict[str, set[int]] = {}
        for name in names:
            lengths.setdefault(name[:_PREFIX], set()).add(len(name))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        self._search = re.compile("|".join(map(re.escape, sorted(lengths, key=len, reverse=True)))).search

    def split(self, text: str) -> list[str | int]:
        """Return the text's parts in order: an id for each control token, the text between them, none of it empty."""
        parts: list[str | int] = []
        end = 0
        for start, stop, token in self.find(text):
            parts += [text[end:start], token]
            end = stop
        return [part for part in [*parts, text[end:]] if part != ""]

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield start, end and id of each control token."""
        at = 0
        while found := self._search(text, at):
            at = found.start()
            names = (text[at : at + length] for length in self._lengths[found[0]])
            name = next((name for name in names if name in self._ids), None)
            if name is None:
                at += 1
                continue
            yield at, at + len(name), self._ids[name]
            at += len(name)
