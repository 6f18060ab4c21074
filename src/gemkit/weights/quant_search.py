"""Block formats with scales found by search: `search` loses less than `quant.quantise`, which rounds plainly.

A format defines how a block is stored, not how its scale is chosen. Plain rounding takes the scale that just covers the
largest value; a smaller one clips that value a little and refines the steps of all the others. Here a handful of
scales are tried for every block; each is fitted to its levels by weighted least squares, the levels again to the scale,
and the best is kept. No block gets a larger squared error than plain rounding gives it.

The weight of an element x is |x| + sqrt(mean x²) of its group: large values count more, as they do in a product.
Blocks are columns here, so that NumPy's inner loops run along them. Letters: B blocks, G groups (elements that share
a scale), E elements of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gemkit.weights import quant
from gemkit.weights.quant import BLOCKS, GGMLType, dequantise, quantise

# Elements processed at a time: their temporaries stay in the processor's cache.
_CHUNK = 1 << 16
# Multiples of the plain number of steps up to a group's largest number; with a minimum, finer ones pay.
_STRETCH = tuple(np.float32(1 + step / 32) for step in range(-3, 6))
_FINE_STRETCH = tuple(np.float32(1 + step / 64) for step in range(-6, 12))
_ROUNDS = 2  # of fitting in turn

_HALF = {GGMLType.Q4_0: 8, GGMLType.Q5_0: 16}
_TOP = {GGMLType.Q4_1: 15, GGMLType.Q5_1: 31, GGMLType.Q4_K: 15, GGMLType.Q5_K: 31}
SEARCHED = (*_HALF, *_TOP, GGMLType.Q6_K)


def search(type: GGMLType, values: np.ndarray) -> np.ndarray:
    """Return the bytes (uint8, flat) of finite values [..., columns] in a block format.

    Q8_0 and the float types need no search and are rounded by `quantise`. Raises GemkitError as `quantise` does.
    """
    type = GGMLType(type)
    values = np.ascontiguousarray(values, np.float32)
    plain = quantise(type, values)
    if type not in SEARCHED:
        return plain
    block = BLOCKS[type]
    blocks, out = values.reshape(-1, block.elements), plain.reshape(-1, block.bytes)
    step = _CHUNK // block.elements
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        for at in range(0, len(blocks), step):
            part = blocks[at : at + step]
            found = _search(type, part)
            better = _error(type, found, part) < _error(type, out[at : at + step], part)
            out[at : at + step][better] = found[better]
    return plain


def _error(type: GGMLType, stored: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Return the squared error of each block, float64 [B]."""
    difference = dequantise(type, stored, blocks.shape) - blocks
    return np.einsum("be,be->b", difference, difference, dtype=np.float64)


def _search(type: GGMLType, blocks: np.ndarray) -> np.ndarray:
    """Return blocks [B, elements] as bytes uint8 [B, bytes]; undefined where no scale fits, as in a block of zeros."""
    if type == GGMLType.Q6_K:
        return _q6_k(blocks)
    if type in (GGMLType.Q4_K, GGMLType.Q5_K):
        return _scaled(type, blocks)
    x = np.ascontiguousarray(blocks.T)
    weights = _weights(x)
    if type in _HALF:
        half = _HALF[type]
        d = _stored(_symmetric(x, weights, half))
        levels = (_round(x / d, -half, half - 1) + half).astype(np.uint8).T
        heads = [_column(d)]
    else:
        line = _asymmetric(x, weights, _TOP[type])
        d, low = _stored(line.scale), _stored(line.low)
        levels = _round((x - low) / d, 0, _TOP[type]).astype(np.uint8).T
        heads = [_column(d), _column(low)]
    fifth = [quant._fifth_bits(levels)] if type in (GGMLType.Q5_0, GGMLType.Q5_1) else []
    return np.concatenate([*heads, *fifth, quant._pack(levels)], axis=1)


def _weights(x: np.ndarray) -> np.ndarray:
    """Return the weight of each element, [E, G]."""
    return np.abs(x) + np.sqrt(np.square(x).mean(axis=0))


