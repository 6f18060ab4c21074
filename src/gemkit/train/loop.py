"""Protocol of a training loop: the part of a run that a framework computes; `gemkit.train.run` does everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from gemkit.data.batch import TokenBatch


@dataclass(frozen=True)
class StepMetrics:
    """Result of one optimiser step.

    loss: mean over the loss tokens of all its batches. tokens: without padding. grad_norm: before clipping.
    non_finite: name of the first tensor with a NaN or an infinity, where loss or grad_norm is one; such a step must
    leave the weights as they were.
    memory: peak of the accelerator's memory in bytes; None counts the process instead.
    """

    loss: float
    tokens: int
    loss_tokens: int
    grad_norm: float
    non_finite: str | None = None
    memory: int | None = None


class Loop(Protocol):
    """Model, optimiser and random state of a run in one framework. decoder: the model as it is now."""

    @property
    def decoder(self) -> Any: ...

    def step(self, batches: Sequence[TokenBatch], lr: float) -> StepMetrics:
        """Take one optimiser step over these batches, which accumulate; at least one token carries loss."""

    def evaluate(self, batch: TokenBatch) -> tuple[float, int]:
        """Return the sum of -log p over the loss tokens, and their count; changes no state."""

    def state(self) -> dict[str, np.ndarray]:
        """Return trained parameters, optimiser moments and random state by name: all that the next step depends on."""

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the state; the arrays are read-only, and valid for the time of the call."""

    def parameters(self) -> dict[str, np.ndarray]:
        """Return the trained parameters by canonical name, float32."""
