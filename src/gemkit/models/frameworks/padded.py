"""What the runners of torch and JAX share: a ragged batch as padded arrays, and the choice of tokens from few logits.

A framework's cache of a layer is one array of slots, ``page_size`` to a page. Page 0 is nobody's: padding writes there
and reads from there, at a position that only padding sees. Shapes come in powers of two, so that few are compiled.

Letters: B sequences, T new tokens, S slots read; B, T and S are padded sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemkit.engine.interface import Batch, StepResult, build_batch, check_single_draws
from gemkit.engine.sampling import Sampling, adjust, draw

Array = Any  # of NumPy or a framework

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

    @property
    def sizes(self) -> Sizes:
        """B, T, and the S of each page group: all shapes of the step."""
        return (*self.tokens.shape, tuple(read.shape[1] for read in self.read))

    def flat(self) -> np.ndarray:
        """All but `rows` as one int32 array, so that a device gets them at once; see `unpack`."""
        groups = [array for place in zip(self.write, self.read, self.seen, strict=True) for array in place]
        return np.concatenate([a.reshape(-1) for a in (self.tokens, self.positions, self.last, *groups)])


Sizes = tuple[int, int, tuple[int, ...]]


def unpack(flat: Array, sizes: Sizes) -> tuple[Array, Array, Array, list[tuple[Array, Array, Array]]]:
    """Tokens, positions, last, and by page group (write, read, seen) of `Padded.flat`, in any framework's arrays."""
    B, T, slots = sizes
    shapes = [(B, T), (B, T), (B,)]
    for S in slots:
        shapes += [(B, T), (B, S), (B, S)]
    found, at = [], 0
    for shape in shapes:
        found.append(flat[at : at + math.prod(shape)].reshape(shape))
        at += math.prod(shape)
    tokens, positions, last, *groups = found
    return tokens, positions, last, [tuple(groups[g : g + 3]) for g in range(0, len(groups), 3)]


def bucket(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, size - 1).bit_length()


