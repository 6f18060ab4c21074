"""Errors that a user can act on."""

from collections.abc import Iterable


class GemkitError(ValueError):
    """Bad input or a state the user can mend: one line that says what is wrong and what to do.

    The command line prints the message alone and exits with 1; a traceback is only shown with ``--debug``.
    """


class UsageError(GemkitError):
    """A wrong flag, value or combination of them; the command line exits with 2."""


class GemkitWarning(UserWarning):
    """Something that works but is probably not what the user wants."""


def listed(names: Iterable[object], most: int = 4) -> str:
    """Joins names for a message, the first few of many. Example: ``listed("abcdef", 2)`` is "a, b and 4 more"."""
    names = list(names)
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
