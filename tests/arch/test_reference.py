"""The reference forward pass on its own: causality, arguments, errors. Budget: 5 s.

That its numbers are right is proved against transformers in ``tests/parity/test_reference.py``.
"""

import numpy as np
import pytest
from parity.cases import CASES

from gemkit.arch.config import LayerSpec
from gemkit.arch.reference import forward, gelu, hidden, inverse_frequencies, norm, rope
from gemkit.errors import GemkitError

CASE = CASES["gemma3"]


def test_logits_depend_on_the_past_only():
    tokens = CASE.tokens()[:40]
    changed = tokens.copy()
    changed[30] = (changed[30] + 1) % CASE.config.vocab_size
    a, b = (forward(CASE.config, CASE.params(), t) for t in (tokens, changed))
    assert a.dtype == np.float64 and a.shape == (40, CASE.config.vocab_size)
    assert np.array_equal(a[:30], b[:30]) and not np.allclose(a[30:], b[30:])


def test_only_distances_matter_near_the_origin():
    """RoPE is relative; the float32 angles cost a little."""
    tokens = CASE.tokens()[:24]
    a = forward(CASE.config, CASE.params(), tokens)
    b = forward(CASE.config, CASE.params(), tokens, np.arange(24) + 64)
    assert 0.0 < np.abs(a - b).max() < 1e-4 * np.abs(a).max()


def test_hidden_is_what_the_head_reads():
    tokens, params = CASE.tokens()[:8], CASE.params()
    h = hidden(CASE.config, params, tokens)
    logits = h @ params["model.embed_tokens.weight"].astype(np.float64).T
    np.testing.assert_array_equal(logits, forward(CASE.config, params, tokens))


def test_trace_names_every_stage():
    names = []
    forward(CASE.config, CASE.params(), CASE.tokens()[:4], trace=lambda name, x: names.append((name, x.shape)))
    halves = [f"layers.{i}.{half}" for i in range(4) for half in ("attention", "mlp")]
    assert names == [(name, (4, CASE.config.hidden_size)) for name in ["embedding", *halves, "norm"]]


def test_embed_scale_can_be_rounded():
    scales = {}
    for scale in (None, 9.8125):  # sqrt(96) = 9.798 in bfloat16
        trace = {}
        hidden(CASE.config, CASE.params(), CASE.tokens()[:4], embed_scale=scale, trace=trace.__setitem__)
        row = CASE.params()["model.embed_tokens.weight"][CASE.tokens()[0]].astype(np.float64)
        scales[scale] = np.median(trace["embedding"][0] / row)
    assert scales == pytest.approx({None: 96**0.5, 9.8125: 9.8125}, rel=1e-15)


def test_pieces():
    np.testing.assert_allclose(norm(np.array([3.0, 4.0]), np.array([0.0, 1.0]), 0.0), [3 / 12.5**0.5, 8 / 12.5**0.5])
    # 0.8411920 is the tanh form at 1; the exact one is 0.8413447.
    assert gelu(np.array(1.0)) == pytest.approx(0.8411920, abs=1e-7)
    quarter = rope(np.array([[1.0, 2.0]]), np.array([1]), LayerSpec(None, 1e4))
    np.testing.assert_allclose(quarter, [[np.cos(1) - 2 * np.sin(1), 2 * np.cos(1) + np.sin(1)]])
    eighth = inverse_frequencies(4, LayerSpec(None, 1e4, 8.0))
    assert eighth.dtype == np.float32 and eighth.tolist() == [0.125, float(np.float32(0.01)) / 8]


def test_parameters_must_fit():
    name = "model.layers.0.self_attn.q_norm.weight"
    params = CASE.params()
    for wrong, words in (
        ({k: v for k, v in params.items() if k != name}, "is missing"),
        ({**params, "lm_head.weight": params["model.embed_tokens.weight"]}, "lm_head.weight is not part"),
        ({**params, name: params[name][:-1]}, "has shape"),
    ):
        with pytest.raises(GemkitError, match=words):
            forward(CASE.config, wrong, CASE.tokens())


@pytest.mark.parametrize("tokens", [[], [[1, 2]], [512], [-1]])
def test_tokens_must_be_ids(tokens):
    with pytest.raises(GemkitError, match="tokens"):
        forward(CASE.config, CASE.params(), np.array(tokens, dtype=np.int64))
