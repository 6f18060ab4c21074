"""A data set's files to samples: read, split, tokenize, with a count of all that was left out or cut."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gemkit.data.rows import BadRows, Reason, Row, RowError
from gemkit.data.sample import LongRow, Sample, SampleBuilder
from gemkit.data.sources import Source, read_rows
from gemkit.data.split import position
from gemkit.errors import GemkitError, UsageError, brief, check_flag, whole_number
from gemkit.text.tokenizer import Tokenizer

_CHOICES = {
    "template": ("chat", "none"),
    "on_long": ("truncate", "skip", "fail"),
    "on_bad_row": ("fail", "skip"),
}


@dataclass(frozen=True)
class DataOptions:
    """Options of the way from rows to samples.

    max_length: of a sample, in tokens.
    validation: share of the rows that is kept for validation, where the data set has no such part.
    template: "chat", the model's chat template, or "none" for prompt and completion without turns.
    mask_prompt: loss on answers alone; False puts it on all tokens but BOS.
    on_long: "truncate", "skip" or "fail" for rows longer than `max_length`.
    on_bad_row: "fail" or "skip" for rows that cannot be used.

    Raises UsageError for a bad value.
    """

    max_length: int = 1024
    validation: float = 0.05
    template: str = "chat"
    mask_prompt: bool = True
    on_long: str = "truncate"
    on_bad_row: str = "fail"

    def __post_init__(self) -> None:
        if (whole_number(self.max_length) or 0) < 2:
            raise UsageError(f"max_length is {brief(self.max_length)}: give at least 2 tokens")
        if not isinstance(self.validation, int | float) or not 0 <= self.validation < 1:
            raise UsageError(f"validation is {brief(self.validation)}: give a share from 0 to below 1, such as 0.05")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} is {brief(getattr(self, name))}: give one of {', '.join(choices)}")
        check_flag("mask_prompt", self.mask_prompt)


@dataclass(frozen=True)
class Prepared:
    """The samples of a data set.

    train, validation: in the order of the files. skipped: rows that were left out, by reason. truncated: number of rows
    that were cut to `options.max_length`.
    """

    train: list[Sample]
    validation: list[Sample]
    skipped: dict[str, Reason]
    truncated: int
    options: DataOptions


def prepare(path: str | os.PathLike[str], tokenizer: Tokenizer, options: DataOptions | None = None) -> Prepared:
    """Return the samples of a file or folder.

    Raises GemkitError for files that cannot be read, for the first row that cannot be used unless the options say to
    skip such rows, and where no row is left for training.
    """
    options = DataOptions() if options is None else options
    source = Source.of(path)
    bad = BadRows(options.on_bad_row)
    builder = SampleBuilder(
        tokenizer, options.max_length, options.template, bool(options.mask_prompt), options.on_long == "truncate"
    )
    share = 0.0 if source.validation else options.validation
    train: list[Sample] = []
    validation: list[Sample] = []
    for files, part in ((source.train, train), (source.validation, validation)):
        for row, sample in _samples(files, builder, bad, options.on_long):
            (validation if position(row.content) < share else part).append(sample)
    if not train:
        reasons = "; ".join(f"{reason} ({found.count:,})" for reason, found in bad.reasons.items())
        remedy = f"{bad.count:,} left out: {reasons}" if reasons else "all are in the validation part; give more rows"
        raise GemkitError(f"{os.fspath(path)} has no row to train on: {remedy}")
    return Prepared(train, validation, bad.reasons, builder.truncated, options)


def _samples(files: Iterable[Path], builder: SampleBuilder, bad: BadRows, on_long: str) -> Iterable[tuple[Row, Sample]]:
    for row in read_rows(files, bad):
        try:
            yield row, builder.build(row)
        except LongRow as error:
            if on_long == "fail":
                raise GemkitError(f"{error}; shorten it, raise max_length, or choose on_long='truncate'") from None
            bad.leave_out(error)
        except RowError as error:
            bad.handle(error)
