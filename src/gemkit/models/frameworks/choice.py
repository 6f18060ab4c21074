"""Choice of tokens from logits: from the largest few where these suffice, as `gemkit.engine.sampling` defines it.

A device returns, for each row of logits, a packed float32 [2 k + 1]: the k largest logits, their ids (exact up to 2^24)
and Σ exp(logit - largest), NaN if a logit is not finite. k is `TOP`, or 1 if every row is an argmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemkit.engine.interface import Batch, StepResult, check_finite
from gemkit.engine.sampling import Sampling, adjust, draw
from gemkit.errors import GemkitError

TOP = 128  # the most logits of a row that are packed


@dataclass(frozen=True)
class RowLogits:
    """Top-k logits and log-sum-exp of a row.

    top_ids, top: the largest logits and their ids, in descending order, the lower id first among equals.
    log_sum: log Σ exp over the vocabulary.
    whole: the logits of the vocabulary, float32 [V], if `needs_whole` asks for them.
    """

    top_ids: np.ndarray
    top: np.ndarray
    log_sum: float
    whole: np.ndarray | None


def needs_whole(sampling: Sampling) -> bool:
    """Return whether the `TOP` largest logits are too few to choose from."""
    if sampling.has_penalty or sampling.logit_bias:
        return True
    return sampling.temperature > 0 and not 0 < sampling.top_k <= TOP


def is_argmax(sampling: Sampling) -> bool:
    """Return whether the largest logit suffices."""
    return sampling.temperature == 0 and sampling.logprobs is None and not needs_whole(sampling)


def unpack_top(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids and logits [R, k] of packed rows, the lower id first among equals, and log Σ exp [R].

    Raises GemkitError if a row has a logit that is not finite.
    """
    k = packed.shape[1] // 2
    top, ids, sums = packed[:, :k], packed[:, k : 2 * k].astype(np.int32), packed[:, -1].astype(np.float64)
    check_finite(sums)
    order = np.lexsort((ids, -top))
    top, ids = np.take_along_axis(top, order, -1), np.take_along_axis(ids, order, -1)
    return ids, top, top[:, 0].astype(np.float64) + np.log(sums)


@dataclass(frozen=True)
class Draws:
    """The draws of a batch, in the order of its `StepResult`.

    sequences: int64 [R], the sequence of each draw. ordinals: int64 [R], its index among that sequence's draws.
    tokens: int64 [R], the index in ``batch.tokens`` of the token after which it draws.
    """

    batch: Batch
    sequences: np.ndarray
    ordinals: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, batch: Batch) -> Draws:
        sequences = np.repeat(np.arange(len(batch.draws)), batch.draws)
        ordinals = np.arange(len(sequences)) - (batch.draws.cumsum() - batch.draws)[sequences]
        return cls(batch, sequences, ordinals, batch.starts[sequences + 1] - batch.draws[sequences] + ordinals)

    def mask(self, r: int) -> np.ndarray | None:
        """Return the mask of a draw, if it has one."""
        return self.batch.masks[r] if self.batch.masks else None

    def needs_whole(self, r: int) -> bool:
        """Return whether a draw needs all logits of its row."""
        return self.mask(r) is not None or needs_whole(self.batch.sampling[self.sequences[r]])

    def are_argmax(self) -> bool:
        """Return whether the largest logit suffices for every draw."""
        batch = self.batch
        return all(mask is None for mask in batch.masks) and all(is_argmax(batch.sampling[b]) for b in self.sequences)


def choose(rows: Sequence[RowLogits], draws: Draws) -> StepResult:
    """Draw tokens as `gemkit.engine.sampling.sample` defines it, of those that the masks allow."""
    batch = draws.batch
    width = max((batch.sampling[b].logprobs or 0 for b in draws.sequences), default=0)
    result = empty_result(len(rows), width)
    for r, (row, b, ordinal) in enumerate(zip(rows, draws.sequences, draws.ordinals, strict=True)):
        sampling, mask = batch.sampling[b], draws.mask(r)
        ids, values = row.top_ids, row.top
        if row.whole is not None:
            # The tokens after the draw's own are not yet part of its history
            history = batch.history[b][: len(batch.history[b]) - (batch.draws[b] - 1 - ordinal)]
            values = adjust(row.whole, sampling, history, int(batch.prompt_lengths[b]))
            ids = np.arange(len(values), dtype=np.int32)
        if mask is not None:
            ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(ids)])
            values = values[ids]
            if not len(ids):
                raise GemkitError("the mask of a draw allows no token")
        index = draw(values, sampling, int(batch.counters[b]) + int(ordinal))
        token = int(ids[index])
        result.tokens[r] = token
        if sampling.logprobs is None:
            continue
        raw = row.whole[token] if row.whole is not None else values[index]
        result.logprobs[r] = float(raw) - row.log_sum
        count = sampling.logprobs
        result.top_ids[r, :count] = row.top_ids[:count]
        result.top_logprobs[r, :count] = row.top[:count].astype(np.float64) - row.log_sum
    return result


def empty_result(size: int, width: int) -> StepResult:
    """Return a result of size rows; width: of the top log-probabilities."""
    return StepResult(
        np.full(size, -1, np.int32),
        np.zeros(size, np.float32),
        np.full((size, width), -1, np.int32),
        np.full((size, width), -np.inf, np.float32),
    )