def _stored(d: np.ndarray) -> np.ndarray:
    """Round scales to float16."""
    return np.nan_to_num(d, nan=0, posinf=0, neginf=0).astype("<f2").astype(np.float32)


def _column(d: np.ndarray) -> np.ndarray:
    """Return scales [B] as the bytes of their float16 [B, 2]."""
    return d.astype("<f2")[:, None].view(np.uint8)


def _round(scaled: np.ndarray, low: int, high: int) -> np.ndarray:
    """Return the nearest levels, in place; no NaN."""
    np.rint(scaled, out=scaled)
    np.nan_to_num(scaled, copy=False, nan=0)
    return np.clip(scaled, low, high, out=scaled)


# --- x = scale · level ---------------------------------------------------------------------------------------------


def _symmetric(x: np.ndarray, weights: np.ndarray, half: int) -> np.ndarray:
    """Return the best scales [G] of either sign for levels from -half to half - 1."""
    far = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    weighted = weights * x
    best, scale = np.zeros(x.shape[1], np.float32), np.zeros(x.shape[1], np.float32)

    def try_inverse(inverse: np.ndarray) -> None:
        levels = np.clip(np.rint(x * inverse), -half, half - 1)
        product = np.einsum("eg,eg->g", weighted, levels)
        square = np.einsum("eg,eg,eg->g", weights, levels, levels)
        gain = product * product / square  # reduction of the squared error by the fit
        better = gain > best
        best[better] = gain[better]
        scale[better] = (product / square)[better]

    for stretch in _STRETCH:
        try_inverse(-half * stretch / far)
        try_inverse((half - 1) * stretch / far)
    for _ in range(_ROUNDS):
        try_inverse(1 / scale)
    return scale


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    count = len(blocks)
    x = np.ascontiguousarray(blocks.reshape(-1, 16).T)
    weights = _weights(x)
    wanted = _symmetric(x, weights, 32).reshape(count, 16)
    far = np.take_along_axis(wanted, np.abs(wanted).argmax(axis=1)[:, None], axis=1)
    d = _stored(far / -128)
    for _ in range(_ROUNDS):
        scales = _round(wanted / d, -128, 127)
        levels = _round(x / (d * scales).reshape(-1), -32, 31)
        product = np.einsum("eg,eg,eg->g", weights, x, levels)
        square = np.einsum("eg,eg,eg->g", weights, levels, levels)
        wanted = np.nan_to_num(product / square).reshape(count, 16)
        # the block's own scale, fitted to all its levels
        product, square = (sums.reshape(count, 16) for sums in (product, square))
        d = _stored((scales * product).sum(1, keepdims=True) / (scales * scales * square).sum(1, keepdims=True))
    scales = _round(wanted / d, -128, 127)
    levels = _round(x / (d * scales).reshape(-1), -32, 31)
    packed = quant._pack_q6(np.ascontiguousarray(levels.T))
    return np.concatenate([*packed, scales.astype(np.int8).view(np.uint8), _column(d[:, 0])], axis=1)


# --- x = scale · level + low ---------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """scale, low: [G] each. error: the weighted squared error without the part that all lines share, [G]."""

    scale: np.ndarray
    low: np.ndarray
    error: np.ndarray


_Sums = tuple[np.ndarray, ...]


def _fit(x: np.ndarray, weights: np.ndarray, levels: np.ndarray, negative: bool) -> tuple[_Line, _Sums]:
    """Return the best line for these levels, and the weighted sums of 1, x, q, q² and qx for levels q, [G] each.

    negative: one of which low is not above 0.
    """
    weighted = weights * levels
    w, wx = weights.sum(axis=0), np.einsum("eg,eg->g", weights, x)
    wq, wqq = weighted.sum(axis=0), np.einsum("eg,eg->g", weighted, levels)
    wqx = np.einsum("eg,eg->g", weighted, x)
    determinant = w * wqq - wq * wq
    scale, low = (w * wqx - wq * wx) / determinant, (wqq * wx - wq * wqx) / determinant
    if negative:
        above = ~(low <= 0)
        scale, low = np.where(above, wqx / wqq, scale), np.where(above, np.float32(0), low)
    error = scale * (scale * wqq + 2 * low * wq - 2 * wqx) + low * (low * w - 2 * wx)
    return _Line(scale, low, error), (w, wx, wq, wqq, wqx)


