"""Batches for tests of runners: sequences at places of their own, `PAGES` pages to each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemkit.engine.interface import Batch, Runner, build_batch
from gemkit.engine.sampling import Sampling

PAGES = 20


def make_batch(runner: Runner, parts: Sequence[tuple[int, np.ndarray, int]], sampling: Sampling | None = None) -> Batch:
    """parts: (place, ids, first position). Pages out of a window's sight are gone. sampling: draws if given."""
    columns = max((first + len(ids) - 1) // runner.page_size + 1 for _, ids, first in parts)
    tables = []
    for group in runner.groups:
        table = np.full((len(parts), columns), -1, np.int32)
        for row, (place, ids, first) in enumerate(parts):
            end = (first + len(ids) - 1) // runner.page_size + 1
            start = 0 if group.window is None else max(0, first - group.window + 1) // runner.page_size
            table[row, start:end] = place * PAGES + np.arange(start, end)
        tables.append(table)
    count = len(parts)
    return build_batch(
        [ids.astype(np.int32) for _, ids, _ in parts],
        [first for *_, first in parts],
        tuple(tables),
        draws=[int(sampling is not None)] * count,
        sampling=(sampling or Sampling(),) * count,
        counters=range(count),
        history=tuple(np.tile(ids, 2).astype(np.int32) for _, ids, _ in parts),
        prompt_lengths=[len(ids) for _, ids, _ in parts],
    )


def one(runner: Runner, ids: np.ndarray, first: int, sampling: Sampling | None = None) -> Batch:
    """A batch of one sequence, at place 0."""
    return make_batch(runner, [(0, ids, first)], sampling)
