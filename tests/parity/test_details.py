"""The details that ports of Gemma get wrong, one test each, on every framework. Budget: 60 s.

The parity grid notices all of them; here each has a name.
"""

import dataclasses
import importlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from parity.cases import CASES, random_params
from parity.tolerances import FRAMEWORK_FLOAT32, relative_error

from gemkit.arch.config import LayerSpec
from gemkit.arch.presets import preset
from gemkit.weights.checkpoint import Checkpoint

os.environ.setdefault("KERAS_BACKEND", "torch")


@dataclass(frozen=True)
class Framework:
    """put: an array in float32 or bfloat16. get: a tensor as float64. logits: of a configuration, dtype and ids."""

    decoder: ModuleType
    attention: ModuleType
    put: Callable
    get: Callable[..., np.ndarray]
    logits: Callable[..., np.ndarray]


def _torch() -> Framework:
    from gemkit.models.torch import load_decoder

    def logits(config, params, dtype, ids):
        decoder = load_decoder(config, Checkpoint.from_params(config, params).tensors, getattr(torch, dtype))
        with torch.inference_mode():
            return decoder(torch.from_numpy(ids)[None])[0].double().numpy()

    def put(array, dtype="float32"):
        return torch.from_numpy(np.asarray(array)).to(getattr(torch, dtype))

    return _framework("torch", put, lambda x: x.double().numpy(), logits)


def _jax() -> Framework:
    import jax
    import jax.numpy as jnp

    from gemkit.models.jax import load_decoder

    def logits(config, params, dtype, ids):
        decoder = load_decoder(
            config, Checkpoint.from_params(config, params).tensors, getattr(jnp, dtype), jax.devices("cpu")[0]
        )
        return np.asarray(decoder(ids[None].astype(np.int32))[0]).astype(np.float64)

    def put(array, dtype="float32"):
        return jnp.asarray(array).astype(dtype)

    return _framework("jax", put, lambda x: np.asarray(x.astype(jnp.float32)).astype(np.float64), logits)


def _keras() -> Framework:
    import keras

    from gemkit.models.keras import load_decoder

    def get(x):
        return keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.stop_gradient(x), "float32")).astype(np.float64)

    def logits(config, params, dtype, ids):
        decoder = load_decoder(config, Checkpoint.from_params(config, params).tensors, dtype)
        return get(decoder(ids[None].astype(np.int32)))[0]

    def put(array, dtype="float32"):
        return keras.ops.convert_to_tensor(np.asarray(array), dtype=dtype)

    return _framework("keras", put, get, logits)


def _framework(name: str, put: Callable, get: Callable, logits: Callable) -> Framework:
    modules = [importlib.import_module(f"gemkit.models.{name}.{part}") for part in ("decoder", "attention")]
    return Framework(*modules, put, get, logits)


@pytest.fixture(scope="module", params=[_torch, _jax, _keras], ids=["torch", "jax", "keras"])
def on(request) -> Framework:
    return request.param()


def bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounded to the nearest bfloat16, as float64."""
    return torch.from_numpy(np.asarray(array, np.float64)).bfloat16().double().numpy()


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_norm_multiplies_by_one_plus_w_and_rounds_last(on):
    """In float32 from a bfloat16 input: rounding before the gain, or w in place of 1 + w, is another number."""
    x, w = bfloat16(draw(7, 64)).astype(np.float32), 3 * draw(64, seed=1)
    exact = x / np.sqrt(np.square(x.astype(np.float64)).mean(-1, keepdims=True) + 1e-6) * (1 + w.astype(np.float64))
    out = on.get(on.decoder.norm(on.put(x, "bfloat16"), on.put(w), 1e-6))
    # Float32 may fall on the other side of a tie
    assert (out == bfloat16(exact)).mean() > 0.99
    assert np.abs(out - exact).max() <= 2**-8 * np.abs(exact).max()


def test_rotary_angles_are_float32_whatever_the_activations_are(on):
    """In bfloat16 a position beyond 256 would be rounded before it is turned into an angle."""
    layer, H = LayerSpec(sliding_window=None, rope_theta=1e6, rope_factor=1.0), 64
    x, positions = bfloat16(draw(1, 3, 2, H)).astype(np.float32), np.array([[301, 4_097, 131_071]], np.int32)
    frequencies = np.float32(1e6 ** -(np.arange(0, H, 2) / H))
    angle = (positions[0].astype(np.float32)[:, None] * frequencies).astype(np.float64)[None, :, None]
    first, second = np.split(x.astype(np.float64), 2, -1)
    exact = np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], -1
    )
    angles = on.decoder.rotation(on.put(positions, "int32"), H, layer)
    assert np.abs(on.get(on.decoder.rope(on.put(x, "bfloat16"), angles)) - bfloat16(exact)).max() <= 2**-6
    assert relative_error(on.get(on.decoder.rope(on.put(x), angles)), exact) <= FRAMEWORK_FLOAT32


def test_rotation_pairs_the_halves_of_a_head(on):
    """Element i with element i + H/2, not with its neighbour."""
    layer, x = LayerSpec(sliding_window=None, rope_theta=10_000.0, rope_factor=1.0), np.zeros((1, 1, 1, 8), np.float32)
    x[..., 1] = 1
    out = on.get(on.decoder.rope(on.put(x), on.decoder.rotation(on.put(np.array([[5]], np.int32), "int32"), 8, layer)))
    assert np.flatnonzero(np.abs(out) > 1e-3).tolist() == [1, 5]


def test_the_rotary_divisor_is_for_positions_not_for_the_base(on):
    """Position 80 with factor 8 is position 10 without."""
    x = draw(1, 1, 2, 32)
    layers = [LayerSpec(sliding_window=None, rope_theta=1e6, rope_factor=factor) for factor in (8.0, 1.0)]
    at = [on.put(np.array([[p]], np.int32), "int32") for p in (80, 10)]
    outs = [on.get(on.decoder.rope(on.put(x), on.decoder.rotation(p, 32, layer))) for p, layer in zip(at, layers)]
    assert relative_error(*outs) <= FRAMEWORK_FLOAT32


def test_soft_caps_are_not_clips(on):
    values = np.array([-100.0, -1.0, 0.5, 29.0, 400.0], np.float32)
    assert np.allclose(on.get(on.decoder.softcap(on.put(values), 30.0)), 30 * np.tanh(values / 30), atol=1e-4)


def test_gelu_is_the_tanh_form(on):
    """A model whose only layer is fed so that both forms differ visibly."""
    config = CASES["gemma1_2b"].config
    params, ids = random_params(config), np.array([2, 5, 9])
    for name in params:
        if "self_attn.o_proj" in name:
            params[name][:] = 0

    def logits(gelu) -> np.ndarray:
        p = {name: value.astype(np.float64) for name, value in params.items()}

        def norm(x, w):
            return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config.rms_norm_eps) * (1 + w)

        x = p["model.embed_tokens.weight"][ids] * np.sqrt(config.hidden_size)
        for i in range(config.num_hidden_layers):
            h = norm(x, p[f"model.layers.{i}.post_attention_layernorm.weight"])
            gate, up, down = (p[f"model.layers.{i}.mlp.{k}_proj.weight"] for k in ("gate", "up", "down"))
            x = x + (gelu(h @ gate.T) * (h @ up.T)) @ down.T
        return norm(x, p["model.norm.weight"]) @ p["model.embed_tokens.weight"].T

    tanh = logits(lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
    erf = logits(lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))))
    out = on.logits(config, params, "float32", ids)
    assert relative_error(out, tanh) <= FRAMEWORK_FLOAT32
    assert relative_error(out, erf) > 5 * FRAMEWORK_FLOAT32


def test_the_embedding_scale_is_rounded_to_the_activations_type(on):
    """√3072 is 55.43; in bfloat16 it is 55.5."""
    whole = CASES["gemma1_2b"].config
    config = dataclasses.replace(whole, hidden_size=3072, num_hidden_layers=1, layers=whole.layers[:1])
    assert preset("gemma-7b").config.hidden_size == 3072
    params = {name: np.zeros_like(value) for name, value in random_params(config).items()}
    params["model.embed_tokens.weight"][5] = 1.0
    seen = []
    original = on.decoder.norm

    def spy(x, w, eps):
        seen.append(float(on.get(x).reshape(-1)[0]))
        return original(x, w, eps)

    on.decoder.norm = spy
    try:
        for dtype, scale in (("bfloat16", 55.5), ("float32", 3072**0.5)):
            seen.clear()
            on.logits(config, params, dtype, np.array([5]))
            assert seen[0] == pytest.approx(scale, rel=1e-6)
    finally:
        on.decoder.norm = original


def test_a_query_that_sees_nothing_gives_no_nan(on):
    """Padding does; a NaN there would spread with the next gradient."""
    q, k = on.put(draw(1, 2, 2, 8)), on.put(draw(1, 3, 1, 8, seed=1))
    seen = on.put(np.zeros((1, 2, 3), bool), "bool")
    assert np.isfinite(on.get(on.attention.attend_plain(q, k, k, seen, scale=1.0))).all()


@pytest.mark.parametrize("window, distance, sees", [(4, 3, True), (4, 4, False), (None, 4, True)])
def test_a_window_of_w_sees_itself_and_the_w_minus_1_before(on, window, distance, sees):
    at = [on.attention.Where(on.put(np.array([row], np.int32), "int32")) for row in ([10], [10 - distance, 11])]
    assert np.asarray(on.attention.visible(*at, window)).tolist() == [[[sees, False]]]


def test_queries_are_scaled_by_the_configuration_not_by_the_heads_width(on):
    """The 27B models: 144 and 168, heads of 128."""
    config = CASES["query_scale"].config
    ids, params = CASES["query_scale"].tokens()[:20], random_params(config)
    usual = dataclasses.replace(config, query_pre_attn_scalar=float(config.head_dim))
    scaled, plain = (on.logits(c, params, "float32", ids) for c in (config, usual))
    assert relative_error(scaled, plain) > 100 * FRAMEWORK_FLOAT32
    assert preset("gemma-2-27b").config.query_pre_attn_scalar == 144
    assert preset("gemma-3-27b-pt").config.query_pre_attn_scalar == 168
