"""Log of a run: progress on a stream, metrics.csv, TensorBoard events, samples.jsonl and the plot of its curves."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from gemkit import extras
from gemkit.cache import atomic_write
from gemkit.train.events import EventFile
from gemkit.train.metrics import MetricsFile, Row
from gemkit.train.progress import Progress

_CURVES = {
    "loss/train": "loss",
    "loss/validation": "validation_loss",
    "optimizer/lr": "lr",
    "optimizer/grad_norm": "grad_norm",
    "speed/tokens_per_second": "tokens_per_second",
    "speed/memory_bytes": "memory_bytes",
}


class RunLog:
    """The log of a run in its folder; a context manager, opened with `start`.

    stream: of progress and messages, standard error by default; `quiet` shows nothing. A file that cannot be written is
    named once, and the run goes on. rows: all steps so far.
    """

    def __init__(self, folder: Path, *, every: int = 10, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.folder = Path(folder)
        self._stream = None if quiet else stream or sys.stderr
        self._every = every
        self._progress = Progress(self._stream, 0, every)
        self._metrics: MetricsFile | None = None
        self._events: EventFile | None = None
        self._failed: set[str] = set()

    @property
    def rows(self) -> list[Row]:
        return self._metrics.rows if self._metrics is not None else []

    def start(self, after: int, total: int) -> None:
        """Open the files after a step of a run, -1 for a new one; rows of later steps are dropped. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics = MetricsFile(self.folder / "metrics.csv", after)
        self._trim_samples(after)
        self._events = EventFile(self.folder / "tensorboard", after + 1)
        self._progress = Progress(self._stream, total, self._every)
        self._progress.start(max(0, after))

    def add(self, row: Row) -> None:
        """Write the figures of a step; step 0, an evaluation, is not shown as progress."""
        with self._tolerate("metrics.csv"):
            self._metrics.append(row)
        with self._tolerate("tensorboard"):
            found = {tag: getattr(row, name) for tag, name in _CURVES.items()}
            self._events.write(row.step, {tag: value for tag, value in found.items() if value is not None})
        if row.step:
            self._progress.show(row)

    def say(self, text: str) -> None:
        """Show a message."""
        self._progress.say(text)

    def add_samples(self, step: int, samples: Iterable[tuple[str, str]]) -> None:
        """Write and show answers of the model in training: pairs of prompt and answer."""
        for prompt, answer in samples:
            with self._tolerate("samples.jsonl"), open(self.folder / "samples.jsonl", "ab") as file:
                file.write(_sample_line(step, prompt, answer))
            self.say(f"step {step:,}: {_short(prompt)} → {_short(answer)}")

    def finish(self) -> None:
        """Draw the curves."""
        from gemkit.train.plot import plot

        try:
            with self._tolerate("loss.svg"):
                plot(self.rows, self.folder)
        except ImportError:
            self.say(f"loss.svg and loss.png need matplotlib: {extras.install('train')}")

    def close(self) -> None:
        """Close the files."""
        self._progress.close()
        for file in (self._metrics, self._events):
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk, which was named
                    file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _trim_samples(self, after: int) -> None:
        path = self.folder / "samples.jsonl"
        with contextlib.suppress(FileNotFoundError):
            lines = path.read_bytes().splitlines(keepends=True)
            atomic_write(path, b"".join(line for line in lines if _step_of(line) <= after), private=False)

    @contextlib.contextmanager
    def _tolerate(self, name: str) -> Iterator[None]:
        """Name a file that cannot be written, once; training goes on."""
        try:
            yield
        except OSError as error:
            if name not in self._failed:
                self._failed.add(name)
                self.say(f"{self.folder / name} cannot be written ({error.strerror or error}): check folder and space")


def _sample_line(step: int, prompt: str, answer: str) -> bytes:
    return (json.dumps({"step": step, "prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n").encode()


def _step_of(line: bytes) -> float:
    """Return the step of a line of samples.jsonl; infinity for an incomplete one."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _short(text: str, most: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
