"""Progress of a download: the figures, and the line that shows them on a terminal."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TextIO

_WINDOW = 10.0  # seconds over which the rate is taken
_EVERY = 0.1  # seconds between two lines


class _Sized(Protocol):
    @property
    def size(self) -> int | None: ...
    @property
    def about(self) -> int: ...


@dataclass(frozen=True)
class Progress:
    """Progress figures. files, bytes: done. total_files, total_bytes: at the end. rate: bytes a second."""

    files: int
    total_files: int
    bytes: int
    total_bytes: int
    rate: float

    @property
    def seconds_left(self) -> float | None:
        """Remaining time at the current rate; None if no data arrives."""
        return (self.total_bytes - self.bytes) / self.rate if self.rate > 0 else None


class Tally:
    """Counts what several threads fetch; its items are known by their place."""

    def __init__(self, items: Sequence[_Sized]) -> None:
        self._lock = threading.Lock()
        self._items = {id(item): item.size or item.about for item in items}
        self._have = dict.fromkeys(self._items, 0)
        self._whole: set[int] = set()
        self._arrived = 0
        self._past: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def resumed(self, item: _Sized, size: int) -> None:
        """Set the bytes of an item that an earlier download left."""
        with self._lock:
            self._have[id(item)] = size

    def arrived(self, item: _Sized, size: int) -> None:
        """Add bytes that were fetched."""
        with self._lock:
            self._have[id(item)] += size
            self._arrived += size

    def whole(self, item: _Sized) -> None:
        """Mark an item as done."""
        with self._lock:
            self._whole.add(id(item))
            self._have[id(item)] = self._items[id(item)] or self._have[id(item)]

    def now(self) -> Progress:
        """Return the figures of this moment."""
        with self._lock:
            at = time.monotonic()
            self._past.append((at, self._arrived))
            while len(self._past) > 2 and at - self._past[1][0] > _WINDOW:
                self._past.popleft()
            then, before = self._past[0]
            rate = (self._arrived - before) / (at - then) if at > then else 0.0
            total = sum(max(size, self._have[key]) for key, size in self._items.items())
            return Progress(len(self._whole), len(self._items), sum(self._have.values()), total, rate)


def on_terminal(title: str, stream: TextIO | None = None) -> Callable[[Progress | None], None]:
    """Return a function that shows a download in one line of standard error, and clears the line when given None.

    It does nothing where standard error is not a terminal.
    """
    stream = stream or sys.stderr
    if stream is None or not stream.isatty():
        return lambda progress: None
    shown, width = 0.0, 0

    def show(progress: Progress | None) -> None:
        nonlocal shown, width
        at = time.monotonic()
        if progress is not None and at - shown < _EVERY:
            return
        columns = shutil.get_terminal_size().columns - 1
        text = "" if progress is None else f"{title}: {describe(progress)}"[:columns]
        stream.write("\r" + text.ljust(width) + ("\r" if progress is None else ""))
        stream.flush()
        shown, width = at, len(text)

    return show


def describe(progress: Progress) -> str:
    """Return the line of `on_terminal`: files, megabytes (decimal), share, rate and the time that is left."""
    left = progress.seconds_left
    share = 100 * progress.bytes // progress.total_bytes if progress.total_bytes else 0
    return (
        f"{progress.files}/{progress.total_files} files, {progress.bytes / 1e6:,.1f} of "
        f"{progress.total_bytes / 1e6:,.1f} MB ({share}%), {progress.rate / 1e6:,.1f} MB/s, "
        + ("waiting" if left is None else f"{clock(left)} left")
    )


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, with hours where there are any: 4:05, 1:04:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
