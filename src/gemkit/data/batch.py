"""Batches of a training step: arrays of fixed shape, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemkit.data.pack import MULTIPLE, best_fit, bucket
from gemkit.data.sample import Sample
from gemkit.errors import GemkitError, UsageError, brief, check_flag, whole_number


@dataclass(frozen=True)
class TokenBatch:
    """Arrays of a training step, int32 [B, T] each.

    tokens: 0 where there is padding.
    targets: the token that follows tokens[b, t] in the same sample if it carries loss, else −1.
    positions: from 0 in each sample; 0 where there is padding.
    segments: 1, 2, … by sample within a row; 0 where there is padding.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


class Batches:
    """Endless iterator of batches; every epoch has each sample exactly once, in another order.

    samples: at most `max_length` tokens each, with loss on at least one. batch_size: rows, B. packing: several samples
    a row, all batches of one width T; else one sample a row, samples of similar lengths together, T by their length.
    The last batch of an epoch may have rows of padding alone.
    seed: the order depends on it and on the epoch. shuffle: False keeps one order, for validation.

    Raises GemkitError for no samples, and for one that is too long or carries no loss.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        batch_size: int,
        max_length: int,
        packing: bool = True,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        for name, value, minimum in (("batch_size", batch_size, 1), ("max_length", max_length, 2), ("seed", seed, 0)):
            found = whole_number(value)
            if found is None or found < minimum:
                raise UsageError(f"{name} is {brief(value)}: give a whole number from {minimum}")
        self._samples, self._batch_size, self._seed = samples, batch_size, seed
        self._packing, self._shuffle = check_flag("packing", packing), shuffle
        _check(samples, max_length)
        lengths = np.array([len(sample.tokens) for sample in samples])
        # Samples are put into slots in descending order of their keys: slots are the same in each epoch, and samples
        # of one key change places.
        self._keys = lengths if packing else np.array([bucket(length, max_length) for length in lengths.tolist()])
        slots = -np.sort(-self._keys)
        self._rows = best_fit(slots, max_length) if packing else [[slot] for slot in range(len(slots))]
        self._widths = [int(slots[row].sum()) for row in self._rows]
        if packing:
            widest = -(-max(self._widths) // MULTIPLE) * MULTIPLE
            self._widths = [min(widest, max_length)] * len(self._rows)
        self._digest = _digest(samples, [batch_size, max_length, int(packing), seed, int(shuffle)])
        self._epoch = self._batch = 0
        self._order = self._plan(0)

    @property
    def per_epoch(self) -> int:
        """Number of batches in an epoch, the same in each."""
        return -(-len(self._rows) // self._batch_size)

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, from 0."""
        return self._epoch

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shapes [B, T] of the batches in an epoch, each once, ascending."""
        return sorted({(self._batch_size, self._width(at)) for at in range(self.per_epoch)})

    @property
    def fill(self) -> float:
        """Share of the positions in an epoch's batches that are no padding."""
        positions = sum(self._batch_size * self._width(at) for at in range(self.per_epoch))
        return sum(len(sample.tokens) for sample in self._samples) / positions

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        batch = self._make(self._batch)
        self._batch += 1
        if self._batch == self.per_epoch:
            self._epoch, self._batch = self._epoch + 1, 0
            self._order = self._plan(self._epoch)
        return batch

    def once(self) -> Iterator[TokenBatch]:
        """Yield the batches of the present epoch from its beginning; the position stays."""
        for at in range(self.per_epoch):
            yield self._make(at)

    def state(self) -> dict[str, Any]:
        """Return the position, for `restore`; its values are JSON's."""
        return {"epoch": self._epoch, "batch": self._batch, "data": self._digest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state` was taken. Raises GemkitError for other samples, another seed or options."""
        if state.get("data") != self._digest:
            raise GemkitError(
                "the data set, the seed or the options of its batches are not those of the checkpoint: resume with the "
                "same ones, or start a new run"
            )
        epoch, batch = whole_number(state.get("epoch")), whole_number(state.get("batch"))
        if epoch is None or batch is None or epoch < 0 or not 0 <= batch < self.per_epoch:
            raise GemkitError(f"the position in the data is {brief(dict(state))}: the checkpoint is damaged")
        self._epoch, self._batch = epoch, batch
        self._order = self._plan(epoch)

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sample of each slot, and the order: of rows with packing, else of batches."""
        many = len(self._rows) if self._packing else self.per_epoch
        if self._shuffle:
            drawn = _permutation(len(self._keys), [self._seed, epoch, 0])
            order = _permutation(many, [self._seed, epoch, 1])
        else:
            drawn, order = np.arange(len(self._keys)), np.arange(many)
        return drawn[np.argsort(-self._keys[drawn], kind="stable")], order

    def _width(self, group: int) -> int:
        return self._widths[group * self._batch_size]  # they descend

    def _make(self, at: int) -> TokenBatch:
        slots, order = self._order
        first = at * self._batch_size if self._packing else int(order[at]) * self._batch_size
        rows = range(first, min(first + self._batch_size, len(self._rows)))
        width = self._widths[first]
        tokens, positions, segments = (np.zeros((self._batch_size, width), np.int32) for _ in range(3))
        targets = np.full((self._batch_size, width), -1, np.int32)
        for b, row in enumerate(rows):
            start = 0
            for segment, slot in enumerate(self._rows[int(order[row]) if self._packing else row], 1):
                sample = self._samples[slots[slot]]
                stop = start + len(sample.tokens)
                tokens[b, start:stop] = sample.tokens
                targets[b, start : stop - 1] = np.where(sample.loss[1:], sample.tokens[1:], -1)
                positions[b, start:stop] = np.arange(stop - start)
                segments[b, start:stop] = segment
                start = stop
        return TokenBatch(tokens, targets, positions, segments)


def _check(samples: Sequence[Sample], max_length: int) -> None:
    if not samples:
        raise GemkitError("there are no samples to make batches of: give a data set with at least one usable row")
    for number, sample in enumerate(samples):
        if len(sample.tokens) > max_length:
            raise GemkitError(
                f"sample {number} has {len(sample.tokens):,} tokens, more than max_length {max_length:,}: truncate it"
            )
        if not sample.loss[1:].any() or sample.loss[0]:
            fault = "has loss on its first token" if sample.loss[:1].any() else "has no token with loss"
            raise GemkitError(f"sample {number} {fault}: a batch of such samples teaches nothing; leave it out")


def _digest(samples: Sequence[Sample], options: list[int]) -> str:
    """Return a checksum of samples and options."""
    digest = hashlib.sha256(repr(options).encode())
    for sample in samples:
        digest.update(len(sample.tokens).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(sample.tokens, "<i4").tobytes() + np.packbits(sample.loss).tobytes())
    return digest.hexdigest()


def _permutation(count: int, key: list[int]) -> np.ndarray:
    """Return int [count]. NumPy keeps the raw bits of a generator the same between versions, not its permutations."""
    return np.argsort(np.random.PCG64(key).random_raw(count), kind="stable")
