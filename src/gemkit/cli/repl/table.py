"""Tables of Markdown: found in a text that grows, laid out for a terminal's width.

A table needs all of its rows before the first can be shown, since they share the widths of their columns. It is a line
that begins with a pipe, a line of dashes with as many cells, and the lines after it that begin with a pipe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gemkit.text.visible import visible

Fragment = tuple[str, str]  # text, style
Inline = Callable[[str, str], list[Fragment]]

MAX_ROWS = 200
MAX_LINE = 4000
# A column that is narrower than this is no help: each row is then shown as a list.
_NARROW = 6
_GAP = " │ "
_DELIMITER = re.compile(r"[ \t]*\|?([ \t]*:?-+:?[ \t]*\|)*[ \t]*:?-+:?[ \t]*\|?[ \t]*")
_BREAK = re.compile(r"<br ?/?>", re.IGNORECASE)


class Table(NamedTuple):
    """header and rows: texts of cells. align: "<", "^" or ">" by column. length: characters of source, with the end of
    the last line if it has one."""

    header: list[str]
    align: list[str]
    rows: list[list[str]]
    length: int


def find(text: str, final: bool) -> Table | int | None:
    """Return the table that a text begins with; None if it begins with something else.

    final: the text will not grow. Otherwise a table that may continue gives the number of its rows so far.
    """
    header, at = _line(text, 0)
    if at is None and not final:
        return None if len(text) > MAX_LINE else 0
    if at is None or len(header) > MAX_LINE:
        return None
    delimiter, end = _line(text, at)
    if end is None and not final:
        return 0 if re.fullmatch(r"[ \t|:-]*", delimiter) and len(delimiter) <= MAX_LINE else None
    names = _cells(header)
    if "|" not in delimiter or not _DELIMITER.fullmatch(delimiter) or len(_cells(delimiter)) != len(names):
        return None
    align = [{"::": "^", "-:": ">"}.get(cell[0] + cell[-1], "<") for cell in _cells(delimiter)]
    rows: list[list[str]] = []
    while end is not None and len(rows) < MAX_ROWS:
        line, after = _line(text, end)
        start = line.lstrip(" \t")
        if after is None and not final and len(line) <= MAX_LINE and (not start or start[0] == "|"):
            return len(rows)
        if not start.startswith("|") or len(line) > MAX_LINE:
            break
        row = _cells(line)
        # More cells than columns: the surplus is joined in the last one.
        rows.append([*row[: len(names) - 1], " | ".join(row[len(names) - 1 :])] if len(row) >= len(names) else row)
        end = after
    return Table(names, align, rows, len(text) if end is None else end)


def _line(text: str, start: int) -> tuple[str, int | None]:
    """Return the line that begins at an index, and the next line's index; None if it has no end yet."""
    end = text.find("\n", start)
    return (text[start:], None) if end < 0 else (text[start:end], end + 1)


def _cells(line: str) -> list[str]:
    line = line.strip(" \t").removeprefix("|")
    parts = re.split(r"(?<!\\)\|", line)
    if len(parts) > 1 and not parts[-1].strip():
        parts.pop()
    return [part.strip().replace("\\|", "|").replace("\t", " ") for part in parts]


