"""The one door to weights in JAX: `linear` and `rows`, of a plain matrix and of one with 8 or 4 bits a number.

    bits   values                              scales                             bytes a number
    8      int8 [O, C, 32]                     bfloat16 [O, C, 1]: scale          1.06
    4      uint8 [O, C, 16]                    bfloat16 [O, C, 2]: scale, least   0.63

A group is 32 numbers along the input, each its integer times the scale, plus the least one if there is such. Of 4 bits,
byte j holds number j in its low half and number j + 16 in its high half. Activations are never rounded. `linear_plain`
is what all forms must equal.

Letters: O outputs, I inputs, C groups, J numbers of a group or bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

GROUP = 32
# How much of a group's range 4 bits span: the rest may gain more than the ends lose
SPANS = (1.0, 0.9)


class Quantised(NamedTuple):
    """A matrix [O, I] in few bits; it stands where an array would."""

    values: Array
    scales: Array

    @property
    def shape(self) -> tuple[int, int]:
        inputs = math.prod(self.values.shape[1:]) * (1 if self.values.dtype == jnp.int8 else 2)
        return self.values.shape[0], inputs

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
    """One row: products and their sum, which XLA makes one pass over the packed bytes."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_CJ = x.reshape(-1, GROUP).astype(wide)
    if w.values.dtype == jnp.int8:
        products_OCJ = w.values.astype(wide) * x_CJ * w.scales.astype(wide)
    else:
        low_OCJ, high_OCJ = _halves(w, wide)
        products_OCJ = low_OCJ * x_CJ[:, : GROUP // 2] + high_OCJ * x_CJ[:, GROUP // 2 :]
    return products_OCJ.sum((1, 2)).astype(out).reshape(*x.shape[:-1], -1)


def rows(w: Array | Quantised, ids: Array, dtype: jnp.dtype) -> Array:
    """Rows [*ids, I] of a matrix; dtype: of a quantised one's."""
    if not isinstance(w, Quantised):
        return w[ids]
    flat = ids.reshape(-1)
    return dequantise(Quantised(w.values[flat], w.scales[flat]), dtype).reshape(*ids.shape, -1)


def quantise(w_OI: Array, bits: int) -> Quantised:
    """The matrix in 8 or 4 bits. Raises ValueError if I is no multiple of 32."""
    if w_OI.shape[1] % GROUP:
        raise ValueError(f"rows of {w_OI.shape[1]} numbers are not whole groups of {GROUP}")
    w_OCJ = w_OI.astype(jnp.float32).reshape(len(w_OI), -1, GROUP)
    if bits == 8:
        scales = (jnp.abs(w_OCJ).max(-1, keepdims=True) / 127).astype(jnp.bfloat16)
        return Quantised(jnp.clip(jnp.round(w_OCJ / _divisor(scales)), -127, 127).astype(jnp.int8), scales)
    low, high = w_OCJ.min(-1, keepdims=True), w_OCJ.max(-1, keepdims=True)
    best = None
    for span in SPANS:
        scales = jnp.concatenate([(high - low) * (span / 15), low * span], -1).astype(jnp.bfloat16)
        scale, least = jnp.split(scales.astype(jnp.float32), 2, -1)
        numbers = jnp.clip(jnp.round((w_OCJ - least) / _divisor(scale)), 0, 15)
        found = jnp.square(numbers * scale + least - w_OCJ).sum(-1, keepdims=True), scales, numbers
        if best is not None:
            better = found[0] < best[0]
            found = tuple(jnp.where(better, new, old) for new, old in zip(found, best))
        best = found
    _, scales, numbers = best
    bytes_OCJ = numbers.astype(jnp.uint8)
    return Quantised(bytes_OCJ[..., : GROUP // 2] | bytes_OCJ[..., GROUP // 2 :] << 4, scales)


def _divisor(scales: Array) -> Array:
    return jnp.where(scales == 0, 1, scales).astype(jnp.float32)


def dequantise(w: Quantised, dtype: jnp.dtype) -> Array:
    """The matrix [O, I]."""
    wide = jnp.promote_types(dtype, jnp.float32)
    if w.values.dtype == jnp.int8:
        numbers = w.values.astype(wide) * w.scales.astype(wide)
    else:
        numbers = jnp.concatenate(_halves(w, wide), -1)
    return numbers.astype(dtype).reshape(len(numbers), -1)


def _halves(w: Quantised, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Numbers 0 to 15 and 16 to 31 of each group [O, C, 16], of a matrix of 4 bits."""
    scale, least = jnp.split(w.scales.astype(dtype), 2, -1)
    return (w.values & 15).astype(dtype) * scale + least, (w.values >> 4).astype(dtype) * scale + least
