"""The log of a run: progress on a terminal and elsewhere, samples, the plot, a full disk. Budget: 15 s."""

import errno
import io
import json
import os
import sys

import pytest

from gemkit.train import log as log_module
from gemkit.train.log import RunLog
from gemkit.train.metrics import Row, read_metrics
from gemkit.train.plot import _smoothed, plot
from gemkit.train.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def row(step: int, loss: float = 2.5, **more) -> Row:
    return Row(step, loss, lr=1e-4, grad_norm=1.0, tokens=100, loss_tokens=50, memory_bytes=3_210_000_000, **more)


def screen(text: str) -> list[str]:
    """The lines that a terminal shows."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_elsewhere_than_on_a_terminal_a_line_comes_every_few_steps(tmp_path):
    stream = io.StringIO()
    with RunLog(tmp_path, every=10, stream=stream) as log:
        log.start(-1, 25)
        for step in range(1, 26):
            log.add(row(step))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25"]
    assert "loss 2.5000  lr 1.00e-04" in lines[0] and lines[0].endswith(" left  3.2 GB") and "tokens/s" in lines[0]
    assert "0:00 left" in lines[-1] and "\r" not in stream.getvalue()


def test_on_a_terminal_one_line_is_rewritten(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    with RunLog(tmp_path, stream=stream) as log:
        log.start(-1, 1000)
        log.add(row(1))
        log.add(row(2))
        log.say("a message")
        log.add(row(3))
    lines = screen(stream.getvalue())
    assert lines[0] == "a message" and lines[1].startswith("step 3/1,000  loss 2.5000") and lines[2:] == [""]
    assert len(lines[1]) <= 39


def test_rate_and_time_left_are_those_of_the_last_steps(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = Progress(None, 100, 10)
    progress.start(0)
    for step in range(1, 51):
        now += 10.0 if step <= 25 else 2.0  # the first ones compile
        progress.show(row(step))
    assert "50 tokens/s  1:40 left" in progress.describe(row(50))


def test_a_quiet_log_shows_nothing_and_writes_its_files(tmp_path, capsys):
    with RunLog(tmp_path, quiet=True) as log:
        log.start(-1, 1)
        log.add(row(1))
        log.say("nothing")
    assert capsys.readouterr() == ("", "")
    assert read_metrics(tmp_path / "metrics.csv") == [row(1)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_samples_are_kept_in_full_and_shown_short(tmp_path):
    stream = io.StringIO()
    with RunLog(tmp_path, stream=stream) as log:
        log.start(-1, 10)
        log.add_samples(4, [("Hello\nyou", "x" * 500)])
        log.add_samples(8, [("Hello", "é")])
    assert stream.getvalue().splitlines()[0] == f"step 4: Hello you → {'x' * 159}…"
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write(b'{"step": 9, "pro')
    with RunLog(tmp_path, quiet=True) as log:
        log.start(4, 10)
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 4, "prompt": "Hello\nyou", "answer": "x" * 500}]


def test_a_full_disk_is_named_once_and_the_run_goes_on(tmp_path, monkeypatch):
    stream = io.StringIO()

    class Full:
        def write(self, *data: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name: str):
            return lambda *values: 0

    with RunLog(tmp_path, every=1, stream=stream) as log:
        log.start(-1, 3)
        monkeypatch.setattr(log._metrics, "_file", Full())
        monkeypatch.setattr(log._events, "_file", Full())
        for step in range(1, 4):
            log.add(row(step))
    said = [line for line in stream.getvalue().splitlines() if not line.startswith("step ")]
    assert len(said) == 2 and "metrics.csv cannot be written (No space left on device)" in said[0]
    assert "tensorboard cannot be written" in said[1] and len(log.rows) == 3


def test_the_plot_has_both_curves_and_the_rate(tmp_path):
    rows = [Row(0, validation_loss=3.0)]
    rows += [row(step, 2 + 1 / step, validation_loss=2.25 if step == 40 else None) for step in range(1, 41)]
    rows.append(row(41, float("nan")))
    svg, png = plot(rows, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000
    text = svg.read_text(encoding="utf-8")
    assert "validation: 2.250" in text and "learning rate" in text and "smoothed: 2.0" in text
    before = svg.read_bytes()
    plot(rows, tmp_path)
    assert svg.read_bytes() == before  # no date, no random names
    plot([Row(0, validation_loss=3.0)], tmp_path)
    plot([], tmp_path)


def test_the_smoothed_curve_is_a_centred_mean():
    line = [float(value) for value in range(100)]
    smooth = _smoothed(line)
    assert smooth[10:90] == pytest.approx(line[10:90]) and smooth[0] == 1.0 and smooth[-1] == 98.0
    assert _smoothed([3.0]) == [3.0]


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(log_module.extras, "install", lambda name: f"INSTALL {name}")
    stream = io.StringIO()
    with RunLog(tmp_path, stream=stream) as log:
        log.start(-1, 1)
        log.finish()
    assert stream.getvalue() == "loss.svg and loss.png need matplotlib: INSTALL train\n"
    assert not (tmp_path / "loss.png").exists()