def _asymmetric(x: np.ndarray, weights: np.ndarray, top: int, negative: bool = False) -> _Line:
    """Return the best lines for levels from 0 to top."""
    low, high = x.min(axis=0), x.max(axis=0)
    if negative:
        low = np.minimum(low, 0)
    best = _Line((high - low) / np.float32(top), low, np.full(len(low), np.inf, np.float32))

    def try_line(inverse: np.ndarray, low: np.ndarray) -> None:
        line, _ = _fit(x, weights, np.clip(np.rint((x - low) * inverse), 0, top), negative)
        better = (line.error < best.error) & (line.scale > 0)
        for kept, new in zip(best, line):
            kept[better] = new[better]

    for stretch in _FINE_STRETCH:
        try_line(top * stretch / (high - low), low)
    for _ in range(_ROUNDS):
        try_line(1 / best.scale, best.low)
    return best


def _scaled(type: GGMLType, blocks: np.ndarray) -> np.ndarray:
    """Search for Q4_K or Q5_K: each group's line has a scale and a minimum of 6 bits, in units of the block's own."""
    count, top = len(blocks), _TOP[type]
    x = np.ascontiguousarray(blocks.reshape(-1, 32).T)
    weights = _weights(x)
    line = _asymmetric(x, weights, top, negative=True)
    d, dmin = (part.reshape(count, 8).max(axis=1, keepdims=True) / np.float32(63) for part in (line.scale, -line.low))
    least = np.full(count, np.inf, np.float32)
    best: tuple[np.ndarray, ...] = ()
    for _ in range(_ROUNDS + 1):
        d, dmin = _stored(d), _stored(dmin)
        scales = _round(line.scale.reshape(count, 8) / d, 0, 63)
        minima = _round(-line.low.reshape(count, 8) / dmin, 0, 63)
        step, offset = (d * scales).reshape(-1), (dmin * minima).reshape(-1)
        levels = _round((x + offset) / step, 0, top)
        difference = step * levels - offset - x
        error = np.einsum("eg,eg,eg->g", weights, difference, difference).reshape(count, 8).sum(1)
        found = d[:, 0], dmin[:, 0], scales, minima, levels.T.reshape(count, 8, 32)
        better = error < least
        least[better] = error[better]
        best = best or found
        for kept, new in zip(best, found):
            kept[better] = new[better]
        line, sums = _fit(x, weights, levels, negative=True)
        d, dmin = _units(scales, minima, sums)
    d, dmin = best[:2]
    scales, minima, packed = (part.astype(np.uint8) for part in best[2:])
    head = [_column(d), _column(dmin), *quant._pack_scales(scales, minima)]
    high = [quant._high_bits(packed)] if type == GGMLType.Q5_K else []
    return np.concatenate([*head, *high, quant._pack_pairs(packed)], axis=1)


def _units(scales: np.ndarray, minima: np.ndarray, sums: _Sums) -> tuple[np.ndarray, np.ndarray]:
    """Return the block's two units [B, 1], fitted to all its levels with their scales and minima [B, 8]."""
    w, wx, wq, wqq, wqx = (part.reshape(scales.shape) for part in sums)
    products = scales * scales * wqq, scales * minima * wq, minima * minima * w, scales * wqx, minima * wx
    aa, ab, bb, ax, bx = (part.sum(axis=1, keepdims=True) for part in products)
    determinant = aa * bb - ab * ab
    d, dmin = (bb * ax - ab * bx) / determinant, (ab * ax - aa * bx) / determinant
    alone = ~(dmin > 0) | ~np.isfinite(d)
    return np.where(alone, ax / aa, d), np.where(alone, np.float32(0), dmin)
