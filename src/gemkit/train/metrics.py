"""The file metrics.csv of a run: one row for each step, on the disk before the next step begins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from gemkit.cache import atomic_write


@dataclass(frozen=True)
class Row:
    """Figures of one step; None where there are none. Step 0 is the evaluation before the first step.

    loss, validation_loss: means over loss tokens. grad_norm: before clipping. tokens: of this step, without padding.
    tokens_per_second: of this step alone. seconds: since the start of the run, without the time between two sessions.
    memory_bytes: peak so far of the accelerator, or else of the process.
    """

    step: int
    loss: float | None = None
    validation_loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    loss_tokens: int | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    memory_bytes: int | None = None


_NAMES = [field.name for field in fields(Row)]
_WHOLE = {"step", "tokens", "loss_tokens", "memory_bytes"}


class MetricsFile:
    """metrics.csv, opened for appending. rows: all of them, those of earlier sessions included.

    after: rows of later steps are dropped from the file; they come again.
    """

    def __init__(self, path: Path, after: int) -> None:
        self.rows = [row for row in read_metrics(path) if row.step <= after]
        atomic_write(path, (",".join(_NAMES) + "\n" + "".join(map(_line, self.rows))).encode(), private=False)
        self._file = open(path, "ab", buffering=0)
        self._pending = b""

    def append(self, row: Row) -> None:
        """Write a row. Raises OSError if the disk is full; the row is then written with the next one."""
        self.rows.append(row)
        self._pending += _line(row).encode()
        end = self._file.seek(0, 2)
        try:
            done = 0
            while done < len(self._pending):
                done += self._file.write(self._pending[done:])
        except OSError:
            self._file.truncate(end)
            raise
        self._pending = b""

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a file, none if it is missing; the incomplete row of a killed process is dropped."""
    with contextlib.suppress(FileNotFoundError):
        return list(_parse(path.read_text(encoding="utf-8").splitlines(keepends=True)))
    return []


def _parse(lines: Iterable[str]) -> Iterable[Row]:
    for line in lines:
        cells = line.rstrip("\n").split(",")
        if line.endswith("\n") and len(cells) == len(_NAMES):
            with contextlib.suppress(ValueError):  # the header
                pairs = zip(_NAMES, cells)
                yield Row(**{name: _value(name, cell) for name, cell in pairs if cell})


def _value(name: str, cell: str) -> float | int:
    return int(cell) if name in _WHOLE else float(cell)


def _line(row: Row) -> str:
    cells = (getattr(row, name) for name in _NAMES)
    return ",".join("" if cell is None else repr(cell) for cell in cells) + "\n"
