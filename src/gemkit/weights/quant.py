"""Block formats of ggml: sizes, and conversion from and to float32 in NumPy.

A row is stored as whole blocks, each with its own scale. Layouts: ``ggml-common.h`` of the ggml library.
All values are little-endian. Letters: B blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from gemkit.errors import GemkitError


class GGMLType(IntEnum):
    """Element types that gemkit reads, with their values in ggml."""

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


class Block(NamedTuple):
    """One block: elements and bytes."""

    elements: int
    bytes: int


BLOCKS: dict[GGMLType, Block] = {
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

# ggml's names of the types that gemkit does not read, for the error message.
OTHER_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}

# Blocks converted at a time: bounds the temporary memory to a few tens of megabytes.
_CHUNK_ELEMENTS = 1 << 20


def nbytes(type: GGMLType, shape: tuple[int, ...]) -> int:
    """Return a tensor's bytes; raises GemkitError if its rows are not whole blocks. Example: Q8_0 (2, 64) is 136."""
    block = BLOCKS[type]
    if shape[-1] % block.elements:
        raise GemkitError(
            f"rows of {shape[-1]} numbers cannot be stored as {type.name}, whose blocks hold {block.elements}: "
            "choose another type"
        )
    return math.prod(shape) // block.elements * block.bytes


