"""Matrices of 8 or 4 bits an element, in the arrays of torch or JAX: one arithmetic, hence the same bits in both.

    bits   values                              scales                                bytes an element
    8      int8 [O, C, 32]                     bfloat16 [O, C, 1]: scale             1.06
    4      uint8 [O, C, 16]                    bfloat16 [O, C, 2]: scale, minimum    0.63

A group is 32 elements along the input, each its integer times the scale, plus the minimum if there is one. Of 4 bits,
byte j holds element j in its low half and element j + 16 in its high half.

xp: the module of the arrays, `torch` or `jax.numpy`. Letters: O outputs, I inputs, C groups, J elements of a group.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

Array = Any  # of torch or JAX

GROUP = 32
PIECE = 1 << 23  # elements that are widened at a time
# Shares of a group's range that 4 bits span: a narrower step may gain more than the clipped ends lose
SPANS = (1.0, 0.9)


def quantise(xp: ModuleType, w_OI: Array, bits: int) -> tuple[Array, Array]:
    """Return values and scales of a matrix. Raises ValueError if I is no multiple of 32."""
    if w_OI.shape[1] % GROUP:
        raise ValueError(f"rows of {w_OI.shape[1]} numbers are not whole groups of {GROUP}")
    w_OCJ = cast(w_OI, xp.float32).reshape(w_OI.shape[0], -1, GROUP)
    if bits == 8:
        scales = cast(xp.amax(xp.abs(w_OCJ), axis=-1, keepdims=True) / 127, xp.bfloat16)
        return cast(xp.clip(xp.round(w_OCJ / _divisor(xp, scales)), -127, 127), xp.int8), scales
    low, high = xp.amin(w_OCJ, axis=-1, keepdims=True), xp.amax(w_OCJ, axis=-1, keepdims=True)
    best = None
    for span in SPANS:
        scales = cast(xp.concatenate([(high - low) * (span / 15), low * span], axis=-1), xp.bfloat16)
        scale, minimum = _scale_and_minimum(scales, xp.float32)
        integers = xp.clip(xp.round((w_OCJ - minimum) / _divisor(xp, scale)), 0, 15)
        error = xp.sum(xp.square(integers * scale + minimum - w_OCJ), axis=-1, keepdims=True)
        found = error, scales, integers
        if best is not None:
            better = error < best[0]
            found = tuple(xp.where(better, new, old) for new, old in zip(found, best))
        best = found
    _, scales, integers = best
    bytes_OCJ = cast(integers, xp.uint8)
    return bytes_OCJ[..., : GROUP // 2] | bytes_OCJ[..., GROUP // 2 :] << 4, scales


def dequantise(xp: ModuleType, values: Array, scales: Array, dtype: Any) -> Array:
    """Return the matrix [O, I]."""
    wide = xp.promote_types(dtype, xp.float32)
    if values.dtype == xp.int8:
        w_OCJ = cast(values, wide) * cast(scales, wide)
    else:
        w_OCJ = xp.concatenate(_halves(values, scales, wide), axis=-1)
    return cast(w_OCJ, dtype).reshape(w_OCJ.shape[0], -1)


def multiply_row(xp: ModuleType, x: Array, values: Array, scales: Array) -> Array:
    """Return one row x [..., I] times the matrix transposed, [O], in float32 at least.

    Products and their sum: compiled, one pass over the packed bytes that writes no wider matrix.
    """
    wide = xp.promote_types(x.dtype, xp.float32)
    x_CJ = cast(x.reshape(-1, GROUP), wide)
    if values.dtype == xp.int8:
        products_OCJ = cast(values, wide) * x_CJ * cast(scales, wide)
    else:
        low_OCJ, high_OCJ = _halves(values, scales, wide)
        products_OCJ = low_OCJ * x_CJ[:, : GROUP // 2] + high_OCJ * x_CJ[:, GROUP // 2 :]
    return products_OCJ.sum((1, 2))


def matrix_shape(xp: ModuleType, values: Array) -> tuple[int, int]:
    """Return [O, I] of a matrix."""
    return values.shape[0], math.prod(values.shape[1:]) * (1 if values.dtype == xp.int8 else 2)


def cast(x: Array, dtype: Any) -> Array:
    """Return an array of another type."""
    return x.to(dtype) if hasattr(x, "to") else x.astype(dtype)


def _divisor(xp: ModuleType, scales: Array) -> Array:
    return cast(xp.where(scales == 0, 1, scales), xp.float32)


def _scale_and_minimum(scales: Array, dtype: Any) -> tuple[Array, Array]:
    scales = cast(scales, dtype)
    return scales[..., :1], scales[..., 1:]


def _halves(values: Array, scales: Array, dtype: Any) -> tuple[Array, Array]:
    """Return elements 0 to 15 and 16 to 31 of each group, [O, C, 16], of a matrix of 4 bits."""
    scale, minimum = _scale_and_minimum(scales, dtype)
    return cast(values & 15, dtype) * scale + minimum, cast(values >> 4, dtype) * scale + minimum
