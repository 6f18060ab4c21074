"""Streaming Markdown: pieces of source in, styled text out, immediately and final.

Output is never changed, so that the screen does not flicker and scrollback stays valid. A marker is held back until
its meaning is known: that of a block (a heading's #, a list's -) until its line shows it, that of a phrase (`**`, a
backtick, a link's bracket) until its partner on the same line, `PHRASE` characters at most. One without a partner is
plain text. A table is held back until its last row; its source is that of one empty span in front of it. Every
character of the source is in exactly one span's ``source``, in order, however the source was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from gemkit.cli.repl import table

PHRASE = 160
_FENCE_INFO = 80
_INDENT = 400
_RULE = "─" * 24
_ESCAPABLE = "*_`#~|>"
_STYLES = {
    "*": "italic",
    "**": "bold",
    "***": "bold italic",
    "_": "italic",
    "__": "bold",
    "___": "bold italic",
    "~~": "strike",
}


class Span(NamedTuple):
    """Styled text. text: as shown. style: words such as "bold code". source: its Markdown, "" shown or not.

    hang: the beginning of continuation lines of a wrapped line; None if the line is not to be wrapped.
    """

    text: str
    style: str
    source: str
    hang: str | None = ""


class Markdown:
    """The state of a text that is not complete. `feed` takes a piece, `finish` ends it; both return spans.

    width: the columns that a table may take, asked when it is shown. cells: the columns of a text.
    rows: of the table that waits for its end, None if there is none.
    """

    def __init__(self, width: Callable[[], int] = lambda: 80, cells: Callable[[str], int] = len) -> None:
        self._width, self._cells = width, cells
        self.rows: int | None = None
        self._text = ""  # held back
        self._line_start = True
        self._previous = "\n"  # the last source character that is out
        self._style = ""  # of the line
        self._hang: str | None = ""
        self._quoted = False
        self._fence = ""  # the open fence's characters
        self._out: list[Span] = []

    def feed(self, piece: str) -> list[Span]:
        """Return the output that this piece completes."""
        self._text += piece
        return self._run(final=False)

    def finish(self) -> list[Span]:
        """Return the text held back, and reset for a new text."""
        spans = self._run(final=True)
        self.__init__(self._width, self._cells)
        return spans

    def _run(self, final: bool) -> list[Span]:
        while self._text:
            step = self._begin_line if self._line_start else self._go_on
            if not step(final):
                break
        spans, self._out = self._out, []
        return spans

    def _emit(self, count: int, style: str | None = None, text: str | None = None) -> None:
        """Output the first characters of the text held back, or another text in their place."""
        source, self._text = self._text[:count], self._text[count:]
        shown = source if text is None else text
        self._previous = source[-1]
        self._out.append(Span(shown, self._style if style is None else style, source, self._hang))

    # Lines

    def _begin_line(self, final: bool) -> bool:
        """Detect the kind of a line and show its marker; return False if more is needed to know."""
        if not self._quoted:
            self._style, self._hang = "", ""
        if self._fence:
            return self._begin_code_line(final)
        indent = len(self._text) - len(self._text.lstrip(" \t"))
        rest = self._text[indent:]
        known = final or indent >= _INDENT
        if not rest and not known:
            return False
        if rest[:3] in ("```", "~~~") and not self._quoted:
            return self._open_fence(indent, rest, final)
        if rest in ("`", "``", "~", "~~") and not known:
            return False
        if rest.startswith("|"):
            if not self._quoted and (done := self._table(final)) is not None:
                return done
            self._hang = None
        elif rest.startswith(">"):
            return self._quote(indent, rest, final)
        elif rest[:1] == "#":
            if (done := self._heading(indent, rest, final)) is not None:
                return done
        elif rest[:1] in tuple("-*_+"):
            if (done := self._item_or_rule(indent, rest, final)) is not None:
                return done
        elif rest[:1].isdecimal() and rest[:1].isascii():
            match = re.match(r"([0-9]{1,9}(?:[.)]|$))([ \t]*)", rest)
            if match and match.end() == len(rest) < _FENCE_INFO and not final:
                return False
            if match and match[2]:
                number = " " * indent + match[1] + " "
                return self._marker(indent + match.end(), number, len(number))
        if indent:
            self._hang = None if self._hang is None else self._hang + " " * indent
            self._emit(indent)
        return self._begun()

    def _table(self, final: bool) -> bool | None:
        """Show a whole table; None if the line begins none."""
        found = table.find(self._text, final)
        self.rows = found if isinstance(found, int) else None
        if not isinstance(found, table.Table):
            return None if found is None else False
        self._hang = None
        self._emit(found.length, "", "")
        lines = table.lay_out(found, self._width() - 1, self._cells, _cell)
        for number, line in enumerate(lines):
            self._out += [Span(text, style, "", None) for text, style in line]
            if number < len(lines) - 1 or self._previous == "\n":
                self._out.append(Span("\n", "", "", None))
        return True

    def _begun(self) -> bool:
        self._line_start = self._quoted = False
        return True

    def _marker(self, count: int, text: str | None, width: int) -> bool:
        """Show a list's marker; continuation lines are indented to its text."""
        hang = (self._hang or "") + " " * width
        self._emit(count, "marker", text)
        self._hang = hang
        return self._begun()

    def _heading(self, indent: int, rest: str, final: bool) -> bool | None:
        match = re.match(r"#{1,6}(?:[ \t]+|(?=\n)|$)", rest)
        if match is None or indent > 3:
            return None
        if match.end() == len(rest) and not final:
            return False
        if not match[0].endswith((" ", "\t")):
            return None
        self._style = "heading"
        self._emit(indent + match.end(), text="")
        return self._begun()

    def _item_or_rule(self, indent: int, rest: str, final: bool) -> bool | None:
        """Return a bullet, or a line of -, * or _ alone; None if it is text."""
        mark = rest[0]
        run = re.match(rf"[{re.escape(mark)} \t]+", rest)[0]
        if mark != "+" and run.count(mark) >= 3 and len(rest) > len(run) and rest[len(run)] == "\n":
            self._hang = None
            self._emit(indent + len(run), "dim", _RULE)
            return self._begun()
        if len(run) == len(rest) and len(run) < _FENCE_INFO and not final:
            return False
        if mark == "_" or run[1:2] not in (" ", "\t"):
            return None
        if len(run) == len(rest) and mark != "+" and run.count(mark) >= 3:
            return None
        gap = len(run[1:]) - len(run[1:].lstrip(" \t"))
        return self._marker(indent + 1 + gap, " " * indent + "• ", indent + 2)

    def _quote(self, indent: int, rest: str, final: bool) -> bool:
        if len(rest) < 2 and not final:
            return False
        count = 2 if rest[1:2] == " " else 1
        bar = (self._hang or "") + "│ "
        self._hang = ""
        self._emit(indent + count, "dim", "│ ")
        self._style, self._hang, self._quoted = "quote", bar, True
        return True

    # Fenced code

    def _open_fence(self, indent: int, rest: str, final: bool) -> bool:
        """Open a fence, for which the whole line is needed: its start may also be a phrase of code."""
        run = re.match(rf"{rest[0]}+", rest)[0]
        end = rest.find("\n", 0, _FENCE_INFO)
        if end < 0 and len(rest) < _FENCE_INFO and not final:
            return False
        info = rest[len(run) : end if end >= 0 else len(rest)]
        if (end < 0 and len(rest) >= _FENCE_INFO) or "`" in info:
            return self._begun()
        self._fence, self._hang = run, None
        words = info.split()
        label = f"── {words[0]} " if words else ""
        self._emit(indent + len(run) + len(info), "dim", label + _RULE[len(label) :])
        return self._begun()

    def _begin_code_line(self, final: bool) -> bool:
        """Show a line of code as it is, or the fence that closes it."""
        self._hang = None
        match = re.match(rf"[ \t]*{self._fence[0]}{{{len(self._fence)},}}[ \t]*(?=\n|$)", self._text)
        if match and (final or match.end() < len(self._text)):
            self._fence = ""
            self._emit(match.end(), "dim", _RULE)
            return self._begun()
        partial = re.fullmatch(rf"[ \t]*{self._fence[0]}*[ \t]*", self._text)
        if partial and len(self._text) < _INDENT and not final:
            return False
        self._style = "block"
        return self._begun()

    # Inline content

    def _go_on(self, final: bool) -> bool:
        """Show text up to the next marker or the line's end; return False if more is needed."""
        end = self._text.find("\n")
        if end == 0:
            self._emit(1, "")
            self._line_start = True
            return True
        line = self._text if end < 0 else self._text[:end]
        if self._style == "block" or self._hang is None:
            self._emit(len(line))
            return True
        spans, used = inline(line, self._style, self._previous, final or end >= 0)
        self._out += [span._replace(hang=self._hang) for span in spans]
        if used:
            self._previous = self._text[used - 1]
            self._text = self._text[used:]
        return used == len(line)


