"""The one door to weights in JAX: `linear` and `rows`, of a matrix that is plain, quantised or low-rank adapted.

`gemkit.models.frameworks.quantise` describes the format of 8 and 4 bits. A plain matrix may be wider than the
activations (float32 that is trained, in a bfloat16 model): it is rounded to their type where it is used.

Letters: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from gemkit.models.frameworks import quantise as packed

KEPT = "kept"  # name of results that activation checkpointing need not compute again


class Quantised(NamedTuple):
    """A matrix [O, I] in few bits; it stands where an array would."""

    values: Array
    scales: Array

    @property
    def shape(self) -> tuple[int, int]:
        return packed.matrix_shape(jnp, self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "magnitude", "key", "fixed_gain"],
    meta_fields=["scale", "dropout"],
)
@dataclass(frozen=True)
class LowRank:
    """A matrix [O, I] with an adapter: base + scale · B·A; with magnitude (DoRA), its rows scaled to that norm.

    dropout: probability of zeroing an input of the adapter, where there is a key.
    Source: arXiv:2106.09685, arXiv:2402.09353 (section 4.3: the norm is a constant of the gradient).
    """

    base: Array | Quantised
    a: Array
    b: Array
    scale: float
    magnitude: Array | None = None
    dropout: float = 0.0
    key: Array | None = None
    fixed_gain: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.a.nbytes + self.b.nbytes

    def norms(self) -> Array:
        """Return the norm of each row of base + scale · B·A, float32 [O]."""
        base = dequantise(self.base, jnp.float32) if isinstance(self.base, Quantised) else self.base
        return jnp.linalg.norm(base.astype(jnp.float32) + self.scale * (self.b @ self.a).astype(jnp.float32), axis=1)

    def gain(self) -> Array:
        """Return the factor of each row that gives it its magnitude, float32 [O]."""
        return self.magnitude / checkpoint_name(jax.lax.stop_gradient(self.norms()), KEPT)


def linear(x: Array, w: Array | Quantised | LowRank, out: jnp.dtype | None = None) -> Array:
    """Return x [..., I] times w [O, I] transposed, by the fastest form that is equal. out: its type, None: x's."""
    y = checkpoint_name(_product(x, w, out), KEPT)
    if not isinstance(w, LowRank) or (w.magnitude is None and w.fixed_gain is None):
        return y
    gain_O = w.gain() if w.fixed_gain is None else w.fixed_gain
    return y * gain_O.astype(y.dtype)


def _product(x: Array, w: Array | Quantised | LowRank, out: jnp.dtype | None) -> Array:
    if isinstance(w, LowRank):
        kept = x
        if w.key is not None and w.dropout > 0:
            kept = jnp.where(jax.random.bernoulli(w.key, 1 - w.dropout, x.shape), x / (1 - w.dropout), 0)
        return _product(x, w.base, out) + _product(_product(kept, w.a, None), w.b, out) * w.scale
    if not isinstance(w, Quantised):
        w = w.astype(x.dtype)
        return x @ w.T if out is None else jnp.matmul(x, w.T, preferred_element_type=out)
    form = linear_one if math.prod(x.shape[:-1]) == 1 else linear_plain
    return form(x, w, out or x.dtype)


def linear_plain(x: Array, w: Quantised, out: jnp.dtype) -> Array:
    """Widen the matrix and multiply: any number of rows, more memory traffic."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, dequantise(w, x.dtype).T, preferred_element_type=wide).astype(out)


def linear_one(x: Array, w: Quantised, out: jnp.dtype) -> Array:
    """Multiply one row, in one pass over the packed bytes."""
    return packed.multiply_row(jnp, x, *w).astype(out).reshape(*x.shape[:-1], -1)


def rows(w: Array | Quantised, ids: Array, dtype: jnp.dtype | None = None) -> Array:
    """Return rows [*ids, I] of a matrix in dtype; None: in that of a plain one."""
    if not isinstance(w, Quantised):
        return w[ids].astype(dtype or w.dtype)
    flat = ids.reshape(-1)
    return packed.dequantise(jnp, w.values[flat], w.scales[flat], dtype).reshape(*ids.shape, -1)


def quantise(w_OI: Array, bits: int) -> Quantised:
    """Return the matrix in 8 or 4 bits. Raises ValueError if I is no multiple of 32."""
    return Quantised(*packed.quantise(jnp, w_OI, bits))


def dequantise(w: Quantised, dtype: jnp.dtype) -> Array:
    """Return the matrix [O, I]."""
    return packed.dequantise(jnp, w.values, w.scales, dtype)
