"""Fork handlers: `os.fork` copies memory at any moment and no thread but the caller's.

Objects with locks or threads of their own are tracked: `hold` is called before a fork, `release` after it in both
processes. A step costs nothing, and without fork, as on Windows, the handlers are never called.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Forked(Protocol):
    """An object that outlives a fork."""

    def hold(self) -> None:
        """Wait until the object's state is consistent, and lock it."""

    def release(self, in_child: bool) -> None:
        """Unlock it. in_child: in the new process, where other threads are missing."""


_tracked: weakref.WeakSet[Forked] = weakref.WeakSet()
_one = threading.Lock()  # two threads that fork at once would wait for each other
_held: list[Forked] = []


def track(found: Forked) -> None:
    """Call an object's handlers at every fork from now on, while other references to it exist."""
    _tracked.add(found)


def _before() -> None:
    _one.acquire()
    for found in list(_tracked):
        found.hold()
        _held.append(found)


def _after(in_child: bool) -> None:
    while _held:
        _held.pop().release(in_child)
    _one.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=lambda: _after(False), after_in_child=lambda: _after(True))
