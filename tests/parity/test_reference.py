"""The reference forward pass against Hugging Face transformers, and proof that every case notices its trait.

Budget: 45 s, most of it the import of torch and transformers.
"""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from parity import transformers_models as hf
from parity.cases import CASES, Case, random_params, tokens
from parity.tolerances import (
    NATIVE_FLOAT32,
    REFERENCE_VS_TRANSFORMERS_F32,
    REFERENCE_VS_TRANSFORMERS_F64,
    ROPE_FREQUENCIES,
    TRAIT_MARGIN,
    relative_error,
)

from gemkit.arch.presets import PRESETS
from gemkit.arch.reference import forward, inverse_frequencies

WITH_WINDOWS = [name for name, case in CASES.items() if any(layer.sliding_window for layer in case.config.layers)]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@functools.cache
def reference_logits(name: str) -> np.ndarray:
    case = CASES[name]
    return forward(case.config, case.params(), case.tokens())


@pytest.fixture(autouse=True, scope="module")
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def first_divergence(case: Case, model: torch.nn.Module, limit: float) -> str:
    """The first layer whose output differs from transformers' by more than ``limit``, for a failure's message."""
    ours: dict[str, np.ndarray] = {}
    forward(case.config, case.params(), case.tokens(), trace=ours.__setitem__)
    with torch.no_grad():
        states = model(torch.from_numpy(case.tokens())[None], output_hidden_states=True, use_cache=False).hidden_states
    names = ["embedding", *(f"layers.{i}.mlp" for i in range(len(case.config.layers) - 1)), "norm"]
    for name, state in zip(names, states, strict=True):
        error = relative_error(ours[name], state[0].numpy())
        if error > limit:
            return f"{case.name}: first difference in {name} ({error:.1e})"
    return f"{case.name}: only the logits differ"


@every_case
def test_equals_transformers_in_float64(case):
    model = hf.build(case.config, case.params(), torch.float64)
    hf.exact_buffers(model, case.config)
    with hf.Float64Throughout() as mode:
        error = relative_error(hf.logits(model, case.tokens()), reference_logits(case.name))
        ok = error <= REFERENCE_VS_TRANSFORMERS_F64
        assert ok, f"{first_divergence(case, model, REFERENCE_VS_TRANSFORMERS_F64)}; logits {error:.1e}"
    # Every kind of detour was met: a renamed internal would otherwise quietly lower what this test proves.
    assert all(mode.detours.values()), mode.detours


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_equals_untouched_transformers(case, dtype):
    model = hf.build(case.config, case.params(), dtype)
    error = relative_error(hf.logits(model, case.tokens()), reference_logits(case.name))
    assert error <= REFERENCE_VS_TRANSFORMERS_F32, (
        f"{first_divergence(case, model, REFERENCE_VS_TRANSFORMERS_F32)}; logits {error:.1e}"
    )


@pytest.mark.parametrize("start", [1, 4_000, 100_003])
@pytest.mark.parametrize("name", ["gemma1_2b", "gemma2", "gemma3"])
def test_late_positions_equal_transformers(name, start):
    """Far from 0 the float32 rounding of the angle is visible: it is part of the contract."""
    case = CASES[name]
    positions = start + np.arange(case.length)
    model = hf.build(case.config, case.params(), torch.float64)
    hf.exact_buffers(model, case.config)
    with hf.Float64Throughout():
        actual = hf.logits(model, case.tokens(), positions)
    error = relative_error(actual, forward(case.config, case.params(), case.tokens(), positions))
    assert error <= REFERENCE_VS_TRANSFORMERS_F64, f"{name} at position {start}: {error:.1e}"


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-2-27b", "gemma-3-270m", "gemma-3-27b-it"])
def test_rotary_frequencies_are_those_of_transformers(name):
    """Real head widths and bases. transformers rounds a float32 power, we round once: a few units in the last place."""
    config = PRESETS[name].config
    small = dataclasses.replace(
        config,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=32,
        num_attention_heads=1,
        num_key_value_heads=1,
        query_pre_attn_scalar=config.head_dim,
        num_hidden_layers=6,
        layers=config.layers[:6],
    )
    buffers = hf.rope_buffers(hf.build(small, random_params(small), torch.float32))
    for layer in small.layers:
        ours = inverse_frequencies(config.head_dim, layer)
        theirs = buffers[layer.sliding_window is not None].numpy()
        assert np.abs(theirs / ours - 1.0).max() <= ROPE_FREQUENCIES


@every_case
def test_case_notices_its_trait(case):
    """Without its trait a case gives other logits, far outside the widest tolerance of any backend."""
    expected = reference_logits(case.name)
    assert 5.0 <= np.abs(expected).max() <= 60.0, "the logits should be of an ordinary size"
    if case.off is None:
        assert case.name.startswith("gemma"), f"{case.name} is a trait and needs a configuration without it"
        return
    without = forward(case.off, random_params(case.off, case.seed), case.tokens())
    moved = relative_error(without, expected)
    assert moved >= TRAIT_MARGIN * NATIVE_FLOAT32, f"{case.name} off moves the logits by {moved:.1e} only"


@pytest.mark.parametrize("name", WITH_WINDOWS)
@pytest.mark.parametrize("change", [-1, 1])
def test_case_notices_a_window_off_by_one(name, change):
    config = CASES[name].config
    widths = [s.sliding_window for s in config.layers if s.sliding_window]
    assert CASES[name].length > 4 * max(widths)
    layers = tuple(
        dataclasses.replace(s, sliding_window=s.sliding_window + change) if s.sliding_window else s
        for s in config.layers
    )
    expected = reference_logits(name)
    shifted = forward(dataclasses.replace(config, layers=layers), CASES[name].params(), CASES[name].tokens())
    width = min(widths) + min(change, 0)
    assert np.array_equal(shifted[:width], expected[:width]), "nothing changes inside the window"
    assert relative_error(shifted, expected) >= 10 * NATIVE_FLOAT32


def test_attention_is_uneven_in_every_case():
    """A model that attends evenly would hide a wrong scale: some query must prefer a few keys clearly."""
    for case in CASES.values():
        short = case.tokens()[:32]
        expected = forward(case.config, case.params(), short)
        flat = dataclasses.replace(case.config, query_pre_attn_scalar=1e12)
        assert relative_error(forward(flat, case.params(), short), expected) >= TRAIT_MARGIN * NATIVE_FLOAT32, case.name


def test_parameters_and_tokens_are_reproducible():
    case = CASES["gemma3"]
    again = random_params(case.config, case.seed)
    assert all(np.array_equal(again[name], value) for name, value in case.params().items())
    assert not np.array_equal(tokens(case.config, 64, 0), tokens(case.config, 64, 1))
    assert all(case.tokens()[0] == case.config.bos_token_id for case in CASES.values())