def dequantise(type: GGMLType, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 elements [*shape] of a tensor's bytes (uint8, any shape). Raises GemkitError if sizes differ."""
    type = GGMLType(type)
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if raw.size != nbytes(type, shape):
        raise GemkitError(f"{raw.size} bytes are not a {type.name} tensor of shape {shape}: get the file again")
    if type == GGMLType.F32:
        return raw.view("<f4").astype(np.float32).reshape(shape)
    if type == GGMLType.F16:
        return raw.view("<f2").astype(np.float32).reshape(shape)
    if type == GGMLType.BF16:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    block = BLOCKS[type]
    blocks = raw.reshape(-1, block.bytes)
    out = np.empty((len(blocks), block.elements), np.float32)
    step = _CHUNK_ELEMENTS // block.elements
    # Random bytes may hold infinities and their differences; that is for the model's checks, not for a warning
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(0, len(blocks), step):
            out[i : i + step] = _DEQUANTISE[type](blocks[i : i + step])
    return out.reshape(shape)


def quantise(type: GGMLType, values: np.ndarray) -> np.ndarray:
    """Return the bytes (uint8, flat) of finite values [..., columns] in a block format, rounded as in ggml's reference.

    Q4_K, Q5_K and Q6_K are plain roundings without ggml's search for the best scales. Raises GemkitError if the rows
    are not whole blocks or a value is not finite.
    """
    type = GGMLType(type)
    values = np.ascontiguousarray(values, np.float32)
    size = nbytes(type, values.shape)
    if type == GGMLType.F32:
        return values.astype("<f4").reshape(-1).view(np.uint8)
    if type == GGMLType.F16:
        with np.errstate(over="ignore"):
            return values.astype("<f2").reshape(-1).view(np.uint8)
    if type == GGMLType.BF16:
        return _to_bf16(values).reshape(-1).view(np.uint8)
    if not np.isfinite(values).all():
        raise GemkitError(f"numbers that are not finite cannot be stored as {type.name}: store them as F32")
    block = BLOCKS[type]
    blocks = values.reshape(-1, block.elements)
    out = np.empty((len(blocks), block.bytes), np.uint8)
    step = _CHUNK_ELEMENTS // block.elements
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        for i in range(0, len(blocks), step):
            out[i : i + step] = _QUANTISE[type](blocks[i : i + step])
    assert out.size == size
    return out.reshape(-1)


# --- reading -------------------------------------------------------------------------------------------------------


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """Return the float16 at byte `at` of each block, as float32 [B, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Unpack uint8 [B, n] to [B, 2n]: all low halves, then all high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _bits(packed: np.ndarray) -> np.ndarray:
    """Unpack uint8 [B, n] to its bits [B, 8n], lowest first."""
    return np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little")


def _from_q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _from_q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _from_q5_0(blocks: np.ndarray) -> np.ndarray:
    q = _nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4
    return _half(blocks, 0) * (q.astype(np.float32) - 16)


def _from_q5_1(blocks: np.ndarray) -> np.ndarray:
    q = _nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4
    return _half(blocks, 0) * q.astype(np.float32) + _half(blocks, 2)


def _from_q8_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _unpack_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 8 scales and 8 minima of 6 bits each in 12 bytes: uint8 [B, 12] to two of [B, 8]."""
    low, minimum, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    minima = np.concatenate([minimum & 63, (high >> 4) | (minimum >> 6) << 4], axis=1)
    return scales, minima


def _from_scaled(blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Scale Q4_K and Q5_K: uint8 [B, 8, 32] times its group's scale minus its group's minimum, float32 [B, 256]."""
    scales, minima = _unpack_scales(blocks[:, 4:16])
    scale = (_half(blocks, 0) * scales.astype(np.float32))[:, :, None]
    minimum = (_half(blocks, 2) * minima.astype(np.float32))[:, :, None]
    return (scale * q.astype(np.float32) - minimum).reshape(len(blocks), 256)


def _pairs(packed: np.ndarray) -> np.ndarray:
    """Unpack uint8 [B, 128] of Q4_K and Q5_K to [B, 8, 32]: 32 bytes hold one group low and the next one high."""
    packed = packed.reshape(len(packed), 4, 1, 32)
    return np.concatenate([packed & 15, packed >> 4], axis=2).reshape(len(packed), 8, 32)


def _from_q4_k(blocks: np.ndarray) -> np.ndarray:
    return _from_scaled(blocks, _pairs(blocks[:, 16:]))


def _from_q5_k(blocks: np.ndarray) -> np.ndarray:
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _from_scaled(blocks, _pairs(blocks[:, 48:]) | high << 4)


def _from_q6_k(blocks: np.ndarray) -> np.ndarray:
    count = len(blocks)
    low = blocks[:, :128].reshape(count, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(count, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(count, 2, 1, 32) >> shifts & 3
    q = (low | high << 4).astype(np.float32).reshape(count, 16, 16) - 32
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (scale[:, :, None] * q).reshape(count, 256)


_DEQUANTISE: dict[GGMLType, Callable[[np.ndarray], np.ndarray]] = {
    GGMLType.Q4_0: _from_q4_0,
    GGMLType.Q4_1: _from_q4_1,
    GGMLType.Q5_0: _from_q5_0,
    GGMLType.Q5_1: _from_q5_1,
    GGMLType.Q8_0: _from_q8_0,
    GGMLType.Q4_K: _from_q4_k,
    GGMLType.Q5_K: _from_q5_k,
    GGMLType.Q6_K: _from_q6_k,
}


# --- writing -------------------------------------------------------------------------------------------------------


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """Return the upper 16 bits of float32, rounded to nearest even; a NaN stays one."""
    bits = values.view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, bits >> 16 | 64, rounded).astype("<u2")


def _inverse(d: np.ndarray) -> np.ndarray:
    """Return 1 / d, and 0 where d is 0."""
    return np.where(d == 0, np.float32(0), 1 / d)


def _bytes(d: np.ndarray) -> np.ndarray:
    """Return scales [B, 1] as the two bytes of their float16."""
    return d.astype("<f2").view(np.uint8)


def _pack(q: np.ndarray) -> np.ndarray:
    """Return the inverse of `_nibbles`."""
    half = q.shape[1] // 2
    return (q[:, :half] & 15) | q[:, half:] << 4


def _levels(scaled: np.ndarray, top: int) -> np.ndarray:
    return np.trunc(scaled).astype(np.uint8).clip(0, top)


def _symmetric(blocks: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Round to Q4_0 or Q5_0: the value farthest from 0 becomes -half exactly; return the scales and levels."""
    far = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    d = far / np.float32(-half)
    return d, _levels(blocks * _inverse(d) + np.float32(half + 0.5), 2 * half - 1)


def _asymmetric(blocks: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round to Q4_1 or Q5_1: the smallest value becomes level 0, the largest `top`; return scales, minima, levels."""
    low = blocks.min(axis=1, keepdims=True)
    d = (blocks.max(axis=1, keepdims=True) - low) / np.float32(top)
    return d, low, _levels((blocks - low) * _inverse(d) + np.float32(0.5), top)


def _fifth_bits(q: np.ndarray) -> np.ndarray:
    return np.packbits(q >> 4, axis=1, bitorder="little")


def _to_q4_0(blocks: np.ndarray) -> np.ndarray:
    d, q = _symmetric(blocks, 8)
    return np.concatenate([_bytes(d), _pack(q)], axis=1)


def _to_q4_1(blocks: np.ndarray) -> np.ndarray:
    d, low, q = _asymmetric(blocks, 15)
    return np.concatenate([_bytes(d), _bytes(low), _pack(q)], axis=1)


def _to_q5_0(blocks: np.ndarray) -> np.ndarray:
    d, q = _symmetric(blocks, 16)
    return np.concatenate([_bytes(d), _fifth_bits(q), _pack(q)], axis=1)


def _to_q5_1(blocks: np.ndarray) -> np.ndarray:
    d, low, q = _asymmetric(blocks, 31)
    return np.concatenate([_bytes(d), _bytes(low), _fifth_bits(q), _pack(q)], axis=1)


def _to_q8_0(blocks: np.ndarray) -> np.ndarray:
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(d)
    size = np.abs(scaled)
    # Half away from zero; the sum is exact, unlike floor(size + 0.5)
    q = np.sign(scaled) * (np.floor(size) + np.floor(2 * (size - np.floor(size))))
    return np.concatenate([_bytes(d), q.astype(np.int8).view(np.uint8)], axis=1)


def _to_scaled(blocks: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, for Q4_K and Q5_K, the 16 bytes of scales and the levels uint8 [B, 8, 32]."""
    groups = blocks.reshape(-1, 8, 32)
    low = np.maximum(-groups.min(axis=2), 0)  # the minimum is subtracted, so it is stored negated
    scale = (groups.max(axis=2) + low) / np.float32(top)
    d, dmin = (x.max(axis=1, keepdims=True) / np.float32(63) for x in (scale, low))
    scales = np.rint(scale * _inverse(d)).clip(0, 63).astype(np.uint8)
    minima = np.rint(low * _inverse(dmin)).clip(0, 63).astype(np.uint8)
    head = [_bytes(d), _bytes(dmin)]
    step = (head[0].view("<f2").astype(np.float32) * scales)[:, :, None]
    offset = (head[1].view("<f2").astype(np.float32) * minima)[:, :, None]
    levels = np.rint((groups + offset) * _inverse(step)).clip(0, top).astype(np.uint8)
    return np.concatenate(head + _pack_scales(scales, minima), axis=1), levels


def _pack_scales(scales: np.ndarray, minima: np.ndarray) -> list[np.ndarray]:
    """Pack 8 scales and 8 minima of 6 bits each, uint8 [B, 8], into three of [B, 4]: the last four lend bits."""
    high_s, high_m = scales[:, 4:], minima[:, 4:]
    return [scales[:, :4] | high_s >> 4 << 6, minima[:, :4] | high_m >> 4 << 6, (high_s & 15) | high_m << 4]


def _pack_pairs(levels: np.ndarray) -> np.ndarray:
    """Return the inverse of `_pairs`."""
    return ((levels[:, ::2] & 15) | levels[:, 1::2] << 4).reshape(len(levels), 128)


def _to_q4_k(blocks: np.ndarray) -> np.ndarray:
    head, levels = _to_scaled(blocks, 15)
    return np.concatenate([head, _pack_pairs(levels)], axis=1)


def _to_q5_k(blocks: np.ndarray) -> np.ndarray:
    head, levels = _to_scaled(blocks, 31)
    return np.concatenate([head, _high_bits(levels), _pack_pairs(levels)], axis=1)


def _high_bits(levels: np.ndarray) -> np.ndarray:
    """Return bit 4 of the levels of Q5_K, uint8 [B, 8, 32], a bit for each group in [B, 32]."""
    return np.bitwise_or.reduce(levels >> 4 << np.arange(8, dtype=np.uint8)[:, None], axis=1)


def _to_q6_k(blocks: np.ndarray) -> np.ndarray:
    count = len(blocks)
    groups = blocks.reshape(count, 16, 16)
    scale = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[:, :, None], axis=2)[:, :, 0] / np.float32(-32)
    d = np.abs(scale).max(axis=1, keepdims=True) / np.float32(127)
    scales = np.rint(scale * _inverse(d)).clip(-127, 127).astype(np.int8)
    tail = _bytes(d)
    step = (tail.view("<f2").astype(np.float32) * scales)[:, :, None]
    levels = np.rint(groups * _inverse(step)).clip(-32, 31).reshape(count, 256)
    return np.concatenate([*_pack_q6(levels), scales.view(np.uint8), tail], axis=1)


def _pack_q6(levels: np.ndarray) -> list[np.ndarray]:
    """Pack levels from -32 to 31 [B, 256] into their four lower bits, uint8 [B, 128], and two upper ones, [B, 64]."""
    packed = (levels + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = (packed[:, :, :2] & 15) | packed[:, :, 2:] << 4
    high = np.bitwise_or.reduce(packed >> 4 << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=2)
    return [low.reshape(-1, 128), high.reshape(-1, 64)]


_QUANTISE: dict[GGMLType, Callable[[np.ndarray], np.ndarray]] = {
    GGMLType.Q4_0: _to_q4_0,
    GGMLType.Q4_1: _to_q4_1,
    GGMLType.Q5_0: _to_q5_0,
    GGMLType.Q5_1: _to_q5_1,
    GGMLType.Q8_0: _to_q8_0,
    GGMLType.Q4_K: _to_q4_k,
    GGMLType.Q5_K: _to_q5_k,
    GGMLType.Q6_K: _to_q6_k,
}
