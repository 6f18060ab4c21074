"""As much of a shell as the documents use: NAME=value before a command, pipes, <, >, quotes and comments.

`gemkit` runs in this process through its real entry point, with streams of its own. `echo` and `cat` are here too, and
`git`, which shows a small change; no program is started.
"""

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from click.testing import CliRunner

from gemkit.cli import main

_DIFF = "--- a/poem.txt\n+++ b/poem.txt\n@@ -1 +1 @@\n-Roses are red\n+Roses are blue\n"


@dataclass
class Part:
    """One program of a pipe."""

    words: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    source: str | None = None
    target: str | None = None


@dataclass
class Ran:
    """The result of a pipe. both: standard output and error as a terminal shows them."""

    code: int
    out: str = ""
    both: str = ""


def parse(command: str) -> list[Part]:
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|<>&;()")
    lexer.whitespace_split, lexer.commenters = True, "#"
    parts, into = [Part()], None
    try:
        words = list(lexer)
    except ValueError as error:
        raise AssertionError(f"not a command: {command} ({error})") from None
    for word in words:
        part = parts[-1]
        name, assigned, value = word.partition("=")
        if into is not None:
            setattr(part, into, word)
            into = None
        elif word == "|":
            parts.append(Part())
        elif word in ("<", ">"):
            into = "source" if word == "<" else "target"
        elif set(word) <= set("|<>&;()"):
            raise AssertionError(f"the documents' shell does not know {word}")
        elif assigned and name.isidentifier() and not part.words:
            part.environment[name] = value
        else:
            part.words.append(word)
    assert into is None and all(part.words for part in parts), f"not a command: {command}"
    return parts


def run(parts: list[Part], stdin: str, replace: Callable[[str], str]) -> Ran:
    """Runs a pipe in the current folder. stdin: its input. replace: turns a word into what it stands for here."""
    both, text = "", stdin
    for part in parts:
        words = [replace(word) for word in part.words]
        text = Path(part.source).read_text(encoding="utf-8") if part.source else text
        ran = _one(words, part.environment, text)
        both += ran.both if part is parts[-1] else ran.both.replace(ran.out, "")
        if ran.code:
            return Ran(ran.code, ran.out, both)
        if part.target:
            Path(part.target).write_text(ran.out, encoding="utf-8")
            both = both.replace(ran.out, "")
        text = "" if part.target else ran.out
    return Ran(0, text, both)


def _one(words: list[str], environment: dict[str, str], stdin: str) -> Ran:
    if words[0] == "echo":
        text = " ".join(words[1:]) + "\n"
        return Ran(0, text, text)
    if words[0] == "cat":
        text = "".join(Path(name).read_text(encoding="utf-8") for name in words[1:])
        return Ran(0, text, text)
    if words[0] == "git":
        return Ran(0, _DIFF, _DIFF)
    assert words[0] == "gemkit", f"the documents' shell does not know {words[0]}"
    if words[1] in ("convert", "quantize") and not words[3].startswith("-"):
        # They write no file that exists; on a page each line is an example of its own
        shutil.rmtree(words[3]) if os.path.isdir(words[3]) else Path(words[3]).unlink(missing_ok=True)
    result = CliRunner().invoke(_Gemkit(), words[1:], input=stdin, env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return Ran(result.exit_code, result.stdout, result.output)


class _Gemkit:
    """The entry point, in the shape that click's runner calls."""

    name = "gemkit"

    def main(self, args: list[str], prog_name: str) -> None:
        main(list(args))
