"""Curves of a run as loss.svg and loss.png, drawn with matplotlib (extra `train`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from gemkit.cache import staged
from gemkit.train.metrics import Row

_TRAIN, _VALIDATION, _RATE, _GRID = "#1a73e8", "#d93025", "#5f6368", "#e8eaed"
_FADED = "#aecbfa"


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw training and validation loss above the learning rate, and return the files.

    The training loss is shown as it is, pale, and as a moving mean.
    Raises ImportError without matplotlib, OSError if the files cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [(row.step, row.loss) for row in rows if _finite(row.loss)]
    validation = [(row.step, row.validation_loss) for row in rows if _finite(row.validation_loss)]
    rates = [(row.step, row.lr) for row in rows if row.lr is not None]
    with rc_context({"font.size": 10, "svg.hashsalt": "gemkit", "axes.edgecolor": _RATE}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        losses, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        if train:
            steps, values = zip(*train)
            smooth = _smoothed(values)
            losses.plot(steps, values, color=_FADED, linewidth=1, label="training, each step")
            losses.plot(steps, smooth, color=_TRAIN, linewidth=2, label=f"training, smoothed: {smooth[-1]:.3f}")
            # The first steps and outliers may leave the picture, the curve may not
            shown = sorted(values)[: max(1, round(0.99 * len(values)))] + list(smooth)
            shown += [value for _, value in validation]
            margin = 0.05 * (max(shown) - min(shown)) or 0.05
            losses.set_ylim(min(shown) - margin, max(shown) + margin)
        if validation:
            steps, values = zip(*validation)
            losses.plot(
                steps, values, color=_VALIDATION, linewidth=2, marker="o", markersize=5,
                label=f"validation: {values[-1]:.3f}",
            )  # fmt: skip
        if rates:
            lower.plot(*zip(*rates), color=_RATE, linewidth=1.5)
        losses.set_ylabel("loss per token (nats)")
        lower.set_ylabel("learning rate")
        lower.set_xlabel("step")
        lower.set_ylim(bottom=0)
        lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (losses, lower):
            axes.grid(color=_GRID)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        if train or validation:
            losses.legend(frameon=False)
        paths = [folder / "loss.svg", folder / "loss.png"]
        for path in paths:
            with staged(path) as temporary:
                kind = path.suffix[1:]
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
    return paths


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return the centred mean over about a twentieth of the values; at both ends, over what there is of it."""
    sums = [0.0, *itertools.accumulate(values)]
    reach = len(values) // 40
    spans = ((max(0, at - reach), min(len(values), at + reach + 1)) for at in range(len(values)))
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]
