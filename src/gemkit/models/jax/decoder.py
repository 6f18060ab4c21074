"""Gemma 1, 2 and 3 (text) in JAX, a translation of ``models/torch/decoder.py`` and ``models/keras/decoder.py``.

Pure functions, in the order of ``arch/reference.py``, over a dictionary of arrays with the names of
`gemkit.arch.tensors.manifest`, which are Hugging Face's. `Decoder` holds the dictionary and the configuration; it is a
pytree, so that it goes through ``jax.jit``, ``jax.grad`` and ``jax.device_put`` like an array. Norms, rotations,
soft-caps and softmax are computed in float32, whatever the weights are (float64 stays). Matrix products have the
precision that JAX is set to: on a GPU or TPU, float32 is narrower unless ``jax.default_matmul_precision("highest")``
says otherwise.

Letters: B sequences, T new tokens, S visible tokens, D model width, F ffn width, N query heads, K key-value heads,
G = N/K query heads per key-value head, H head width, V vocabulary. ``q_BTNH`` has the axes B, T, N, H.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from gemkit.arch.config import LayerSpec, ModelConfig
from gemkit.models.frameworks.layers import call
from gemkit.models.jax.attention import LayerCache, Where, attend, visible
from gemkit.models.jax.linear import KEPT, LowRank, Quantised, linear, rows
from gemkit.models.jax.logprobs import logprobs

Params = Mapping[str, Array | Quantised | LowRank]
Rotation = tuple[Array, Array]  # cosines and sines [B, T, 1, H/2]


def widen(x: Array) -> Array:
    """Return x in float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def norm(x: Array, w: Array, eps: float) -> Array:
    """Normalise by the root mean square over the last axis. The gain is 1 + w; the type of x comes back."""
    x32 = widen(x)
    mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean + eps) * (1.0 + widen(w))).astype(x.dtype)


def inverse_frequencies(head_dim: int, layer: LayerSpec) -> np.ndarray:
    """Return the rotary frequencies float32 [H/2] in radians per position."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return np.float32(layer.rope_theta**-exponent) / np.float32(layer.rope_factor)


def rotation(positions_BT: Array, head_dim: int, layer: LayerSpec, dtype: jnp.dtype = jnp.float32) -> Rotation:
    """Return cosines and sines [B, T, 1, H/2] of the positions' angles, in float32 whatever dtype is."""
    # A float32 product in float64 too: see the reference
    angle_BT1H = (positions_BT.astype(jnp.float32)[..., None] * inverse_frequencies(head_dim, layer))[:, :, None]
    angle_BT1H = angle_BT1H.astype(jnp.promote_types(dtype, jnp.float32))
    return jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)


def rope(x_BTNH: Array, rotation: Rotation) -> Array:
    """Rotate by positions; element i pairs with element i + H/2."""
    (cos, sin), (first, second) = rotation, jnp.split(widen(x_BTNH), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BTNH.dtype)


def softcap(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention(
    p: Params, c: ModelConfig, x_BTD: Array, rotation: Rotation, mask_BTS: Array, cache: LayerCache | None
) -> tuple[Array, LayerCache | None]:
    """Grouped-query attention; p holds the layer's parameters."""
    B, T, _ = x_BTD.shape
    N, K, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    q_BTNH = linear(x_BTD, p["self_attn.q_proj.weight"]).reshape(B, T, N, H)
    k_BSKH = linear(x_BTD, p["self_attn.k_proj.weight"]).reshape(B, T, K, H)
    v_BSKH = linear(x_BTD, p["self_attn.v_proj.weight"]).reshape(B, T, K, H)
    if c.qk_norm:
        q_BTNH = norm(q_BTNH, p["self_attn.q_norm.weight"], c.rms_norm_eps)
        k_BSKH = norm(k_BSKH, p["self_attn.k_norm.weight"], c.rms_norm_eps)
    q_BTNH, k_BSKH = rope(q_BTNH, rotation), rope(k_BSKH, rotation)
    if cache is not None:
        cache = cache.update(k_BSKH, v_BSKH)
        k_BSKH, v_BSKH = cache.read()
    scale, cap = 1 / math.sqrt(c.query_pre_attn_scalar), c.attn_logit_softcapping
    mixed_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, softcap=cap)
    mixed_BTNH = checkpoint_name(mixed_BTNH, KEPT)
    return linear(mixed_BTNH.reshape(B, T, N * H), p["self_attn.o_proj.weight"]), cache


