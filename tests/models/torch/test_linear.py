"""Weights of 8 and 4 bits in PyTorch: their layout, every form of the product, and what they cost. Budget: 25 s."""

from unittest import mock

import numpy as np
import pytest
import torch
from parity.cases import CASES
from parity.tolerances import BFLOAT16_PRODUCT, FRAMEWORK_FLOAT32, INT4_MATRIX, INT8_MATRIX, relative_error

from gemkit.arch import reference
from gemkit.errors import GemkitError
from gemkit.models.torch import Decoder, load_decoder
from gemkit.models.torch.linear import (
    Quantised,
    dequantise,
    linear,
    linear_one,
    linear_plain,
    quantise,
    rows,
)
from gemkit.weights.checkpoint import Checkpoint

BOUNDS = {8: INT8_MATRIX, 4: INT4_MATRIX}


def matrix(outputs: int = 96, inputs: int = 128) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_numbers_come_back(bits):
    w = matrix()
    few = quantise(w, bits)
    assert few.shape == w.shape
    assert few.nbytes == w.numel() * {8: 34, 4: 20}[bits] // 32
    error = dequantise(few, torch.float32) - w
    step = (w.view(96, -1, 32).amax(-1) - w.view(96, -1, 32).amin(-1)) / (2**bits - 1)
    assert (error.view(96, -1, 32).abs().amax(-1) <= 1.1 * step).all()
    assert relative_error(dequantise(few, torch.float32), w) <= BOUNDS[bits]
    # What has no more different numbers than the format is kept, to the rounding of its scale
    coarse = torch.arange(32).remainder(2**bits).float().expand(4, 32) - 3
    assert torch.equal(dequantise(quantise(coarse, bits), torch.float32).round(), coarse)
    assert not dequantise(quantise(torch.zeros(2, 64), bits), torch.float32).any()


def test_where_the_bits_stand():
    """Byte j of a group: number j low, number j + 16 high, each a multiple of the scale above the minimum."""
    w = torch.arange(32.0).remainder(16).view(1, 32)
    few = quantise(w, 4)
    assert few.values.tolist() == [[[j | j << 4 for j in range(16)]]] and few.scales.tolist() == [[[1.0, 0.0]]]
    eight = quantise(torch.arange(-127.0, 129.0, 8).view(1, 32), 8)
    assert eight.values.shape == (1, 1, 32) and eight.values[0, 0, 0] == -127 and eight.scales.item() == 1.0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_is_the_plain_one(bits, dtype):
    w = matrix()
    few, x = quantise(w, bits), torch.randn(1, 1, 128).to(dtype)
    expected = (x.float() @ dequantise(few, torch.float32).T).numpy()
    bound = FRAMEWORK_FLOAT32 if dtype == torch.float32 else BFLOAT16_PRODUCT
    for form in (linear, linear_plain, linear_one):
        out = form(x, few)
        assert (out.dtype, out.shape) == (dtype, (1, 1, 96))
        assert relative_error(out.float().numpy(), expected) <= bound, form
    many = torch.randn(3, 5, 128)
    assert torch.equal(linear(many, few), linear_plain(many, few))
    ids = torch.tensor([[3, 0], [95, 3]])
    assert torch.equal(rows(few, ids, dtype), dequantise(few, dtype)[ids])


def test_a_large_matrix_goes_in_pieces(monkeypatch):
    few, x = quantise(matrix(), 4), torch.randn(2, 128)
    whole = linear_plain(x, few)
    monkeypatch.setattr("gemkit.models.torch.linear.PIECE", 128 * 7)
    assert relative_error(linear_plain(x, few), whole) <= FRAMEWORK_FLOAT32
    again = quantise(matrix(), 4)
    assert torch.equal(again.values, few.values) and torch.equal(again.scales, few.scales)


def test_compiled_one_row_is_one_graph_without_the_wide_matrix(monkeypatch):
    torch._dynamo.reset()
    calls = []
    monkeypatch.setattr("gemkit.models.torch.linear.linear_plain", lambda x, w: calls.append(x) or x.new_zeros(1, 96))
    few, x = quantise(matrix(), 4), torch.randn(1, 128)
    compiled = torch.compile(linear, fullgraph=True)
    with torch.inference_mode():
        assert relative_error(compiled(x, few), linear_one(x, few)) <= FRAMEWORK_FLOAT32
    assert not calls


@pytest.mark.parametrize("name", ["gemma1_2b", "gemma3", "untied_embedding"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_computes_with_the_rounded_weights(name, bits):
    """Against the reference on the numbers that the few bits stand for; the vocabulary's have 8, norms are exact."""
    case = CASES[name]
    decoder = load_decoder(case.config, Checkpoint.from_params(case.config, case.params()).tensors, bits=bits)
    rounded = case.params()
    for key, value in rounded.items():
        if value.ndim > 1:
            kept = 8 if key in ("model.embed_tokens.weight", "lm_head.weight") else bits
            rounded[key] = dequantise(quantise(torch.from_numpy(value), kept), torch.float32).numpy()
    expected = reference.forward(case.config, rounded, case.tokens())
    with torch.inference_mode():
        logits = decoder(torch.from_numpy(case.tokens())[None])[0].numpy()
    assert relative_error(logits, expected) <= FRAMEWORK_FLOAT32
    full = reference.forward(case.config, case.params(), case.tokens())
    assert relative_error(logits, full) > 100 * FRAMEWORK_FLOAT32
    matrices = [m for m in decoder.modules() if isinstance(m, Quantised)]
    assert len(matrices) == sum(value.ndim > 1 for value in rounded.values())
    assert all(p.dtype == torch.float32 and p.ndim == 1 for p in decoder.parameters())


def test_rows_that_are_no_whole_groups_are_refused():
    with pytest.raises(ValueError, match="rows of 48 numbers are not whole groups of 32"):
        quantise(torch.zeros(2, 48), 4)
    case = CASES["gemma3"]
    weights = dict(Checkpoint.from_params(case.config, case.params()).tensors)
    with (
        mock.patch("gemkit.models.torch.load.quantise", side_effect=ValueError("rows of 48 numbers")),
        pytest.raises(GemkitError, match=r"model.embed_tokens.weight: rows of 48 numbers; choose another dtype"),
    ):
        load_decoder(case.config, weights, bits=4)
    assert isinstance(load_decoder(case.config, weights, bits=8), Decoder)


def test_both_frameworks_make_the_same_bits():
    from gemkit.models.jax import linear as other

    w = matrix(40, 256).numpy()
    for bits in (8, 4):
        ours, theirs = quantise(torch.from_numpy(w), bits), other.quantise(w, bits)
        assert np.array_equal(ours.values.numpy(), np.asarray(theirs.values))
        assert np.array_equal(ours.scales.float().numpy(), np.asarray(theirs.scales, np.float32))