def _cell(text: str, style: str) -> list[tuple[str, str]]:
    """Return the text of a table's cell, with styles."""
    return [(span.text, span.style) for span in inline(text, style, " ", True)[0]]


def inline(line: str, style: str, previous: str, final: bool) -> tuple[list[Span], int]:
    """Return the spans of a line's beginning and how many of its characters they take; all of them if it is final.

    previous: the character before the line.
    """
    spans: list[Span] = []
    start = at = 0

    def plain(end: int) -> None:
        if end > start:
            spans.append(Span(line[start:end], style, line[start:end]))

    while at < len(line):
        character = line[at]
        if character not in "*_`~[\\":
            at += 1
            continue
        before = line[at - 1] if at else previous
        if character == "\\":
            if at + 1 == len(line) and not final:
                break
            if line[at + 1 : at + 2] and line[at + 1] in _ESCAPABLE:
                plain(at)
                spans.append(Span(line[at + 1], style, line[at : at + 2]))
                at = start = at + 2
            else:
                at += 1
            continue
        window = line[at : at + PHRASE]
        found = _phrase(window, before, style, final or len(line) > at + PHRASE)
        if found is None:
            break
        inner, count = found
        if inner:
            plain(at)
            spans += inner
            start = at + count
        at += count
    else:
        plain(at)
        return spans, at
    plain(at)
    return spans, at


