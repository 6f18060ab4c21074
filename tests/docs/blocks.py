"""Fenced blocks of the documents, by the convention that CONTRIBUTING.md states ("Documents").

A block without a language holds commands, one a line; lines that begin with "$ " have their output below them. A python
block is a program; a text block right behind it is its output. Other text blocks show something that is not typed. A
toml block is a configuration file.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

_FENCE = re.compile(r"^( *)```(\w*) *\n(.*?)^\1``` *$", re.MULTILINE | re.DOTALL)
LANGUAGES = ("", "python", "text", "toml")


@dataclass(frozen=True)
class Block:
    """line: of its first line in the page. output: of a program; None if the page does not show it."""

    line: int
    language: str
    text: str
    output: str | None = None


@dataclass(frozen=True)
class Step:
    """A command of a block; output: None if the page does not show it."""

    line: int
    command: str
    output: str | None = None


def blocks(page: Path) -> list[Block]:
    """All blocks of a page; the output of a program is joined to it."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(text):
        indent, language, body = match.groups()
        body = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        adjacent = not text[end : match.start()].strip()
        if language == "text" and adjacent and found and found[-1].language == "python":
            found[-1] = replace(found[-1], output=body)
        else:
            found.append(Block(text.count("\n", 0, match.start()) + 2, language, body))
        end = match.end()
    return found


def steps(block: Block) -> list[Step]:
    """The commands of a block without a language."""
    lines = block.text.splitlines()
    if not any(line.startswith("$ ") for line in lines):
        found: list[Step] = []
        for number, line in enumerate(lines, block.line):
            if found and found[-1].command.endswith("\\"):
                found[-1] = replace(found[-1], command=found[-1].command[:-1] + line.strip())
            elif line.strip():
                found.append(Step(number, line))
        return found
    found = []
    for number, line in enumerate(lines, block.line):
        if line.startswith("$ "):
            found.append(Step(number, line[2:], ""))
        else:
            assert found, f"line {number}: output without a command"
            found[-1] = replace(found[-1], output=f"{found[-1].output}{line}\n")
    return found
