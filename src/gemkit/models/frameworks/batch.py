"""A ragged `Batch` as padded arrays, for frameworks that compile a graph for each shape.

The cache of a layer is one array of slots, ``page_size`` to a page. Page 0 is the padding page: padding writes there
and reads from there, at a position that only padding sees. Sizes are rounded up, so that few shapes are compiled.

Letters: B sequences, T new tokens, S slots read; B, T and S are padded sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemkit.engine.interface import Batch, StepResult, build_batch
from gemkit.models.frameworks.choice import empty_result

Array = Any  # of NumPy or a framework
Sizes = tuple[int, int, tuple[int, ...]]  # B, T, and the S of each page group

FAR = 2**30  # the position of padding


@dataclass(frozen=True)
class PaddedBatch:
    """Arrays of a step.

    tokens, positions: int32 [B, T].
    write: int32 [B, T] by page group, the slot of each new token.
    read, read_positions: int32 [B, S] by page group, the slots to read and their positions.
    rows: int64 [tokens], the index of each of the batch's tokens in a flat [B * T].
    """

    tokens: np.ndarray
    positions: np.ndarray
    write: tuple[np.ndarray, ...]
    read: tuple[np.ndarray, ...]
    read_positions: tuple[np.ndarray, ...]
    rows: np.ndarray

    @property
    def sizes(self) -> Sizes:
        """B, T, and the S of each page group: all shapes of the step."""
        return (*self.tokens.shape, tuple(read.shape[1] for read in self.read))

    def flat(self) -> np.ndarray:
        """All but `rows` as one int32 array, which a device gets in one copy; see `unpack`."""
        groups = [array for group in zip(self.write, self.read, self.read_positions, strict=True) for array in group]
        return np.concatenate([a.reshape(-1) for a in (self.tokens, self.positions, *groups)])


def unpack(flat: Array, sizes: Sizes) -> tuple[Array, Array, list[tuple[Array, Array, Array]]]:
    """Return tokens, positions, and (write, read, read_positions) by page group of a `PaddedBatch.flat`."""
    B, T, slots = sizes
    shapes = [(B, T), (B, T)]
    for S in slots:
        shapes += [(B, T), (B, S), (B, S)]
    arrays, at = [], 0
    for shape in shapes:
        arrays.append(flat[at : at + math.prod(shape)].reshape(shape))
        at += math.prod(shape)
    tokens, positions, *groups = arrays
    return tokens, positions, [tuple(groups[g : g + 3]) for g in range(0, len(groups), 3)]


def bucket(size: int) -> int:
    """Return the next power of two."""
    return 1 << max(0, size - 1).bit_length()


def quarter(size: int) -> int:
    """Return the next of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, …: four to a power of two."""
    step = max(1, bucket(size) // 8)
    return -(-size // step) * step


def pad(
    batch: Batch,
    page_size: int,
    windows: Sequence[int | None] | None = None,
    rounded: Callable[[int], int] = bucket,
    minimum: tuple[int, int] = (1, 1),
) -> PaddedBatch:
    """Pad a `Batch`, whose pages 0, 1, … are the cache's pages 1, 2, ….

    windows: of the page groups; a group needs no more pages than its window and the new tokens span. rounded: rounds a
    number of pages up. minimum: of B and T, for shapes that stay.
    """
    counts = np.diff(batch.starts)
    B, T = bucket(max(len(counts), minimum[0])), bucket(max(int(counts.max()), minimum[1]))
    T = T if T == 1 else max(16, T)  # fewer shapes to compile
    real_BT = np.zeros((B, T), bool)
    real_BT[: len(counts)] = np.arange(T) < counts[:, None]
    new_BT = np.full((B, T), FAR, np.int32)
    new_BT[: len(counts)] = np.where(
        real_BT[: len(counts)], batch.positions[:, None] + np.arange(T, dtype=np.int32), FAR
    )
    tokens = np.zeros((B, T), np.int32)
    tokens[real_BT] = batch.tokens
    groups = []
    for table, window in zip(batch.pages, windows or (None,) * len(batch.pages), strict=True):
        most = None if window is None else max(0, window + T - 3) // page_size + 2
        groups.append(_slots(table, new_BT, batch.positions + counts, page_size, most, rounded))
    write, read, read_positions = zip(*groups, strict=True)
    return PaddedBatch(tokens, new_BT, write, read, read_positions, np.flatnonzero(real_BT))


def _slots(
    table: np.ndarray,
    new_BT: np.ndarray,
    ends: np.ndarray,
    page_size: int,
    most: int | None,
    rounded: Callable[[int], int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a page group's slots to write, slots to read, and the positions of these.

    new: positions of the new tokens, FAR for padding. ends: the position after each sequence's last. most: an upper
    bound on the pages of a sequence.
    """
    (B, T), (size, columns) = new_BT.shape, table.shape
    held = (table >= 0) & (np.arange(columns) * page_size < ends[:, None])
    count = 1 + int(held.sum(1).max())  # one page at least is padding
    pages = rounded(count) if most is None or count > most + 1 else min(rounded(count), most + 1)
    order = np.argsort(~held, axis=1, kind="stable")[:, :pages]  # the pages that are held come first
    rows = np.arange(size)[:, None]
    held, cached = held[rows, order], table[rows, order] + 1
    within = np.arange(page_size, dtype=np.int32)
    read = np.zeros((B, pages, page_size), np.int32) + within
    read[:size, : order.shape[1]] += (np.where(held, cached, 0) * page_size)[:, :, None].astype(np.int32)
    read_positions = np.full((B, pages, page_size), FAR, np.int32)
    positions = (order * page_size)[:, :, None].astype(np.int32) + within
    written = held[:, :, None] & (positions < ends[:, None, None])
    read_positions[:size, : order.shape[1]] = np.where(written, positions, FAR)
    new = new_BT[:size]
    real = new != FAR
    page = table[rows, np.where(real, new // page_size, 0)] + 1
    write = np.zeros((B, T), np.int32)
    write[:size] = np.where(real, page * page_size + new % page_size, 0)
    return write, read.reshape(B, -1), read_positions.reshape(B, -1)


_MAX_PADDING = 128  # tokens of padding that cost as much as another step


def split(batch: Batch) -> list[np.ndarray]:
    """Return the sequences of each step that a batch is run in: all, or those of one new token apart from the longer.

    In a step with a long chunk, every sequence is padded to its length.
    """
    counts = np.diff(batch.starts)
    one, more = np.flatnonzero(counts == 1), np.flatnonzero(counts > 1)
    if not len(one) or not len(more):
        return [np.arange(len(counts))]
    longest = bucket(int(counts.max()))
    waste = (bucket(len(counts)) - bucket(len(more))) * longest - bucket(len(one))
    return [more, one] if waste >= _MAX_PADDING else [np.arange(len(counts))]


def part(batch: Batch, sequences: np.ndarray) -> Batch:
    """Return a batch of some sequences of a batch, in order."""
    drawn = _within(np.cumsum([0, *batch.draws]), sequences)
    return build_batch(
        [batch.tokens[batch.starts[b] : batch.starts[b + 1]] for b in sequences],
        batch.positions[sequences],
        tuple(table[sequences] for table in batch.pages),
        draws=batch.draws[sequences],
        sampling=tuple(batch.sampling[b] for b in sequences),
        counters=batch.counters[sequences],
        history=tuple(batch.history[b] for b in sequences),
        prompt_lengths=batch.prompt_lengths[sequences],
        adapters=() if batch.adapters is None else batch.adapters[sequences],
        masks=tuple(batch.masks[r] for r in drawn) if batch.masks else (),
        targets=None if batch.targets is None else batch.targets[_within(batch.starts, sequences)],
    )


def _within(bounds: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """Return the indices from bounds[b] to bounds[b + 1] of each sequence."""
    return np.concatenate([np.arange(bounds[b], bounds[b + 1]) for b in sequences])


def in_parts(step: Callable[[Batch], StepResult], batch: Batch) -> StepResult:
    """Run a batch in the steps of `split` and return their results as one."""
    parts = split(batch)
    if len(parts) == 1:
        return step(batch)
    results = [step(part(batch, sequences)) for sequences in parts]
    bounds = np.cumsum([0, *batch.draws])
    whole = empty_result(int(bounds[-1]), max(result.top_ids.shape[1] for result in results))
    if batch.targets is not None:
        whole.target_logprobs = np.zeros(len(batch.tokens), np.float32)
    for sequences, result in zip(parts, results, strict=True):
        rows, width = _within(bounds, sequences), result.top_ids.shape[1]
        whole.tokens[rows], whole.logprobs[rows] = result.tokens, result.logprobs
        whole.top_ids[rows, :width], whole.top_logprobs[rows, :width] = result.top_ids, result.top_logprobs
        if batch.targets is not None:
            whole.target_logprobs[_within(batch.starts, sequences)] = result.target_logprobs
    return whole
