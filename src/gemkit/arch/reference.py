"""The Gemma forward pass in float64 NumPy: the specification that every backend is tested against.

One sequence, no cache, no optimisation. Read it from top to bottom; the generations differ only in their
`gemkit.arch.config.ModelConfig`. It is tested against Hugging Face transformers (``tests/parity/test_reference.py``).

Letters: T tokens, S visible tokens (here S = T), D model width, F ffn width, N query heads, K key-value heads,
G = N/K query heads per key-value head, H head width, V vocabulary. ``q_TKGH`` has the axes T, K, G, H.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from gemkit.arch.config import LayerSpec, ModelConfig
from gemkit.arch.tensors import manifest
from gemkit.errors import GemkitError

Array = np.ndarray
Trace = Callable[[str, Array], None]


def norm(x: Array, w: Array, eps: float) -> Array:
    """Apply the root-mean-square norm over the last axis. The stored weight is w, the gain 1 + w."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * (1.0 + w)


def inverse_frequencies(head_dim: int, layer: LayerSpec) -> Array:
    """Return rotary frequencies float32 [H/2], radians per position: theta^(-2i/H) rounded once, divided in float32."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return np.float32(layer.rope_theta**-exponent) / np.float32(layer.rope_factor)


def rope(x: Array, positions: Array, layer: LayerSpec) -> Array:
    """Rotate x [T, ..., H] by its positions int [T]; element i pairs with element i + H/2.

    The angle is a float32 product, as in every published implementation: at position 100,000 a float64 angle would
    differ by thousandths of a radian. Its cosine and sine are exact to float64.
    """
    half = x.shape[-1] // 2
    angle_TH = (positions.astype(np.float32)[:, None] * inverse_frequencies(x.shape[-1], layer)).astype(np.float64)
    angle = angle_TH.reshape(len(positions), *([1] * (x.ndim - 2)), half)
    first, second, cos, sin = x[..., :half], x[..., half:], np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softcap(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * np.tanh(x / cap)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gelu(x: Array) -> Array:
    """Apply the tanh approximation (Hendrycks and Gimpel 2016), which Gemma was trained with."""
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def attention(x_TD: Array, p: Mapping[str, Array], positions: Array, layer: LayerSpec, c: ModelConfig) -> Array:
    """Compute grouped-query attention; p holds the layer's parameters. Returns [T, D] before any post-norm."""
    T, K, H = len(x_TD), c.num_key_value_heads, c.head_dim
    G = c.num_attention_heads // K
    q_TKGH = (x_TD @ p["self_attn.q_proj"].T).reshape(T, K, G, H)
    k_SKH = (x_TD @ p["self_attn.k_proj"].T).reshape(T, K, H)
    v_SKH = (x_TD @ p["self_attn.v_proj"].T).reshape(T, K, H)
    if c.qk_norm:
        q_TKGH = norm(q_TKGH, p["self_attn.q_norm"], c.rms_norm_eps)
        k_SKH = norm(k_SKH, p["self_attn.k_norm"], c.rms_norm_eps)
    q_TKGH, k_SKH = rope(q_TKGH, positions, layer), rope(k_SKH, positions, layer)

    scores_KGTS = np.einsum("tkgh,skh->kgts", q_TKGH, k_SKH) / np.sqrt(float(c.query_pre_attn_scalar))
    scores_KGTS = softcap(scores_KGTS, c.attn_logit_softcapping)
    distance_TS = positions[:, None] - positions[None, :]
    visible_TS = distance_TS >= 0
    if layer.sliding_window is not None:
        visible_TS &= distance_TS < layer.sliding_window
    weights_KGTS = softmax(np.where(visible_TS, scores_KGTS, -np.inf))
    mixed_TKGH = np.einsum("kgts,skh->tkgh", weights_KGTS, v_SKH)
    return mixed_TKGH.reshape(T, K * G * H) @ p["self_attn.o_proj"].T


def mlp(x_TD: Array, p: Mapping[str, Array]) -> Array:
    """Run the gated feed-forward network with GELU."""
    return (gelu(x_TD @ p["mlp.gate_proj"].T) * (x_TD @ p["mlp.up_proj"].T)) @ p["mlp.down_proj"].T


