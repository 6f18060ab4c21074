"""The C++ core behind `NativeRunner` against the reference: cases, types of weights, hidden states, scores.

Budget: 40 s on two cores.
"""

import functools

import numpy as np
import pytest
from models.native.running import (
    QUANTISED,
    WIDE,
    Pages,
    Weight,
    make_batch,
    one_pass,
    params_of,
    plain_weights,
    reference_logits,
    weights_of,
)
from parity.cases import CASES, tokens
from parity.tolerances import (
    NATIVE_FLOAT32,
    NATIVE_INT8_CACHE,
    NATIVE_INT8_MATRICES,
    NATIVE_LOGPROB,
    relative_error,
)

from gemkit.arch import reference
from gemkit.engine.sampling import log_softmax
from gemkit.models.native import NativeRunner


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_reference(name, path):
    case = CASES[name]
    runner = NativeRunner(case.config, plain_weights(case.params()), threads=2, activations="float32")
    assert runner.path == path
    error = relative_error(one_pass(runner, case.tokens()), reference_logits(name))
    assert error <= NATIVE_FLOAT32, f"{name} on {path}: {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_float_weights_with_a_half_cache_stay_close(name, path):
    """In int8 mode float matrices still see float activations: what is left is the 16-bit cache."""
    case = CASES[name]
    runner = NativeRunner(case.config, plain_weights(case.params()), threads=2)
    error = relative_error(one_pass(runner, case.tokens()), reference_logits(name))
    assert error <= NATIVE_INT8_CACHE, f"{name} on {path}: {error:.1e}"


def test_hidden_and_score_agree_with_the_logits(path):
    case = CASES["gemma3"]
    ids, params = case.tokens(), case.params()
    runner = NativeRunner(case.config, plain_weights(params), threads=2, activations="float32")
    pages = Pages(runner, 4)
    batch = make_batch(pages, [(0, ids, 0)])
    expected = reference.hidden(case.config, params, ids)
    assert relative_error(runner.hidden(batch), expected) <= NATIVE_FLOAT32
    targets = np.append(ids[1:], -1).astype(np.int32)
    targets[5] = -1
    scores, logits = runner.score(batch, targets), runner.logits(batch)
    wanted = [0.0 if t < 0 else log_softmax(row)[t] for row, t in zip(logits, targets, strict=True)]
    assert scores[5] == 0 and scores[-1] == 0
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=NATIVE_LOGPROB)


@functools.cache
def quantised_case(kind: str) -> tuple[dict[str, Weight], np.ndarray, np.ndarray]:
    """Weights of `WIDE`, 100 tokens, and the reference's logits on the dequantised parameters."""
    weights, ids = weights_of(WIDE, kind, seed=3), tokens(WIDE, 100, 3)
    return weights, ids, reference.forward(WIDE, params_of(weights), ids)


@pytest.mark.parametrize("kind", ["F16", "BF16", *QUANTISED, "mix"])
def test_quantised_weights_mean_what_an_independent_program_says(kind, path):
    weights, ids, expected = quantised_case(kind)
    assert 3 < np.abs(expected).max() < 60
    exact = relative_error(one_pass(NativeRunner(WIDE, weights, threads=2, activations="float32"), ids), expected)
    assert exact <= NATIVE_FLOAT32, f"{kind} on {path}: {exact:.1e}"
    fast = relative_error(one_pass(NativeRunner(WIDE, weights, threads=2), ids), expected)
    limit = NATIVE_INT8_CACHE if kind in ("F16", "BF16") else NATIVE_INT8_MATRICES
    assert fast <= limit, f"{kind} with int8 activations on {path}: {fast:.1e}"
