"""The report of a dry run: samples with the tokens that carry loss marked, statistics, rows that were left out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from typing import TextIO

import numpy as np

from gemkit.data.batch import Batches
from gemkit.data.prepare import Prepared
from gemkit.data.sample import Sample
from gemkit.text.tokenizer import Tokenizer
from gemkit.text.visible import visible

_LOSS, _CONTROL, _END = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_BAR = 40
_BINS = 12


def takes_colour(stream: TextIO) -> bool:
    """Return whether a stream is a terminal with colours, which NO_COLOR and TERM=dumb deny."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def report(prepared: Prepared, batches: Batches, tokenizer: Tokenizer, samples: int = 3, colour: bool = False) -> str:
    """Return the text of a dry run, with a line break at its end.

    batches: of the samples for training. samples: number of those shown. colour: mark tokens with loss in green and
    other control tokens faint; False puts « and » around those with loss.
    """
    parts = [_shown(number, sample, tokenizer, colour) for number, sample in enumerate(prepared.train[:samples], 1)]
    parts += [statistics(prepared), packing(batches)]
    if prepared.skipped:
        parts.append(skipped(prepared))
    return "\n\n".join(parts) + "\n"


def decoded(sample: Sample, tokenizer: Tokenizer, colour: bool = False) -> str:
    """Return the text of a sample, control tokens by their names, with its tokens with loss marked as in `report`."""
    ids, loss = sample.tokens.tolist(), sample.loss.tolist()
    kinds = ["loss" if loss[at] else "control" if tokenizer.is_control(ids[at]) else "" for at in range(len(ids))]
    text, at = [], 0
    for kind, run in groupby(kinds):
        stop = at + len(list(run))
        part = visible(tokenizer.decode(ids[at:stop], skip_control=False))
        if colour and kind:
            style = _LOSS if kind == "loss" else _CONTROL
            # Each line by itself, as pagers want it
            part = "\n".join(f"{style}{line}{_END}" if line else "" for line in part.split("\n"))
        text.append(f"«{part}»" if kind == "loss" and not colour else part)
        at = stop
    return "".join(text)


def _shown(number: int, sample: Sample, tokenizer: Tokenizer, colour: bool) -> str:
    key = "in green" if colour else "between « and »"
    title = f"Sample {number}: {len(sample.tokens):,} tokens, {int(sample.loss.sum()):,} with loss ({key})"
    return f"{title}\n{decoded(sample, tokenizer, colour)}".removesuffix("\n")


def statistics(prepared: Prepared) -> str:
    """Return numbers of samples and tokens, their lengths and a histogram of those."""
    left_out = sum(reason.count for reason in prepared.skipped.values())
    lines = [
        f"Rows: {len(prepared.train):,} for training, {len(prepared.validation):,} for validation, {left_out:,} left "
        f"out, {prepared.truncated:,} cut to {prepared.options.max_length:,} tokens"
    ]
    for name, samples in (("training", prepared.train), ("validation", prepared.validation)):
        if samples:
            total = sum(len(sample.tokens) for sample in samples)
            loss = sum(int(sample.loss.sum()) for sample in samples)
            lines.append(f"Tokens for {name}: {total:,}, of which {loss:,} carry loss ({loss / total:.1%})")
    lengths = np.array([len(sample.tokens) for sample in prepared.train])
    median, high = np.percentile(lengths, [50, 95], method="higher").tolist()
    lines.append(
        f"Length of a sample: {lengths.min():,} to {lengths.max():,} tokens, mean {lengths.mean():,.1f}, median "
        f"{median:,}, 95% up to {high:,}"
    )
    return "\n".join([*lines, *histogram(lengths.tolist())])


def histogram(lengths: Sequence[int]) -> list[str]:
    """Return a line for each range of lengths, with its count as a bar."""
    step = 1
    while max(lengths) / step > _BINS:
        step *= 2
    counts = np.bincount((np.asarray(lengths) - 1) // step).tolist()
    names = [f"{at * step + 1:,}-{(at + 1) * step:,}" if step > 1 else f"{at + 1}" for at in range(len(counts))]
    first = next(at for at, count in enumerate(counts) if count)
    rows = list(zip(names, counts))[first:]
    left, right = (max(len(text) for text in column) for column in (names, [f"{count:,}" for count in counts]))
    most = max(counts)
    return [f"  {name:>{left}}  {count:>{right},}  {'#' * -(-count * _BAR // most)}".rstrip() for name, count in rows]


def packing(batches: Batches) -> str:
    """Return the batches of an epoch, their shapes and the share of them that is no padding."""
    shapes = batches.shapes
    shown = ", ".join(f"{rows}×{width:,}" for rows, width in shapes)
    return f"Batches: {batches.per_epoch:,} an epoch, of {shown} tokens, {batches.fill:.1%} filled"


def skipped(prepared: Prepared) -> str:
    """Return the rows that were left out: each reason with its count and the first examples."""
    lines = ["Left out:"]
    for reason, found in sorted(prepared.skipped.items(), key=lambda item: -item[1].count):
        lines.append(f"  {found.count:,} × {visible(reason)}")
        lines += [f"      {visible(example)}" for example in found.examples]
    return "\n".join(lines)