def block(
    x_TD: Array, p: Mapping[str, Array], positions: Array, layer: LayerSpec, c: ModelConfig
) -> tuple[Array, Array]:
    """Run one layer and return the residual stream after attention and after the feed-forward, each [T, D]."""
    eps = c.rms_norm_eps
    a = attention(norm(x_TD, p["input_layernorm"], eps), p, positions, layer, c)
    if not c.post_norms:
        x_TD = x_TD + a
        return x_TD, x_TD + mlp(norm(x_TD, p["post_attention_layernorm"], eps), p)
    x_TD = x_TD + norm(a, p["post_attention_layernorm"], eps)
    m = mlp(norm(x_TD, p["pre_feedforward_layernorm"], eps), p)
    return x_TD, x_TD + norm(m, p["post_feedforward_layernorm"], eps)


def hidden(
    config: ModelConfig,
    params: Mapping[str, Array],
    tokens: Array,
    positions: Array | None = None,
    *,
    embed_scale: float | None = None,
    trace: Trace | None = None,
) -> Array:
    """Return hidden states float64 [T, D] after the final norm.

    params: every name of `gemkit.arch.tensors.manifest`, any float type.  tokens: int [T].
    positions: int [T], rising; 0, 1, 2, … if None.
    embed_scale: sqrt(D) rounded to the activation type of the backend that is compared (55.5 instead of 55.43 for
        D = 3072 in bfloat16); exact if None.
    trace: called with a name and the array [T, D] after the embedding, each half of each layer and the final norm.
    """
    p = _checked(config, params)
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0 or tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise GemkitError(f"tokens must be a non-empty row of ids from 0 to {config.vocab_size - 1}.")
    positions = np.arange(len(tokens)) if positions is None else np.asarray(positions)
    trace = trace or (lambda name, x: None)

    scale = float(np.sqrt(config.hidden_size)) if embed_scale is None else float(embed_scale)
    x_TD = p["model.embed_tokens.weight"][tokens] * scale
    trace("embedding", x_TD)
    for i, layer in enumerate(config.layers):
        prefix = f"model.layers.{i}."
        of_layer = {k.removeprefix(prefix).removesuffix(".weight"): v for k, v in p.items() if k.startswith(prefix)}
        after_attention, x_TD = block(x_TD, of_layer, positions, layer, config)
        trace(f"layers.{i}.attention", after_attention)
        trace(f"layers.{i}.mlp", x_TD)
    x_TD = norm(x_TD, p["model.norm.weight"], config.rms_norm_eps)
    trace("norm", x_TD)
    return x_TD


def forward(
    config: ModelConfig,
    params: Mapping[str, Array],
    tokens: Array,
    positions: Array | None = None,
    *,
    embed_scale: float | None = None,
    trace: Trace | None = None,
) -> Array:
    """Return logits float64 [T, V]; row t scores the token after ``tokens[t]``. Arguments as in `hidden`."""
    x_TD = hidden(config, params, tokens, positions, embed_scale=embed_scale, trace=trace)
    head_VD = params["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return softcap(x_TD @ np.asarray(head_VD, np.float64).T, config.final_logit_softcapping)


def _checked(config: ModelConfig, params: Mapping[str, Array]) -> dict[str, Array]:
    """Return the parameters in float64; raises GemkitError if one is missing, unknown or misshapen."""
    specs = manifest(config)
    wrong = [f"{name} is missing" for name in specs.keys() - params.keys()]
    wrong += [f"{name} is not part of the model" for name in params.keys() - specs.keys()]
    wrong += [
        f"{name} has shape {np.shape(params[name])} instead of {spec.shape}"
        for name, spec in specs.items()
        if name in params and np.shape(params[name]) != spec.shape
    ]
    if wrong:
        raise GemkitError(f"Parameters do not fit the configuration: {sorted(wrong)[0]}; load the matching weights.")
    return {name: np.asarray(params[name], np.float64) for name in specs}
