"""Progress of a run on a stream: one line that is rewritten on a terminal, a line every few steps elsewhere."""

from __future__ import annotations

import collections
import shutil
import time
from typing import TextIO

from gemkit.hub.progress import clock
from gemkit.train.metrics import Row

_WINDOW = 20  # steps that rate and time left are measured over


class Progress:
    """Shows rows and messages. total: steps of the run. every: steps between lines where there is no terminal."""

    def __init__(self, stream: TextIO | None, total: int, every: int) -> None:
        self._stream, self._total, self._every = stream, total, every
        self._terminal = stream is not None and stream.isatty()
        self._recent: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=_WINDOW + 1)
        self._tokens, self._width, self._first = 0, 0, True

    def start(self, step: int) -> None:
        """Begin to measure time after the steps that are done."""
        self._recent.append((time.monotonic(), step, 0))

    def show(self, row: Row) -> None:
        """Show the figures of a step."""
        self._tokens += row.tokens or 0
        self._recent.append((time.monotonic(), row.step, self._tokens))
        due = self._first or row.step % self._every == 0 or row.step == self._total
        if self._stream is None or not (self._terminal or due):
            return
        self._first = False
        text = self.describe(row)
        if self._terminal:
            text = text[: shutil.get_terminal_size().columns - 1]
            self._write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._write(text + "\n")

    def describe(self, row: Row) -> str:
        """Return the line of a step: loss, learning rate, tokens a second, time left and the peak of memory."""
        (then, before, tokens), (now, step, all_tokens) = self._recent[0], self._recent[-1]
        seconds = max(now - then, 1e-9)
        left = (self._total - step) * seconds / max(1, step - before)
        return (
            f"step {row.step:,}/{self._total:,}  loss {row.loss:.4f}  lr {row.lr:.2e}  "
            f"{(all_tokens - tokens) / seconds:,.0f} tokens/s  {clock(left)} left  {_size(row.memory_bytes)}"
        )

    def say(self, text: str) -> None:
        """Print a message on lines of its own; on a terminal the line of progress comes again below it."""
        if self._stream is not None:
            self._write((("\r" + " " * self._width + "\r") if self._width else "") + text + "\n")
            self._width = 0

    def close(self) -> None:
        """End the line of progress."""
        if self._width:
            self._write("\n")
            self._width = 0

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