def mlp(p: Params, x_BTD: Array) -> Array:
    """Gated feed-forward with the tanh form of GELU."""
    gate_BTF = linear(x_BTD, p["mlp.gate_proj.weight"])
    gate_BTF = jax.nn.gelu(widen(gate_BTF), approximate=True).astype(x_BTD.dtype)
    return linear(gate_BTF * linear(x_BTD, p["mlp.up_proj.weight"]), p["mlp.down_proj.weight"])


def block(
    p: Params, c: ModelConfig, x_BTD: Array, rotation: Rotation, mask_BTS: Array, cache: LayerCache | None
) -> tuple[Array, LayerCache | None]:
    """One layer."""
    eps = c.rms_norm_eps
    a_BTD, cache = attention(p, c, norm(x_BTD, p["input_layernorm.weight"], eps), rotation, mask_BTS, cache)
    if not c.post_norms:
        x_BTD = x_BTD + a_BTD
        return x_BTD + mlp(p, norm(x_BTD, p["post_attention_layernorm.weight"], eps)), cache
    x_BTD = x_BTD + norm(a_BTD, p["post_attention_layernorm.weight"], eps)
    m_BTD = mlp(p, norm(x_BTD, p["pre_feedforward_layernorm.weight"], eps))
    return x_BTD + norm(m_BTD, p["post_feedforward_layernorm.weight"], eps), cache


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config", "dtype"])
@dataclass(frozen=True)
class Decoder:
    """A Gemma model.

    params: arrays by the names of `gemkit.arch.tensors.manifest`. dtype: of activations; None: the embedding's.

    Example: ``Decoder(config, params)(jnp.array([[2, 651, 6037]]))`` gives logits float32 [1, 3, V].
    """

    config: ModelConfig
    params: Params
    dtype: jnp.dtype | None = None

    def embed(self, tokens_BT: Array) -> Array:
        """Return the input of the first layer [B, T, D]."""
        x_BTD = rows(self.params["model.embed_tokens.weight"], tokens_BT, self.dtype)
        # √D in the activations' own type: 55.5, not 55.43, for D = 3072 in bfloat16
        return x_BTD * jnp.asarray(math.sqrt(x_BTD.shape[-1]), x_BTD.dtype)

    def hidden(
        self,
        tokens_BT: Array,
        where: Where | None = None,
        caches: Sequence[LayerCache] | None = None,
        *,
        inputs: Array | None = None,
        run: Callable = call,
    ) -> tuple[Array, list[LayerCache | None]]:
        """Return hidden states [B, T, D] after the final norm, and the caches with the new tokens.

        where: positions 0, 1, 2, … if None. caches: one per layer. inputs: takes the place of `embed`.
        run: calls a layer, as ``run(layer, x, …)``; for activation checkpointing and the like.
        """
        c, params = self.config, self.params
        if where is None:
            where = Where(jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape))
        x_BTD = self.embed(tokens_BT) if inputs is None else inputs
        given = caches or [None] * len(c.layers)
        # Built once a step for all layers of a kind
        kinds = dict(zip(c.layers, given))
        rotations = {layer: rotation(where.positions_BT, c.head_dim, layer, x_BTD.dtype) for layer in kinds}
        masks = {
            layer: visible(where, Where(cache.positions_BS) if cache else where, layer.sliding_window)
            for layer, cache in kinds.items()
        }
        written = []
        for i, (layer, cache) in enumerate(zip(c.layers, given, strict=True)):
            prefix = f"model.layers.{i}."
            p = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
            x_BTD, cache = run(partial(block, p, c), x_BTD, rotations[layer], masks[layer], cache)
            written.append(cache)
        return norm(x_BTD, params["model.norm.weight"], c.rms_norm_eps), written

    @property
    def head(self) -> Array | Quantised:
        """The output matrix [V, D]."""
        return self.params["model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"]

    def logits(self, x_BTD: Array) -> Array:
        """Return logits float32 [..., V] of hidden states."""
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        return softcap(linear(x_BTD, self.head, wide), self.config.final_logit_softcapping)

    def logprobs(self, x_RD: Array, targets_R: Array) -> Array:
        """Return log-probabilities float32 [R] of the next tokens, by chunks of rows; 0 where a target is negative."""
        return logprobs(x_RD, self.head, targets_R, self.config.final_logit_softcapping)

    def __call__(self, tokens_BT: Array, where: Where | None = None) -> Array:
        """Return logits float32 [B, T, V]; position t scores the token after ``tokens[:, t]``."""
        return self.logits(self.hidden(tokens_BT, where)[0])
