"""Models across `os.fork`, which copies memory at any moment and takes along no thread but the caller's.

Whoever has locks or threads of its own is tracked: `hold` is called before a fork, `release` after it in both.
Nothing is asked at a step, and where there is no fork, as on Windows, nothing happens.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Forked(Protocol):
    """An object that outlives a fork."""

    def hold(self) -> None:
        """Waits until the object is whole, and keeps it so."""

    def release(self, in_child: bool) -> None:
        """Lets it go on. in_child: in the new process, where other threads are missing."""


_tracked: weakref.WeakSet[Forked] = weakref.WeakSet()
_one = threading.Lock()  # two threads that fork at once would wait for each other
_held: list[Forked] = []


def track(found: Forked) -> None:
    """Includes an object in every fork from now on, for as long as others keep it."""
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
