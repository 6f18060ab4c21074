"""Samples into rows of a batch: several a row by best fit, or one a row in few widths."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

MULTIPLE = 64


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Return rows of indices into `lengths`, which descend: each goes to the row where it leaves the smallest space.

    lengths: int [N], none above `capacity`. The sum of a row's lengths is at most `capacity`. Best fit decreasing needs
    at most 11/9 of the fewest rows possible, plus one (Johnson, 1973).
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # free tokens to the rows that have them
    spaces: list[int] = []  # the keys of rows that exist, ascending
    for index, length in enumerate(lengths.tolist()):
        at = bisect_left(spaces, length)
        if at == len(spaces):
            rows.append([])
            row, space = len(rows) - 1, capacity
        else:
            space = spaces[at]
            row = with_space[space].pop()
            if not with_space[space]:
                del spaces[at]
        rows[row].append(index)
        if space > length:
            if not with_space.setdefault(space - length, []):
                insort(spaces, space - length)
            with_space[space - length].append(row)
    return rows


def bucket(length: int, max_length: int) -> int:
    """Return the width of a row for one sample: few widths, so that few shapes are compiled.

    They are multiples of 64; above 512 tokens, of a quarter of the power of two below the length. At most `max_length`.
    """
    step = max(MULTIPLE, (1 << (length - 1).bit_length()) // 8)
    return min(-(-length // step) * step, max_length)
