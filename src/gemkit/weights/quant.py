"""ggml's tensor types: block sizes, and their values as float32.

Layouts and rounding follow ggml (ggml-quants.c); `dequantise` is exact, `quantise` gives the same bytes as ggml's own
Python package for the types that have one right answer.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from gemkit.errors import GemkitError


class GGMLType(IntEnum):
    """The types in which Gemma is published, with ggml's numbers."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30


# The other types' names, to refuse them by name.
GGML_NAMES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


class Block(NamedTuple):
    """elements: weights in a block. bytes: its size."""

    elements: int
    bytes: int


BLOCKS = {
    GGMLType.F32: Block(1, 4),
    GGMLType.F16: Block(1, 2),
    GGMLType.BF16: Block(1, 2),
    GGMLType.Q4_0: Block(32, 18),
    GGMLType.Q4_1: Block(32, 20),
    GGMLType.Q5_0: Block(32, 22),
    GGMLType.Q5_1: Block(32, 24),
    GGMLType.Q8_0: Block(32, 34),
    GGMLType.Q4_K: Block(256, 144),
    GGMLType.Q5_K: Block(256, 176),
    GGMLType.Q6_K: Block(256, 210),
}


def dequantise(kind: GGMLType, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Values of a tensor as float32 of `shape`; `data` is uint8 with whole blocks, rows contiguous."""
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if kind == GGMLType.F32:
        return flat.view("<f4").reshape(shape).copy()
    if kind == GGMLType.F16:
        return flat.view("<f2").astype(np.float32).reshape(shape)
    if kind == GGMLType.BF16:
        return (flat.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return _DEQUANTISE[kind](flat.reshape(-1, BLOCKS[kind].bytes)).reshape(shape)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block, as float32 [blocks, 1]."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _nibbles(q: np.ndarray) -> np.ndarray:
    return np.concatenate([q & 15, q >> 4], axis=1)


def _fifth_bits(q: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(q).view("<u4")
    return ((bits >> np.arange(32, dtype=np.uint32)) & 1).astype(np.uint8) << 4


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b, 2)


def _q5_0(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).astype(np.float32) - 16)


def _q5_1(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])).astype(np.float32) + _half(b, 2)


def _q8_0(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def _k_scales(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and minima from 12 bytes."""
    first, second, third = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scale = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minimum = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scale, minimum


def _with_minima(b: np.ndarray, codes: np.ndarray) -> np.ndarray:
    scale, minimum = _k_scales(b[:, 4:16])
    d = (_half(b, 0) * scale.astype(np.float32))[:, :, None]
    m = (_half(b, 2) * minimum.astype(np.float32))[:, :, None]
    return d * codes.astype(np.float32) - m


def _pairs_of_32(q: np.ndarray) -> np.ndarray:
    """[blocks, 128] nibble bytes → [blocks, 8, 32]: each 32 bytes hold two sub-blocks, low nibbles first."""
    q = q.reshape(len(q), 4, 1, 32) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    return (q & 15).reshape(len(q), 8, 32)


def _q4_k(b: np.ndarray) -> np.ndarray:
    return _with_minima(b, _pairs_of_32(b[:, 16:]))


def _q5_k(b: np.ndarray) -> np.ndarray:
    high = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & 1
    return _with_minima(b, _pairs_of_32(b[:, 48:]) | high << 4)


def _q6_k(b: np.ndarray) -> np.ndarray:
    n = len(b)
    low = b[:, :128].reshape(n, 2, 1, 2, 32) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1, 1)
    high = b[:, 128:192].reshape(n, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    codes = (low & 15).reshape(n, 2, 4, 32) | (high & 3) << 4
    scale = _half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)
    return scale[:, :, None] * (codes.reshape(n, 16, 16).astype(np.float32) - 32)


_DEQUANTISE = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
}


def quantise(kind: GGMLType, values: np.ndarray) -> np.ndarray:
    """Bytes of `values` (float32, rows of whole blocks) in a type, uint8.

    The K types take one scale and minimum per sub-block from its extremes: valid, but without ggml's search for the
    least error. Raises GemkitError if the rows are not whole blocks.
    """
    values = np.ascontiguousarray(values, np.float32)
    if kind == GGMLType.F32:
        return values.reshape(-1).view(np.uint8)
    if kind == GGMLType.F16:
        return values.astype("<f2").reshape(-1).view(np.uint8)
    if kind == GGMLType.BF16:
        bits = values.reshape(-1).view(np.uint32)
        rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
        quiet = (bits >> 16) | 64
        return np.where(np.isnan(values.reshape(-1)), quiet, rounded).astype("<u2").view(np.uint8)
    block = BLOCKS[kind]
    if values.shape[-1] % block.elements:
        raise GemkitError(f"rows of {values.shape[-1]} are not whole {kind.name} blocks of {block.elements}")
    return _QUANTISE[kind](values.reshape(-1, block.elements)).reshape(-1)


def _f16(x: np.ndarray) -> np.ndarray:
    return x.astype("<f2").view(np.uint8)


