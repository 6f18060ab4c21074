"""Supervised fine-tuning: the mean negative log-likelihood of the tokens that carry loss.

The mean is over the tokens of a whole optimiser step. With gradient accumulation, every batch is divided by the count
of all batches together (`weight` of them, summed): a step over ragged batches is then that of one large batch, where a
mean of means would favour the tokens of short ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemkit.data.batch import TokenBatch


def sum_nll(logprobs_R: Any, targets_R: Any, xp: ModuleType) -> Any:
    """Return the sum of -log p over the rows that carry loss, a scalar array.

    logprobs_R: log-probability of each row's target. targets_R: token ids, negative where a row carries no loss; the
    log-probability of such a row may be anything, and gets no gradient. xp: numpy, torch, jax.numpy or keras.ops.
    """
    return -xp.sum(xp.where(targets_R >= 0, logprobs_R, xp.zeros_like(logprobs_R)))


def mean_nll(logprobs_R: Any, targets_R: Any, count: float, xp: ModuleType) -> Any:
    """Return one batch's part of the step's loss: its `sum_nll` over the loss tokens of all batches of the step.

    The parts of the batches add up to the loss, and their gradients to its gradient. count: from `loss_tokens`.
    """
    return sum_nll(logprobs_R, targets_R, xp) / count


def loss_tokens(batches: Iterable[TokenBatch]) -> int:
    """Return how many tokens of these batches carry loss."""
    return sum(int((batch.targets >= 0).sum()) for batch in batches)
