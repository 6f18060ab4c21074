"""Learning rates by step, pure functions in Python floats: constant, linear, cosine and warm-up-stable-decay.

Steps count from 1. All schedules rise linearly to `lr` in the first `warmup` steps, which reach it with the last of
them. Those that fall would reach `floor` one step after the last, so that no step is without effect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """The same rate in every step after the warm-up."""

    lr: float
    warmup: int = 0

    def __call__(self, step: int) -> float:
        return self.lr * min(1.0, step / max(1, self.warmup))


@dataclass(frozen=True)
class Linear:
    """A straight line from `lr` to `floor` over `steps` steps, warm-up included."""

    lr: float
    steps: int
    warmup: int = 0
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * step / self.warmup
        return self.lr + (self.floor - self.lr) * _share(step, max(1, self.warmup), self.steps)


@dataclass(frozen=True)
class Cosine:
    """Half a period of the cosine from `lr` to `floor` over `steps` steps, warm-up included."""

    lr: float
    steps: int
    warmup: int = 0
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * step / self.warmup
        cosine = math.cos(math.pi * _share(step, max(1, self.warmup), self.steps))
        return self.floor + (self.lr - self.floor) * 0.5 * (1.0 + cosine)


@dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay: `lr` until the last `decay` of `steps` steps, then a straight line to `floor`.

    A run can be prolonged from any checkpoint before the decay. Source: Hu et al., MiniCPM, 2024, section 4.
    """

    lr: float
    steps: int
    warmup: int = 0
    decay: int = 0
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * step / self.warmup
        return self.lr + (self.floor - self.lr) * _share(step, max(1, self.steps - self.decay), self.steps)


Schedule = Constant | Linear | Cosine | WSD


def _share(step: int, first: int, last: int) -> float:
    """Return the position of a step from 0 at `first` (and before) to 1 behind `last`."""
    return min(1.0, max(0, step - first) / (last + 1 - first)) if last >= first else float(step > last)
