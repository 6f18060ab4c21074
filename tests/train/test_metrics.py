"""metrics.csv: every step once, also after a kill and with a full disk. Budget: 2 s."""

import csv
import errno

import pytest

from gemkit.train.metrics import MetricsFile, Row, read_metrics


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [
        Row(0, validation_loss=2.5, seconds=0.1),
        Row(1, 1 / 3, None, 2e-4, 1.5, 100, 40, 1234.5, 0.2, 10**9),
        Row(2, float("inf")),
    ]
    file = MetricsFile(path, -1)
    for row in rows:
        file.append(row)
        assert read_metrics(path) == file.rows  # flushed
    file.close()
    assert read_metrics(path) == rows
    with open(path, newline="") as text:
        found = list(csv.DictReader(text))
    assert [row["step"] for row in found] == ["0", "1", "2"] and float(found[1]["loss"]) == 1 / 3


def test_rows_behind_the_checkpoint_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, -1)
    for step in range(1, 8):
        file.append(Row(step, step / 10))
    file.close()
    path.write_bytes(path.read_bytes()[:-3])  # killed within a write
    assert [row.step for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    file = MetricsFile(path, 4)
    file.append(Row(5, 0.55))
    file.close()
    assert [(row.step, row.loss) for row in read_metrics(path)] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.55)]
    MetricsFile(path, -1).close()
    assert read_metrics(path) == []


class FullDisk:
    """A file whose disk takes a few bytes more."""

    def __init__(self, file, free: int) -> None:
        self.file, self.free = file, free

    def write(self, data: bytes) -> int:
        if not self.free:
            raise OSError(errno.ENOSPC, "No space left on device")
        data = data[: self.free]
        self.free -= len(data)
        return self.file.write(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def test_a_row_that_a_full_disk_refuses_is_written_later(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, -1)
    file.append(Row(1, 0.5))
    disk = file._file
    file._file = FullDisk(disk, 4)
    for step in (2, 3):
        with pytest.raises(OSError, match="No space left"):
            file.append(Row(step, 0.5))
        assert [row.step for row in read_metrics(path)] == [1] and path.read_bytes().endswith(b"\n")
    file._file = disk
    file.append(Row(4, 0.5))
    file.close()
    assert [row.step for row in read_metrics(path)] == [1, 2, 3, 4]
