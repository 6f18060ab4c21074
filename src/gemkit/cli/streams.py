"""Standard output and standard error, set so that text goes out whole, whatever the code page."""

import codecs
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import click

from gemkit.errors import GemkitWarning

_ESCAPE = "gemkit.escape"


@contextmanager
def whole_text() -> Iterator[None]:
    """Set the process's streams for a command; at its end, report characters that standard output lacked.

    A file or a pipe gets UTF-8, unless PYTHONIOENCODING names an encoding. Where the encoding stays another, as on a
    terminal with a code page, characters that it lacks are written as backslash escapes. Warnings of
    gemkit are one line on standard error.
    """
    lacking: list[str] = []

    def escape(error: UnicodeError) -> tuple[str, int]:
        if isinstance(error, UnicodeEncodeError):
            wrong = error.object[error.start : error.end]
            # Half a surrogate pair represents a byte of a file's name, which no encoding has
            lacking[:] = lacking or [c for c in wrong if not "\ud800" <= c <= "\udfff"][:1]
        return codecs.backslashreplace_errors(error)

    codecs.register_error(_ESCAPE, escape)
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    for stream, handler in ((sys.stdout, _ESCAPE), (sys.stderr, "backslashreplace")):
        if not hasattr(stream, "reconfigure"):
            continue
        if not encoding and not is_utf8(stream) and not stream.isatty():
            stream.reconfigure(encoding="utf-8")
        if not errors:
            stream.reconfigure(errors=handler)
    with warnings.catch_warnings():
        _show_own_warnings()
        try:
            yield
        finally:
            if lacking:
                click.echo(
                    f"gemkit: standard output is {sys.stdout.encoding}, which lacks some characters of the text: they "
                    "are written as backslash escapes; set PYTHONIOENCODING=utf-8 to get them as they are",
                    err=True,
                )


def is_utf8(stream: object) -> bool:
    """Return whether a text stream takes all of Unicode."""
    try:
        return codecs.lookup(getattr(stream, "encoding", None) or "ascii").name in ("utf-8", "utf-8-sig", "utf-16")
    except LookupError:
        return False


def _show_own_warnings() -> None:
    warnings.simplefilter("always", GemkitWarning)
    show = warnings.showwarning

    def show_one_line(message, category, filename, lineno, file=None, line=None) -> None:
        if issubclass(category, GemkitWarning):
            click.echo(f"gemkit: {' '.join(str(message).split())}", err=True)
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_one_line
