"""The one door to weights in Keras: `linear` and `rows`, of a matrix that is plain or low-rank adapted.

A matrix may be wider than the activations (float32 that is trained, in a bfloat16 model): it is rounded to their type
where it is used.

Letters: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import keras
from keras import KerasTensor as Tensor
from keras import ops


class LowRank(NamedTuple):
    """A matrix [O, I] with an adapter: base + scale · B·A; with magnitude (DoRA), its rows scaled to that norm.

    dropout: zeroes inputs of the adapter in training.
    Source: arXiv:2106.09685, arXiv:2402.09353 (section 4.3: the norm is a constant of the gradient).
    """

    base: Tensor
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    dropout: keras.layers.Dropout | None = None

    def norms(self) -> Tensor:
        """Return the norm of each row of base + scale · B·A, float32 [O]."""
        base, a, b = (ops.cast(w, "float32") for w in (self.base, self.a, self.b))
        return ops.sqrt(ops.sum(ops.square(base + self.scale * ops.matmul(b, a)), axis=1))


def linear(x: Tensor, w: Tensor | LowRank) -> Tensor:
    """Return x [..., I] times w [O, I] transposed, in the type of x."""
    if isinstance(w, LowRank):
        kept = x if w.dropout is None else w.dropout(x)
        y = linear(x, w.base) + linear(linear(kept, w.a), w.b) * w.scale
        return y if w.magnitude is None else y * ops.cast(w.magnitude / ops.stop_gradient(w.norms()), y.dtype)
    return ops.matmul(x, ops.transpose(ops.cast(w, x.dtype)))


def rows(w: Tensor, ids: Tensor, dtype: str) -> Tensor:
    """Return rows [*ids, I] of a matrix in dtype."""
    return ops.cast(ops.take(w, ids, axis=0), dtype)