def _phrase(window: str, before: str, style: str, whole: bool) -> tuple[list[Span], int] | None:
    """Return the phrase at a window's start: its spans and length; no spans and the marker's length if it is text.

    whole: the window will not grow. Returns None if the result depends on later text.
    """
    mark = window[0]
    if mark == "[":
        return _link(window, style, whole)
    run = re.match(rf"{re.escape(mark)}+", window)[0]
    size = len(run)
    if size == len(window) and not whole:
        return None
    if mark == "`":
        found = _closing(window, run, whole, code=True)
    elif run not in _STYLES or window[size : size + 1].isspace() or size == len(window) or _is_word(before):
        found = 0
    else:
        found = _closing(window, run, whole, code=False)
    if found is None:
        return None
    if not found:
        return [], size
    text = window[size:found]
    if mark == "`":
        spans = [Span(text, f"{style} code".strip(), text)]
    else:
        spans, _ = inline(text, f"{style} {_STYLES[run]}".strip(), mark, True)
    return [Span("", "", run), *spans, Span("", "", run)], found + size


def _closing(window: str, run: str, whole: bool, code: bool) -> int | None:
    """Return the index of the run that closes a phrase, 0 if there is none, None if it may still follow."""
    for match in re.finditer(rf"{re.escape(run[0])}+", window):
        if match.start() < len(run) + 1 or (match[0] != run and match.end() < len(window)):
            continue
        if match.end() == len(window) and not whole:
            return None
        if match[0] != run:
            continue
        after = window[match.end() : match.end() + 1]
        if code or (not window[match.start() - 1].isspace() and not (run[0] == "_" and _is_word(after))):
            return match.start()
    return 0 if whole else None


def _link(window: str, style: str, whole: bool) -> tuple[list[Span], int] | None:
    """Parse [text](address): the text underlined, followed by the address."""
    match = re.match(r"\[([^\[\]]*)(?:(\]\()([^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(\))?)?", window)
    text, opened, address, closed = match.groups()
    if closed:
        if not text or not address:
            return [], 1
        spans, _ = inline(text, f"{style} link".strip(), "[", True)
        where = [Span(" (", "dim", opened), Span(address, "dim", address), Span(")", "dim", closed)]
        return [Span("", "", "["), *spans, *where], match.end()
    rest = window[match.end() :]
    could_grow = not rest or (rest == "]" and not opened) or (opened and rest.startswith("(") and ")" not in rest)
    return None if could_grow and not whole else ([], 1)


def _is_word(character: str) -> bool:
    """Return whether it is part of a word of a script with spaces, where emphasis cannot begin."""
    return character == "_" or (character.isalnum() and ord(character) < 0x2E80)
