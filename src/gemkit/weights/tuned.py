"""A model that expects chat turns, and one that does not, told apart by what its files say."""

from __future__ import annotations

import re

_UNTUNED = {"base", "pt", "pretrained"}
_TUNED = {"it", "instruct", "chat"}


def instruction_tuned(mark: object, template: str | None, *names: str) -> bool | None:
    """Returns True or False, or None if nothing tells.

    mark: the file's own statement, a bool, which decides; anything else is none. Next, a chat template says yes; then
    the names do, with words such as "it" or "pt". Names without such words say no.
    """
    if isinstance(mark, bool):
        return mark
    if template:
        return True
    return bool(by_name(*names)) if any(names) else None


def by_name(*names: str) -> bool | None:
    """Returns True for names with "it" and the like, False for those with "pt" and the like, None for all others.

    Of a path, the last part counts.
    """
    words = {word for name in names for word in re.findall(r"[a-z]+", name.rpartition("/")[2].lower())}
    if words & _UNTUNED:
        return False
    return True if words & _TUNED else None
