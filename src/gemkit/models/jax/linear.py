"""The one door to weights in JAX: `linear` and `rows`, of a plain matrix and of one with 8 or 4 bits a value.

`gemkit.models.frameworks.quantise` describes the format. `linear_plain` is what all forms must equal.

Letters: O outputs, I inputs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from gemkit.models.frameworks import quantise as packed


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


def linear(x: Array, w: Array | Quantised, out: jnp.dtype | None = None) -> Array:
    """x [..., I] times w [O, I] transposed, by the fastest form that gives the same; out: its type, x's if None."""
    if not isinstance(w, Quantised):
        return x @ w.T if out is None else jnp.matmul(x, w.T, preferred_element_type=out)
    form = linear_one if math.prod(x.shape[:-1]) == 1 else linear_plain
    return form(x, w, out or x.dtype)


def linear_plain(x: Array, w: Quantised, out: jnp.dtype) -> Array:
    """Widens the matrix and multiplies: any number of rows, more memory traffic."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, dequantise(w, x.dtype).T, preferred_element_type=wide).astype(out)


def linear_one(x: Array, w: Quantised, out: jnp.dtype) -> Array:
    """One row, in one pass over the packed bytes."""
    return packed.multiply_row(jnp, x, *w).astype(out).reshape(*x.shape[:-1], -1)


def rows(w: Array | Quantised, ids: Array, dtype: jnp.dtype) -> Array:
    """Rows [*ids, I] of a matrix; dtype: of a quantised one's."""
    if not isinstance(w, Quantised):
        return w[ids]
    flat = ids.reshape(-1)
    return packed.dequantise(jnp, w.values[flat], w.scales[flat], dtype).reshape(*ids.shape, -1)


def quantise(w_OI: Array, bits: int) -> Quantised:
    """The matrix in 8 or 4 bits. Raises ValueError if I is no multiple of 32."""
    return Quantised(*packed.quantise(jnp, w_OI, bits))


def dequantise(w: Quantised, dtype: jnp.dtype) -> Array:
    """The matrix [O, I]."""
    return packed.dequantise(jnp, w.values, w.scales, dtype)
