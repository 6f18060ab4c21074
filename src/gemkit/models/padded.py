"""What the runners of torch and JAX share: a ragged batch as padded arrays, and the choice of tokens from few logits.

A framework's cache of a layer is one array of slots, ``page_size`` to a page. Page 0 is nobody's: padding writes there
and reads from there, at a position that only padding sees. Shapes come in powers of two, so that few are compiled.

Letters: B sequences, T new tokens, S slots read; B, T and S are padded sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemkit.engine.runner import Batch, StepResult
from gemkit.engine.sampling import Sampling, adjust, kept, log_softmax, uniform

FAR = 2**30  # the position of padding
TOP = 128  # how many of the largest logits a device hands over


@dataclass(frozen=True)
class Padded:
    """A step as arrays. tokens, positions: int32 [B, T]. last: int32 [B], where each sequence's last new token stands.

    write: int32 [B, T] by page group, the slot of each new token. read, seen: int32 [B, S] by page group, the slots to
    read and their positions. rows: int64 [tokens], where the batch's tokens stand in a flat [B * T].
    """

    tokens: np.ndarray
    positions: np.ndarray
    last: np.ndarray
    write: tuple[np.ndarray, ...]
    read: tuple[np.ndarray, ...]
    seen: tuple[np.ndarray, ...]
    rows: np.ndarray


def bucket(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, size - 1).bit_length()


def pad(batch: Batch, page_size: int) -> Padded:
    """The step of a `Batch`, whose pages 0, 1, … are the storage's pages 1, 2, …."""
    counts = np.diff(batch.starts)
    B, T = bucket(len(counts)), bucket(int(counts.max()))
    T = T if T == 1 else max(16, T)  # fewer shapes to compile
    tokens = np.zeros((B, T), np.int32)
    positions = np.full((B, T), FAR, np.int32)
    rows = np.empty(len(batch.tokens), np.int64)
    for b, count in enumerate(counts):
        start = batch.starts[b]
        tokens[b, :count] = batch.tokens[start : start + count]
        positions[b, :count] = np.arange(batch.positions[b], batch.positions[b] + count)
        rows[start : start + count] = b * T + np.arange(count)
    last = np.zeros(B, np.int32)
    last[: len(counts)] = counts - 1
    groups = [_slots(table, batch.positions, counts, (B, T), page_size) for table in batch.pages]
    write, read, seen = zip(*groups, strict=True)
    return Padded(tokens, positions, last, write, read, seen, rows)


def _slots(
    table: np.ndarray, firsts: np.ndarray, counts: np.ndarray, shape: tuple[int, int], page_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A page group's slots to write, slots to read, and their positions."""
    columns = [np.flatnonzero(row[: (first + count - 1) // page_size + 1] >= 0)
               for row, first, count in zip(table, firsts, counts)]  # fmt: skip
    pages = bucket(1 + max(len(column) for column in columns))  # one page at least is padding
    write = np.zeros(shape, np.int32)
    read = np.tile(np.arange(page_size, dtype=np.int32), (shape[0], pages))
    seen = np.full((shape[0], pages * page_size), FAR, np.int32)
    within = np.arange(page_size, dtype=np.int32)
    for b, column in enumerate(columns):
        size = len(column) * page_size
        read[b, :size] = ((table[b, column] + 1)[:, None] * page_size + within).reshape(-1)
        seen[b, :size] = (column[:, None] * page_size + within).reshape(-1)
        new = np.arange(firsts[b], firsts[b] + counts[b])
        write[b, : counts[b]] = (table[b, new // page_size] + 1) * page_size + new % page_size
        seen[b, :size][seen[b, :size] > new[-1]] = FAR  # not written yet
    return write, read, seen


@dataclass(frozen=True)
class Logits:
    """What is known of a sequence's logits.

    top_ids, top: the TOP largest, likeliest first, of equal ones the lower id first.
    log_sum: log Σ exp of all of them; None if not wanted. whole: all of them, if `needs_whole` said so.
    """

    top_ids: np.ndarray
    top: np.ndarray
    log_sum: float | None
    whole: np.ndarray | None


def needs_whole(sampling: Sampling) -> bool:
    """Whether the TOP largest logits are too few to choose from."""
    if sampling.has_penalty or sampling.logit_bias:
        return True
    return sampling.temperature > 0 and not 0 < sampling.top_k <= TOP


def choose(logits: Sequence[Logits], batch: Batch, wanted: np.ndarray) -> StepResult:
    """Draws the tokens of the sequences `wanted` as `gemkit.engine.sampling.sample` defines it."""
    size = len(batch.positions)
    width = max((batch.sampling[b].logprobs or 0 for b in wanted), default=0)
    result = StepResult(
        np.full(size, -1, np.int32),
        np.zeros(size, np.float32),
        np.full((size, width), -1, np.int32),
        np.full((size, width), -np.inf, np.float32),
    )
    for row, b in zip(logits, wanted, strict=True):
        sampling = batch.sampling[b]
        ids, values = row.top_ids, row.top
        if row.whole is not None:
            adjusted = adjust(row.whole, sampling, batch.history[b], int(batch.prompt_lengths[b]))
            ids, values = np.arange(len(adjusted), dtype=np.int32), adjusted
        if sampling.temperature == 0:
            place = int(np.argmax(values))
        else:
            order, weights = kept(values, sampling)
            sums = np.cumsum(weights)
            drawn = uniform(sampling.seed, int(batch.counters[b])) * sums[-1]
            place = int(order[np.searchsorted(sums, drawn, side="right")])
        token = int(ids[place])
        result.tokens[b] = token
        if sampling.logprobs is None:
            continue
        raw = row.whole[token] if row.whole is not None else values[place]
        result.logprobs[b] = float(raw) - row.log_sum
        count = sampling.logprobs
        result.top_ids[b, :count] = row.top_ids[:count]
        result.top_logprobs[b, :count] = row.top[:count].astype(np.float64) - row.log_sum
    return result


def log_sum_exp(values: np.ndarray) -> float:
    """log Σ exp in float64."""
    top = int(np.argmax(values))
    return float(values[top]) - float(log_softmax(values)[top])
