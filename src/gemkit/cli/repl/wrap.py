"""Lines broken between words, as they stream: what is out is never changed.

A word goes out as soon as it comes unless it might not fit into its line; then it waits for its end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from gemkit.cli.repl.markdown import Span

Fragment = tuple[str, str]

# A word that begins so far from the edge is shown before it is complete.
_NEAR = 16
_TAB = 8
_UNITS = re.compile(r"\n|[ \t]+|[^ \t\n]+")


class Wrap:
    """The state of an open line. width: returns the terminal's columns, called for every word, since it may change.

    cells: the columns that a text takes. `feed` and `finish` return (style, text) in order. A soft break replaces
    the spaces between two words, or is inserted before a wide character; no other text is added or lost.
    """

    def __init__(self, width: Callable[[], int], cells: Callable[[str], int]) -> None:
        self._width, self._cells = width, cells
        self._column = 0
        self._spaces: list[Fragment] = []
        self._word: list[Fragment] = []
        self._word_cells = 0
        self._inside = False  # the beginning of this word is out
        self._hang = ""
        self._out: list[Fragment] = []

    def feed(self, spans: Iterable[Span]) -> list[Fragment]:
        """Return what can be shown with these spans."""
        for text, style, _, hang in spans:
            if hang is None:
                self._place()
                self._flush_spaces()
                self._raw(style, text)
                continue
            self._hang = hang
            for unit in _UNITS.findall(text):
                if unit == "\n":
                    self._place()
                    self._flush_spaces()
                    self._raw(style, unit)
                elif unit[0] in " \t":
                    self._place()
                    self._spaces.append((style, unit))
                else:
                    self._add(style, unit)
        if self._word and (self._inside or self._spare() >= _NEAR):
            self._place(whole=False)
        return self._take()

    def finish(self) -> list[Fragment]:
        """Return what still waits."""
        self._place()
        self._flush_spaces()
        return self._take()

    def _take(self) -> list[Fragment]:
        fragments, self._out = self._out, []
        return fragments

    def _add(self, style: str, text: str) -> None:
        """Add to the word. A line may break at each wide character: most of their scripts have no spaces."""
        if text.isascii():
            self._word.append((style, text))
            self._word_cells += len(text)
            return
        for character in text:
            cells = self._cells(character)
            if cells > 1:
                self._place()
            self._word.append((style, character))
            self._word_cells += cells

    def _spare(self) -> int:
        """Return columns left after the spaces and the word that wait."""
        spaces = sum(len(text) for _, text in self._spaces)
        return self._width() - 1 - self._column - spaces - self._word_cells

    def _place(self, whole: bool = True) -> None:
        """Output the word; whole: it is complete."""
        if self._word:
            if not self._inside and self._spare() < 0 and self._column > len(self._hang):
                self._spaces.clear()
                self._raw("", "\n")
                self._raw("dim", self._hang)
            self._flush_spaces()
            for style, text in self._word:
                self._raw(style, text)
            self._word.clear()
            self._word_cells = 0
        self._inside = not whole

    def _flush_spaces(self) -> None:
        for style, text in self._spaces:
            self._raw(style, text)
        self._spaces.clear()

    def _raw(self, style: str, text: str) -> None:
        if not text:
            return
        self._out.append((style, text))
        _, newline, line = text.rpartition("\n")
        if newline:
            self._column = 0
        for part in re.findall(r"\t|[^\t]+", line):
            self._column += _TAB - self._column % _TAB if part == "\t" else self._cells(part)
        # A line that the terminal broke continues at its left edge.
        self._column %= max(1, self._width())
