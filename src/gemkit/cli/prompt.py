"""The text of a call, such as the prompt of `generate`: words of the command line, files and standard input together.

Their order is words, files, standard input, with a blank line between two. One alone is taken exactly as it is.
A terminal is read only for `-`. Standard input is read in the background, so that a pipe and the model load at once.
"""

from __future__ import annotations

import io
import os
import stat
import sys
import threading
from collections.abc import Sequence

import click

from gemkit.cli.common import decode_text, read_text
from gemkit.cli.paths import check_text_file
from gemkit.errors import UsageError

STDIN = "-"
BETWEEN = "\n\n"
# Seconds after which a pipe that gives nothing is mentioned, so that a wait is no silent one.
PATIENCE = 2.0
# Seconds for an empty pipe to show itself before the model is looked for.
GLANCE = 0.2
# Seconds to wait for a pipe that its program may have left open, once the model is loaded.
MOMENT = 0.05


class Prompt:
    """The parts of a prompt. words: the arguments after MODEL. option: the text of `--prompt`. files: paths, or -.

    Raises UsageError for parts that contradict each other, and on a terminal where there is none of them.
    """

    def __init__(self, words: Sequence[str], option: str | None, files: Sequence[str]) -> None:
        words = tuple(words)
        if words and option not in (None, STDIN):
            raise UsageError("the prompt is given twice: as an argument and with --prompt; leave one out")
        explicit = STDIN in (option, *words[-1:], *files)
        words = words[:-1] if words[-1:] == (STDIN,) else words
        self._instruction = " ".join(words) if words else option if option != STDIN else None
        self._files = [(path, _read(path)) for path in files if path != STDIN]
        for path, text in self._files:
            if not text.strip():
                raise UsageError(f"{path} is empty: there is nothing to go on from")
        given = self._instruction is not None or bool(self._files)
        kind = input_kind()
        if not explicit and not given and kind in ("terminal", "none"):
            context = click.get_current_context(silent=True)
            verb = context.command_path if context is not None else "gemkit generate"
            chat = "; gemkit chat MODEL is a conversation" if verb.endswith(("generate", "run")) else ""
            raise UsageError(
                f'the text is missing: {verb} MODEL "TEXT", --file FILE or a pipe (- reads the terminal){chat}'
            )
        self._needed = explicit or not given
        # Arguments are typed interactively, where pipes end; programs that pass --prompt may leave theirs open.
        self._waits = self._needed or bool(words)
        self._input = _Input() if self._needed or kind == "data" else None
        if self._needed and self._input.ends_within(GLANCE):
            self._check(self._input.text())

    def text(self) -> str:
        """Return the prompt, after the end of standard input if that is part of it.

        Raises UsageError for text that is not UTF-8 and for a standard input that was asked for and is empty.
        """
        parts = [*([] if self._instruction is None else [self._instruction]), *(text for _, text in self._files)]
        if self._input is not None:
            if not self._waits and not self._input.ends_within(MOMENT) and not self._input.began:
                click.echo(
                    "gemkit: nothing came through standard input, which is still open: the prompt goes without it "
                    "(--file - waits for it)",
                    err=True,
                )
            else:
                piped = self._input.text()
                self._check(piped)
                parts += [piped] if piped.strip() else []
        return parts[0] if len(parts) == 1 else BETWEEN.join(part.strip("\n") for part in parts)

    def _check(self, piped: str) -> None:
        if self._needed and not piped.strip():
            raise UsageError("standard input is empty: give the text as an argument, with --file or through the pipe")


def _read(path: str) -> str:
    check_text_file(path)
    return read_text(path)


class _Input:
    """Standard input, read to its end by a thread of its own."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._error: OSError | None = None
        try:
            self._descriptor = sys.stdin.fileno() if sys.stdin is not None else None
        except (io.UnsupportedOperation, OSError):
            self._descriptor = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        if self._descriptor is None:
            self._read()
        else:
            self._thread.start()

    @property
    def began(self) -> bool:
        """Return whether data or the end arrived."""
        return bool(self._chunks) or not self._thread.is_alive()

    def ends_within(self, seconds: float) -> bool:
        """Wait for the end, at most this long; return whether it arrived."""
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def text(self) -> str:
        """Wait for the end and return the text, with a note to standard error if that takes long."""
        if not self.ends_within(PATIENCE):
            click.echo("gemkit: waiting for the end of standard input (Ctrl-D on a terminal)", err=True)
            while not self.ends_within(0.5):
                pass
        if self._error is not None:
            raise UsageError(f"standard input cannot be read ({self._error.strerror or self._error}): give --file FILE")
        return decode_text(b"".join(self._chunks), "standard input")

    def _read(self) -> None:
        if self._descriptor is None:
            try:
                self._chunks.append(sys.stdin.buffer.read() if sys.stdin is not None else b"")
            except OSError:  # a replacement that cannot be read
                return
            return
        try:
            while chunk := os.read(self._descriptor, 1 << 16):
                self._chunks.append(chunk)
        except OSError as error:
            self._error = error


def input_kind() -> str:
    """Return the kind of standard input: "terminal", "data" (a pipe, a file from its start), "other" or "none"."""
    if sys.stdin is None or sys.stdin.closed:
        return "none"
    if sys.stdin.isatty():
        return "terminal"
    try:
        descriptor = sys.stdin.fileno()
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            # A shell's loop over the lines of a file shares it with the commands in the loop.
            return "data" if os.lseek(descriptor, 0, os.SEEK_CUR) == 0 else "other"
    except (io.UnsupportedOperation, OSError):
        return "data"
    return "data" if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else "other"
