"""Block formats against gguf-py, bit for bit. Budget: 5 s."""

import gguf
import numpy as np
import pytest
from gguf import quants

from gemkit.errors import GemkitError
from gemkit.weights.quant import BLOCKS, OTHER_TYPES, GGMLType, dequantise, nbytes, quantise

EXACT = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
# Offsets of a block's scales: float16, kept finite in random blocks
SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0]}
SCALES |= {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def oracle(kind: GGMLType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(int(kind))


def awkward(rng: np.random.Generator, columns: int) -> np.ndarray:
    """Normal rows, a row of zeros, huge and tiny ones, ties, one sign only."""
    x = rng.normal(size=(40, columns)).astype(np.float32)
    x[0] = 0
    x[1] *= 1e4
    x[2] *= 1e-6
    x[3] = np.round(x[3] * 4) / 8
    x[4] = np.abs(x[4])
    x[5] = -np.abs(x[5])
    x[6, ::2] = -0.0
    return x


def test_the_table_is_ggmls():
    for kind, block in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[oracle(kind)] == tuple(block)
        assert oracle(kind).name == kind.name
    known = {int(t): t.name for t in gguf.GGMLQuantizationType}
    assert set(known) <= set(OTHER_TYPES) | set(GGMLType)
    assert all(known[n] == name for n, name in OTHER_TYPES.items() if n in known)


@pytest.mark.parametrize("kind", GGMLType, ids=lambda kind: kind.name)
def test_dequantise_is_bit_equal(kind: GGMLType):
    rng = np.random.default_rng(1)
    block = BLOCKS[kind]
    raw = rng.integers(0, 256, (5000, block.bytes), dtype=np.uint8)
    for at in SCALES.get(kind.name, []):
        raw[:, at : at + 2] = rng.normal(size=(5000, 1)).astype("<f2").view(np.uint8)
    if kind.name in ("F32", "F16", "BF16"):
        raw = quantise(kind, rng.normal(size=5000)).reshape(5000, -1)
    mine = dequantise(kind, raw, (50, 100 * block.elements))
    theirs = quants.dequantize(raw.reshape(50, -1), oracle(kind))
    assert mine.dtype == np.float32
    np.testing.assert_array_equal(bits(mine), bits(theirs.reshape(mine.shape)))


@pytest.mark.parametrize("name", EXACT)
def test_quantise_is_byte_equal(name: str):
    kind = GGMLType[name]
    x = awkward(np.random.default_rng(2), 256)
    np.testing.assert_array_equal(quantise(kind, x), quants.quantize(x, oracle(kind)).reshape(-1).view(np.uint8))


@pytest.mark.parametrize(("name", "tolerance"), [("Q4_K", 0.075), ("Q5_K", 0.036), ("Q6_K", 0.03), ("Q8_0", 0.005)])
def test_the_plain_quantisers_are_close(name: str, tolerance: float):
    x = awkward(np.random.default_rng(3), 512)
    x[2] *= 1e3  # float16 scales cannot follow it lower
    back = dequantise(GGMLType[name], quantise(GGMLType[name], x), x.shape)
    span = np.abs(x).max(axis=1, keepdims=True)
    assert (np.abs(back - x) <= tolerance * np.maximum(span, 1e-4)).all()
    assert not back[0].any()


def test_more_than_one_chunk():
    x = np.random.default_rng(4).normal(size=(3, 1 << 19)).astype(np.float32)
    raw = quantise(GGMLType.Q4_0, x)
    theirs = quants.dequantize(raw.reshape(3, -1), oracle(GGMLType.Q4_0))
    np.testing.assert_array_equal(dequantise(GGMLType.Q4_0, raw, x.shape), theirs)


def test_refusals():
    with pytest.raises(GemkitError, match="blocks hold 32"):
        nbytes(GGMLType.Q8_0, (2, 33))
    with pytest.raises(GemkitError, match="bytes are not"):
        dequantise(GGMLType.F32, np.zeros(5, np.uint8), (1,))
    with pytest.raises(GemkitError, match="not finite"):
        quantise(GGMLType.Q8_0, np.full((1, 32), np.nan))
    assert np.isnan(dequantise(GGMLType.BF16, quantise(GGMLType.BF16, np.full(4, np.nan)), (4,))).all()
