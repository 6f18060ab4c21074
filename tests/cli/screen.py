"""A program on a real terminal: pexpect holds its line, pyte draws its screen."""

import os
import re
import time
from collections.abc import Callable

import pexpect
import pyte


class Screen:
    """A child process and what its user sees. Keys go in with `send`; `until` waits for words on the screen."""

    def __init__(self, command: list[str], rows: int = 30, columns: int = 80, **environment: str) -> None:
        inherited = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM")}
        self.child = pexpect.spawn(
            command[0],
            command[1:],
            env={**inherited, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environment},
            dimensions=(rows, columns),
            timeout=30,
        )
        self.child.delaybeforesend = None
        self.raw = b""
        self.screen = pyte.HistoryScreen(columns, rows, history=20_000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *exception: object) -> None:
        self.child.close(force=True)

    def send(self, keys: str | bytes) -> None:
        """Types keys, reading what comes meanwhile so that neither side waits for the other."""
        data = keys.encode() if isinstance(keys, str) else keys
        for start in range(0, len(data), 1024):
            self.child.send(data[start : start + 1024])
            self.read(0)

    def paste(self, text: str) -> None:
        """A bracketed paste, as a terminal sends it: carriage returns for newlines."""
        self.send(b"\x1b[200~" + text.replace("\n", "\r").encode() + b"\x1b[201~")

    def resize(self, rows: int, columns: int) -> None:
        self.child.setwinsize(rows, columns)
        self.screen.resize(rows, columns)

    def read(self, seconds: float) -> None:
        """Read the available output, or the output of so many seconds."""
        try:
            data = self.child.read_nonblocking(1 << 16, timeout=seconds)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return
        self.raw += data
        self._stream.feed(data)

    def text(self) -> str:
        """The screen's lines without the blanks at their ends."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def until(self, condition: str | Callable[[str], bool], seconds: float = 12) -> str:
        """Waits until a pattern is on the screen, or a condition of its text holds; returns the text."""
        end = time.monotonic() + seconds
        while True:
            text = self.text()
            if condition(text) if callable(condition) else re.search(condition, text):
                return text
            alive = self.child.isalive()
            assert alive and time.monotonic() < end, f"{condition} is not on the screen:\n{text}"
            self.read(0.05)

    def code(self, seconds: float = 30) -> int:
        """Waits for the end of the program; returns its exit code."""
        end = time.monotonic() + seconds
        while self.child.isalive():
            assert time.monotonic() < end, f"still running:\n{self.text()}"
            self.read(0.05)
        return self.child.exitstatus if self.child.exitstatus is not None else -self.child.signalstatus
