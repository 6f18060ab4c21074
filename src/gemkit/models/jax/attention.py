"""The one door to fast attention in JAX: `attend`, and its plain form, which all others must equal.

JAX's own attention is taken where there is no soft-cap. With one (Gemma 2) the plain form is: JAX's cannot soft-cap,
and leaving the cap out would be another model. On accelerators, one query a sequence is a form of its own.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def visible(positions_BT: Array, positions_BS: Array, window: int | None) -> Array:
    """bool [B, T, S]: the query at i sees the key at j if 0 <= i - j, and i - j < window where there is one."""
    distance_BTS = positions_BT[:, :, None] - positions_BS[:, None, :]
    seen_BTS = distance_BTS >= 0
    return seen_BTS if window is None else seen_BTS & (distance_BTS < window)


def attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    positions_BT: Array,
    positions_BS: Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Array:
    """Grouped-query attention [B, T, N, H] by the fastest form that gives the same."""
    seen_BTS = visible(positions_BT, positions_BS, window)
    if q_BTNH.shape[1] > 1:
        return _attend(q_BTNH, k_BSKH, v_BSKH, seen_BTS, scale=scale, softcap=softcap)
    # Where there are no fast kernels for a few numbers, as on the CPU, a product is better than sums
    forms = {"default": partial(attend_one, scale=scale, softcap=softcap)}
    forms["cpu"] = partial(_attend, scale=scale, softcap=softcap)
    return jax.lax.platform_dependent(q_BTNH, k_BSKH, v_BSKH, seen_BTS, **forms)


def _attend(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visible_BTS: Array, *, scale: float, softcap: float | None
) -> Array:
    # JAX's own takes the softmax in float32, of float64 too
    if softcap is None and q_BTNH.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=visible_BTS[:, None], scale=scale)
    return attend_plain(q_BTNH, k_BSKH, v_BSKH, visible_BTS, scale=scale, softcap=softcap)


def attend_one(
    q_B1NH: Array, k_BSKH: Array, v_BSKH: Array, visible_B1S: Array, *, scale: float, softcap: float | None = None
) -> Array:
    """One query a sequence as products and their sums, which XLA makes passes over the cache that copy nothing."""
    (B, _, N, H), K = q_B1NH.shape, k_BSKH.shape[2]
    wide = jnp.promote_types(q_B1NH.dtype, jnp.float32)
    q_BKG1H = q_B1NH.reshape(B, K, N // K, 1, H).astype(wide)
    k_BK1SH, v_BK1SH = (jnp.swapaxes(x, 1, 2)[:, :, None].astype(wide) for x in (k_BSKH, v_BSKH))
    scores_BKGS = (q_BKG1H * k_BK1SH).sum(-1) * scale
    if softcap is not None:
        scores_BKGS = softcap * jnp.tanh(scores_BKGS / softcap)
    scores_BKGS = jnp.where(visible_B1S[:, None], scores_BKGS, jnp.finfo(wide).min)
    mixed_BKGH = (jax.nn.softmax(scores_BKGS, axis=-1)[..., None] * v_BK1SH).sum(-2)
    return mixed_BKGH.astype(q_B1NH.dtype).reshape(B, 1, N, H)


def attend_plain(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visible_BTS: Array, *, scale: float, softcap: float | None = None
) -> Array:
    """Scores and softmax in float32 (float64 stays)."""
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=wide) * scale
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    # Finite, so that a row that sees nothing, as padding does, is no NaN
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, jnp.finfo(wide).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH).reshape(B, T, N, H)
