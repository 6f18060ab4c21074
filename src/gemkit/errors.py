"""Errors that a user can act on."""

import operator
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
    """Join names for a message, the first few of many. Example: ``listed("abcdef", 2)`` is "a, b and 4 more"."""
    names = list(names)
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def brief(value: object) -> str:
    """Return a short text of a value for a message, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_flag(name: str, value: object) -> bool:
    """Return True or False for a bool, NumPy's too, and for 1 or 0; raises UsageError for anything else."""
    if type(value).__name__ in ("bool", "bool_") or (type(value) is int and value in (0, 1)):
        return bool(value)
    raise UsageError(f"{name} is {brief(value)}; give True or False")


def whole_number(value: object) -> int | None:
    """Return a whole number of any type, NumPy's too, as an int; None for a bool and for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