def quarter(size: int) -> int:
    """The next of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, …: four to a power of two."""
    step = max(1, bucket(size) // 8)
    return -(-size // step) * step


def pad(
    batch: Batch,
    page_size: int,
    windows: Sequence[int | None] | None = None,
    rounded: Callable[[int], int] = bucket,
    at_least: tuple[int, int] = (1, 1),
) -> Padded:
    """The step of a `Batch`, whose pages 0, 1, … are the storage's pages 1, 2, ….

    windows: of the page groups; a group needs no more pages than its window and the new tokens span. rounded: gives a
    number of pages room to grow. at_least: sequences and tokens to pad to, for shapes that stay.
    """
    counts = np.diff(batch.starts)
    B, T = bucket(max(len(counts), at_least[0])), bucket(max(int(counts.max()), at_least[1]))
    T = T if T == 1 else max(16, T)  # fewer shapes to compile
    real_BT = np.zeros((B, T), bool)
    real_BT[: len(counts)] = np.arange(T) < counts[:, None]
    new_BT = np.full((B, T), FAR, np.int32)
    new_BT[: len(counts)] = np.where(
        real_BT[: len(counts)], batch.positions[:, None] + np.arange(T, dtype=np.int32), FAR
    )
    tokens = np.zeros((B, T), np.int32)
    tokens[real_BT] = batch.tokens
    last = np.zeros(B, np.int32)
    last[: len(counts)] = counts - 1
    groups = []
    for table, window in zip(batch.pages, windows or (None,) * len(batch.pages), strict=True):
        most = None if window is None else max(0, window + T - 3) // page_size + 2
        groups.append(_slots(table, new_BT, batch.positions + counts, page_size, most, rounded))
    write, read, seen = zip(*groups, strict=True)
    return Padded(tokens, new_BT, last, write, read, seen, np.flatnonzero(real_BT))


def _slots(
    table: np.ndarray,
    new_BT: np.ndarray,
    ends: np.ndarray,
    page_size: int,
    most: int | None,
    rounded: Callable[[int], int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A page group's slots to write, slots to read, and their positions.

    new: positions of the new tokens, FAR where there is none. ends: the position after each sequence's last. most: the
    pages that a sequence can hold, if there is a bound.
    """
    (B, T), (size, columns) = new_BT.shape, table.shape
    held = (table >= 0) & (np.arange(columns) * page_size < ends[:, None])
    count = 1 + int(held.sum(1).max())  # one page at least is padding
    pages = rounded(count) if most is None or count > most + 1 else min(rounded(count), most + 1)
    order = np.argsort(~held, axis=1, kind="stable")[:, :pages]  # the pages that are held come first
    rows = np.arange(size)[:, None]
    held, found = held[rows, order], table[rows, order] + 1
    within = np.arange(page_size, dtype=np.int32)
    read = np.zeros((B, pages, page_size), np.int32) + within
    read[:size, : order.shape[1]] += (np.where(held, found, 0) * page_size)[:, :, None].astype(np.int32)
    seen = np.full((B, pages, page_size), FAR, np.int32)
    positions = (order * page_size)[:, :, None].astype(np.int32) + within
    known = held[:, :, None] & (positions < ends[:, None, None])  # else not written yet
    seen[:size, : order.shape[1]] = np.where(known, positions, FAR)
    new = new_BT[:size]
    real = new != FAR
    page = table[rows, np.where(real, new // page_size, 0)] + 1
    write = np.zeros((B, T), np.int32)
    write[:size] = np.where(real, page * page_size + new % page_size, 0)
    return write, read.reshape(B, -1), seen.reshape(B, -1)


_WASTE = 128  # tokens of padding that are worth a step of their own


def split(batch: Batch) -> list[np.ndarray]:
    """The sequences of each step that a batch is best run in: one, or those of one new token apart from the longer.

    Beside a long chunk, each token would be padded to its length.
    """
    counts = np.diff(batch.starts)
    one, more = np.flatnonzero(counts == 1), np.flatnonzero(counts > 1)
    if not len(one) or not len(more):
        return [np.arange(len(counts))]
    longest = bucket(int(counts.max()))
    waste = (bucket(len(counts)) - bucket(len(more))) * longest - bucket(len(one))
    return [more, one] if waste >= _WASTE else [np.arange(len(counts))]


def part(batch: Batch, rows: np.ndarray) -> Batch:
    """Some sequences of a batch, in order."""
    return build_batch(
        [batch.tokens[batch.starts[b] : batch.starts[b + 1]] for b in rows],
        batch.positions[rows],
        tuple(table[rows] for table in batch.pages),
        draws=batch.draws[rows],
        sampling=tuple(batch.sampling[b] for b in rows),
        counters=batch.counters[rows],
        history=tuple(batch.history[b] for b in rows),
        prompt_lengths=batch.prompt_lengths[rows],
        adapters=() if batch.adapters is None else batch.adapters[rows],
    )


def in_parts(step: Callable[[Batch], StepResult], batch: Batch) -> StepResult:
    """Runs a batch in the steps of `split` and returns their results as one."""
    check_single_draws(batch)
    parts = split(batch)
    if len(parts) == 1:
        return step(batch)
    results = [step(part(batch, rows)) for rows in parts]
    ends = batch.draws.cumsum()
    whole = _empty_result(int(ends[-1]), max(result.top_ids.shape[1] for result in results))
    for sequences, result in zip(parts, results, strict=True):
        rows = ends[sequences[batch.draws[sequences] > 0]] - 1
        width = result.top_ids.shape[1]
        whole.tokens[rows], whole.logprobs[rows] = result.tokens, result.logprobs
        whole.top_ids[rows, :width], whole.top_logprobs[rows, :width] = result.top_ids, result.top_logprobs
    return whole


def _empty_result(size: int, width: int) -> StepResult:
    return StepResult(
        np.full(size, -1, np.int32),
        np.zeros(size, np.float32),
        np.full((size, width), -1, np.int32),
        np.full((size, width), -np.inf, np.float32),
    )


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


def greedy(sampling: Sampling) -> bool:
    """Whether the largest logit is all there is to know."""
    return sampling.temperature == 0 and sampling.logprobs is None and not needs_whole(sampling)


def choose(logits: Sequence[Logits], batch: Batch, wanted: np.ndarray) -> StepResult:
    """Draws the tokens of the sequences `wanted` as `gemkit.engine.sampling.sample` defines it."""
    width = max((batch.sampling[b].logprobs or 0 for b in wanted), default=0)
    result = _empty_result(len(wanted), width)
    for r, (row, b) in enumerate(zip(logits, wanted, strict=True)):
        sampling = batch.sampling[b]
        ids, values = row.top_ids, row.top
        if row.whole is not None:
            adjusted = adjust(row.whole, sampling, batch.history[b], int(batch.prompt_lengths[b]))
            ids, values = np.arange(len(adjusted), dtype=np.int32), adjusted
        place = draw(values, sampling, int(batch.counters[b]))
        token = int(ids[place])
        result.tokens[r] = token
        if sampling.logprobs is None:
            continue
        raw = row.whole[token] if row.whole is not None else values[place]
        result.logprobs[r] = float(raw) - row.log_sum
        count = sampling.logprobs
        result.top_ids[r, :count] = row.top_ids[:count]
        result.top_logprobs[r, :count] = row.top[:count].astype(np.float64) - row.log_sum
    return result
