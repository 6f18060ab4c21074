"""Scales found by search: never worse than plain rounding, better than ggml's, and the bytes mean the same to both.

Budget: 10 s.
"""

import ctypes

import gguf
import numpy as np
import pytest
from gguf import quants
from parity.llama_cpp import library
from parity.tolerances import SEARCHED_ERROR_RATIO_TO_GGML

from gemkit.errors import GemkitError
from gemkit.hub.demo import demo_path
from gemkit.weights.open import open_checkpoint
from gemkit.weights.quant import BLOCKS, GGMLType, dequantise, nbytes, quantise
from gemkit.weights.quant_search import SEARCHED, search


def ggml(kind: GGMLType, rows: np.ndarray) -> np.ndarray:
    """Return rows as llama.cpp's quantiser rounds them, without an importance matrix."""
    function = library().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.empty(nbytes(kind, rows.shape), np.uint8)
    assert function(kind, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None) == out.size
    return out


def squared_error(kind: GGMLType, stored: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the squared error of each block, float64."""
    difference = (dequantise(kind, stored, rows.shape) - rows).astype(np.float64)
    return np.square(difference).reshape(-1, BLOCKS[kind].elements).sum(1)


def random_rows(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    shape = 300, 512
    if kind == "normal":
        return rng.normal(size=shape).astype(np.float32)
    if kind == "heavy":
        return rng.standard_t(3, size=shape).astype(np.float32) * 0.02
    if kind == "skewed":
        return (rng.gamma(2, size=shape) - 0.5).astype(np.float32)
    assert kind == "awkward"
    x = rng.normal(size=(12, 512)).astype(np.float32)
    x[0] = 0
    x[1] *= 1e4
    x[2] *= 1e-7
    x[3] = np.round(x[3] * 4) / 8
    x[4], x[5] = np.abs(x[4]), -np.abs(x[5])
    x[6, 1:] = 0
    x[7] = 1.5
    x[8, ::33] = 100
    x[9] = -0.0
    x[10, :256] = 0
    x[11] *= 1e-38
    return x


@pytest.mark.parametrize("kind", SEARCHED)
@pytest.mark.parametrize("data", ["normal", "heavy", "skewed", "awkward"])
def test_no_block_is_worse_than_plain_rounding(kind, data):
    rows = random_rows(data)
    found = search(kind, rows)
    ours, plain = squared_error(kind, found, rows), squared_error(kind, quantise(kind, rows), rows)
    assert (ours <= plain).all()
    if data != "awkward":
        assert ours.sum() < 0.97 * plain.sum()
        theirs = squared_error(kind, ggml(kind, rows), rows)
        assert ours.sum() <= SEARCHED_ERROR_RATIO_TO_GGML * theirs.sum()
    read = quants.dequantize(found.reshape(len(rows), -1), gguf.GGMLQuantizationType(int(kind)))
    np.testing.assert_array_equal(read.reshape(rows.shape), dequantise(kind, found, rows.shape))


@pytest.mark.parametrize("kind", SEARCHED)
def test_no_block_of_real_weights_is_worse(kind):
    with open_checkpoint(demo_path()) as checkpoint:
        rows = checkpoint.tensors["model.layers.3.mlp.down_proj.weight"].to_float32()[:64]
        head = checkpoint.tensors["model.embed_tokens.weight"]
        size = nbytes(head.type, (512, 640))
        head = dequantise(head.type, head.data[:size], (512, 640))[:, :512]
    for values in (rows, head):
        ours = squared_error(kind, search(kind, values), values)
        assert (ours <= squared_error(kind, quantise(kind, values), values)).all()
        # What was Q4_K before has next to no error in it, of which no ratio is to be had
        floor = 1e-5 * np.square(values, dtype=np.float64).sum()
        theirs = squared_error(kind, ggml(kind, values), values).sum()
        assert ours.sum() <= max(SEARCHED_ERROR_RATIO_TO_GGML * theirs, floor)


@pytest.mark.parametrize("kind", SEARCHED)
def test_what_was_in_the_format_before_is_found_again(kind):
    """Numbers that the format holds exactly lose next to nothing: the scales are found, not only approached."""
    rows = random_rows("normal")
    rows = dequantise(kind, quantise(kind, rows), rows.shape)
    plain, ours = (squared_error(kind, f(kind, rows), rows).sum() for f in (quantise, search))
    assert ours <= plain and ours < 1e-3 * np.square(rows, dtype=np.float64).sum()


def test_the_result_depends_on_the_block_alone():
    """Not on its neighbours, on the chunks it is worked on in, or on the order."""
    rows = random_rows("heavy")
    for kind in SEARCHED:
        whole = search(kind, rows).reshape(len(rows), -1)
        np.testing.assert_array_equal(whole[217], search(kind, rows[217:218]))
        np.testing.assert_array_equal(whole[::-1], search(kind, rows[::-1]).reshape(len(rows), -1))


def test_other_types_and_errors_are_those_of_plain_rounding():
    rows = random_rows("normal")[:4]
    for kind in set(BLOCKS) - set(SEARCHED):
        np.testing.assert_array_equal(search(kind, rows), quantise(kind, rows))
    with pytest.raises(GemkitError, match="rows of 96 numbers"):
        search(GGMLType.Q4_K, rows[:, :96])
    rows[1, 1] = np.nan
    with pytest.raises(GemkitError, match="not finite"):
        search(GGMLType.Q4_0, rows)
