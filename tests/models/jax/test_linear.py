"""Weights of 8 and 4 bits in JAX: every form of the product, and a model of them. Budget: 25 s.

That the bits are those of PyTorch is tested there; what they cost a real model too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.jax.test_runner import one
from parity.cases import CASES
from parity.tolerances import BFLOAT16_PRODUCT, FRAMEWORK_FLOAT32, relative_error

from gemkit.arch import reference
from gemkit.engine.sampling import Sampling
from gemkit.errors import GemkitError
from gemkit.models.jax import Decoder, abstract_decoder, load_decoder, load_runner
from gemkit.models.jax.linear import Quantised, dequantise, linear, linear_one, linear_plain, quantise, rows
from gemkit.weights.checkpoint import Checkpoint

W = np.random.default_rng(1).standard_normal((96, 128)).astype(np.float32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_form_is_the_plain_one(bits, dtype):
    few = quantise(W, bits)
    assert few.shape == W.shape and few.nbytes == W.size * {8: 34, 4: 20}[bits] // 32
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 1, 128)), dtype)
    expected = np.asarray(x, np.float32) @ np.asarray(dequantise(few, jnp.float32)).T
    bound = FRAMEWORK_FLOAT32 if dtype == jnp.float32 else BFLOAT16_PRODUCT
    for form in (linear, linear_plain, linear_one):
        out = jax.jit(form, static_argnums=2)(x, few, dtype)
        assert (out.dtype, out.shape) == (dtype, (1, 1, 96))
        assert relative_error(np.asarray(out, np.float32), expected) <= bound, form
    ids = np.array([[3, 0], [95, 3]])
    assert np.array_equal(rows(few, ids, dtype), dequantise(few, dtype)[ids])


def test_one_row_is_one_pass_over_the_bytes():
    """No array as large as the widened matrix, 4 bytes a number, is written."""
    few = quantise(W, 4)
    compiled = jax.jit(linear).lower(jnp.ones((1, 128)), few).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * W.size
    many = jax.jit(linear).lower(jnp.ones((4, 128)), few).compile()
    assert many.memory_analysis().temp_size_in_bytes >= 4 * W.size


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_computes_with_the_rounded_weights(bits):
    case = CASES["untied_embedding"]
    decoder = load_decoder(case.config, Checkpoint.from_params(case.config, case.params()).tensors, bits=bits)
    rounded = case.params()
    for key, value in rounded.items():
        assert isinstance(decoder.params[key], Quantised) == (value.ndim > 1)
        if value.ndim > 1:
            kept = 8 if key in ("model.embed_tokens.weight", "lm_head.weight") else bits
            rounded[key] = np.asarray(dequantise(quantise(value, kept), jnp.float32))
    expected = reference.forward(case.config, rounded, case.tokens())
    logits = jax.jit(Decoder.__call__)(decoder, case.tokens()[None])[0]
    assert relative_error(logits, expected) <= FRAMEWORK_FLOAT32
    shapes = abstract_decoder(case.config, bits=bits)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), decoder)


def test_a_runner_of_few_bits_goes_on_as_it_began():
    case = CASES["gemma3"]
    weights = Checkpoint.from_params(case.config, case.params()).tensors
    runner = load_runner(case.config, weights, device="cpu", dtype="int4")
    assert runner.activations == "float32"
    size = sum(value.nbytes for value in runner.decoder.params.values())
    assert runner.weight_bytes == size < 1.3 * case.config.parameter_count()
    runner.reserve([20] * len(runner.groups))
    ids = case.tokens()[:20]
    whole = runner.logits(one(runner, ids, 0))
    step = [runner.step(one(runner, ids[p : p + 1], p, Sampling())) for p in range(len(ids))]
    assert [s.tokens[0] for s in step] == np.argmax(whole, 1).tolist()


def test_rows_that_are_no_whole_groups_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="rows of 48 numbers are not whole groups of 32"):
        quantise(np.zeros((2, 48), np.float32), 4)

    def refuse(*_):
        raise ValueError("rows of 48 numbers")

    monkeypatch.setattr("gemkit.models.jax.load._quantise", refuse)
    case = CASES["gemma3"]
    weights = Checkpoint.from_params(case.config, case.params()).tensors
    with pytest.raises(GemkitError, match=r"model.embed_tokens.weight: rows of 48 numbers; choose another dtype"):
        load_decoder(case.config, weights, bits=4)