def lay_out(table: Table, width: int, cells: Callable[[str], int], inline: Inline) -> list[list[Fragment]]:
    """Return the lines of a table that is at most `width` columns wide, as texts and styles.

    cells: the columns that a text takes. inline: the texts and styles of a cell's source, in a style.
    """
    head = [_lines(name, "bold", inline) for name in table.header]
    body = [[_lines(cell, "", inline) for cell in row] for row in table.rows]
    body = [[*row, *[[[]]] * (len(head) - len(row))] for row in body]
    widths = [max(_width(line, cells) for row in [head, *body] for line in row[at]) for at in range(len(head))]
    space = width - len(_GAP) * (len(head) - 1)
    if sum(widths) > space:
        if space < _NARROW * len(head):
            return _as_lists(table, width, cells, inline)
        widths = _shrink(widths, space)
    out = []
    for number, row in enumerate([head, *body]):
        wrapped = [_wrap(cell, limit, cells) for cell, limit in zip(row, widths)]
        for at in range(max(map(len, wrapped))):
            line: list[Fragment] = []
            for column, (cell, limit, side) in enumerate(zip(wrapped, widths, table.align)):
                spare = limit - _width(cell[at], cells) if at < len(cell) else limit
                left = {"<": 0, "^": spare // 2, ">": spare}[side]
                line += [(_GAP, "dim")] if column else []
                line += [(" " * left, ""), *(cell[at] if at < len(cell) else []), (" " * (spare - left), "")]
            out.append(_trimmed(line))
        if number == 0:
            out.append([("─┼─".join("─" * limit for limit in widths), "dim")])
    return out


def _shrink(widths: Sequence[int], space: int) -> list[int]:
    """Return widths that fit, taken from the widest columns."""
    widths = list(widths)
    while sum(widths) > space:
        widths[widths.index(max(widths))] -= 1
    return widths


def _as_lists(table: Table, width: int, cells: Callable[[str], int], inline: Inline) -> list[list[Fragment]]:
    """Return each row as lines of name and value, for a terminal that is too narrow for columns."""
    out: list[list[Fragment]] = []
    for row in table.rows or [[""] * len(table.header)]:
        out += [[("─" * min(24, width), "dim")]]
        for name, cell in zip(table.header, [*row, *[""] * (len(table.header) - len(row))]):
            value = _lines(f"{cell}", "", inline)
            value[0] = [*_lines(f"{name}:", "bold", inline)[0], (" ", ""), *value[0]]
            out += [_trimmed(line) for line in _wrap(value, width, cells)]
    return out


def _lines(cell: str, style: str, inline: Inline) -> list[list[Fragment]]:
    """Return a cell's lines, cut at <br>."""
    return [
        [(visible(text), kind) for text, kind in inline(part.strip(), style) if text] for part in _BREAK.split(cell)
    ]


def _width(line: list[Fragment], cells: Callable[[str], int]) -> int:
    return sum(cells(text) for text, _ in line)


def _trimmed(line: list[Fragment]) -> list[Fragment]:
    while line and not line[-1][0].strip(" "):
        line.pop()
    return line


def _wrap(lines: list[list[Fragment]], limit: int, cells: Callable[[str], int]) -> list[list[Fragment]]:
    """Return lines broken between words, or within a word that is too long, or before a wide character."""
    out: list[list[Fragment]] = []
    for line in lines:
        if _width(line, cells) <= limit:
            out.append(line)
            continue
        current: list[Fragment] = []
        used = 0
        for unit, size in _units(line, limit, cells):
            is_space = not unit[0][0].strip(" ")
            if used + size > limit and not is_space:
                out.append(_trimmed(current))
                current, used = [], 0
            if current or not is_space:
                current += unit
                used += size
        out.append(_trimmed(current))
    return out


def _units(line: list[Fragment], limit: int, cells: Callable[[str], int]) -> list[tuple[list[Fragment], int]]:
    """Return a line's words and spaces with their widths: what may not be parted. A word may have several styles."""
    units: list[tuple[list[Fragment], int]] = []
    glue = False  # the last unit is a word that may continue
    for text, style in line:
        for part in re.findall(r" +|[^ ]+", text):
            if part[0] == " ":
                units.append(([(part, style)], cells(part)))
                glue = False
                continue
            for character in part:
                size = cells(character)
                grown = units[-1][1] + size if glue else size
                if glue and size < 2 and grown <= limit:
                    units[-1] = ([*units[-1][0], (character, style)], grown)
                else:
                    units.append(([(character, style)], size))
                glue = size < 2
    return units