def _inverse(d: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _away_from_zero(x: np.ndarray) -> np.ndarray:
    return np.trunc(x + np.copysign(np.float32(0.5), x))


def _packed_nibbles(codes: np.ndarray) -> np.ndarray:
    return codes[:, :16] & 15 | codes[:, 16:] << 4


def _packed_fifth(codes: np.ndarray) -> np.ndarray:
    return np.packbits(codes >> 4 & 1, axis=1, bitorder="little")


def _signed_blocks(x: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray]:
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    d = largest / -offset
    codes = np.trunc(x * _inverse(d) + np.float32(offset + 0.5)).clip(0, 2 * offset - 1).astype(np.uint8)
    return d, codes


def _affine_blocks(x: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    d = (high - low) / np.float32(most)
    codes = np.trunc((x - low) * _inverse(d) + np.float32(0.5)).clip(0, most).astype(np.uint8)
    return d, low, codes


def _to_q4_0(x: np.ndarray) -> np.ndarray:
    d, codes = _signed_blocks(x, 8)
    return np.concatenate([_f16(d), _packed_nibbles(codes)], axis=1)


def _to_q4_1(x: np.ndarray) -> np.ndarray:
    d, low, codes = _affine_blocks(x, 15)
    return np.concatenate([_f16(d), _f16(low), _packed_nibbles(codes)], axis=1)


def _to_q5_0(x: np.ndarray) -> np.ndarray:
    d, codes = _signed_blocks(x, 16)
    return np.concatenate([_f16(d), _packed_fifth(codes), _packed_nibbles(codes)], axis=1)


def _to_q5_1(x: np.ndarray) -> np.ndarray:
    d, low, codes = _affine_blocks(x, 31)
    return np.concatenate([_f16(d), _f16(low), _packed_fifth(codes), _packed_nibbles(codes)], axis=1)


def _to_q8_0(x: np.ndarray) -> np.ndarray:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    codes = _away_from_zero(x * _inverse(d)).astype(np.int8).view(np.uint8)
    return np.concatenate([_f16(d), codes], axis=1)


def _to_k(x: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Header (super-scales and the 12 bytes of sub-scales) and codes [blocks, 8, 32]."""
    x = x.reshape(-1, 8, 32)
    minimum, step = np.maximum(0, -x.min(axis=2)), None
    step = (x.max(axis=2) + minimum).clip(0) / most
    d = (step.max(axis=1, keepdims=True) / 63).astype("<f2")
    m = (minimum.max(axis=1, keepdims=True) / 63).astype("<f2")
    sc = np.rint(step * _inverse(d.astype(np.float32))).clip(0, 63).astype(np.uint8)
    mn = np.rint(minimum * _inverse(m.astype(np.float32))).clip(0, 63).astype(np.uint8)
    used, low = d.astype(np.float32) * sc, m.astype(np.float32) * mn
    codes = np.rint((x + low[:, :, None]) * _inverse(used)[:, :, None]).clip(0, most).astype(np.uint8)
    scales = np.concatenate(
        [
            sc[:, :4] | sc[:, 4:] >> 4 << 6,
            mn[:, :4] | mn[:, 4:] >> 4 << 6,
            sc[:, 4:] & 15 | (mn[:, 4:] & 15) << 4,
        ],
        axis=1,
    )
    return np.concatenate([d.view(np.uint8), m.view(np.uint8), scales], axis=1), codes


def _packed_pairs(codes: np.ndarray) -> np.ndarray:
    pairs = (codes & 15).reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)


def _to_q4_k(x: np.ndarray) -> np.ndarray:
    header, codes = _to_k(x, 15)
    return np.concatenate([header, _packed_pairs(codes)], axis=1)


def _to_q5_k(x: np.ndarray) -> np.ndarray:
    header, codes = _to_k(x, 31)
    high = np.bitwise_or.reduce((codes >> 4) << np.arange(8, dtype=np.uint8).reshape(1, 8, 1), axis=1)
    return np.concatenate([header, high, _packed_pairs(codes)], axis=1)


def _to_q6_k(x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, 16, 16)
    step = np.abs(x).max(axis=2) / 31
    d = (step.max(axis=1, keepdims=True) / 127).astype("<f2")
    scale = np.rint(step * _inverse(d.astype(np.float32))).clip(0, 127).astype(np.int8)
    inverse = _inverse(d.astype(np.float32) * scale)[:, :, None]
    codes = (np.rint(x * inverse).clip(-32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = codes[:, :, :2] & 15 | (codes[:, :, 2:] & 15) << 4
    high = np.bitwise_or.reduce((codes >> 4) << np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1), axis=2)
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), scale.view(np.uint8), d.view(np.uint8)]
    return np.concatenate(parts, axis=1)


_QUANTISE = {
    GGMLType.Q4_0: _to_q4_0,
    GGMLType.Q4_1: _to_q4_1,
    GGMLType.Q5_0: _to_q5_0,
    GGMLType.Q5_1: _to_q5_1,
    GGMLType.Q8_0: _to_q8_0,
    GGMLType.Q4_K: _to_q4_k,
    GGMLType.Q5_K: _to_q5_k,
    GGMLType.Q6_K: _to_q6_k,
}
