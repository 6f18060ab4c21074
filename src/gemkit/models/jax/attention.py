"""The one door to fast attention in JAX: `attend`, its plain form, which all others must equal, and the cache.

JAX's own attention is taken where there is no soft-cap. With one (Gemma 2) the plain form is: JAX's cannot soft-cap,
and leaving the cap out would be another model. On accelerators, one query a sequence is a form of its own.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Where(NamedTuple):
    """Positions of tokens in their sequences; segments of packed rows, each a sequence of its own. int [B, T]."""

    positions_BT: Array
    segments_BT: Array | None = None


class LayerCache(NamedTuple):
    """One layer's keys and values so far, and the slots of the new ones; see `gemkit.models.jax.runner`.

    k, v: [slots, K, H]; donated to a jitted step, they are written in place.  write_BT: slot of each new token.
    read_BS: slots to attend to.  positions_BS: their positions; past all queries where there is nothing to see. Layers
    with the same window share it.
    """

    k: Array
    v: Array
    write_BT: Array
    read_BS: Array
    positions_BS: Array

    def update(self, k_BTKH: Array, v_BTKH: Array) -> LayerCache:
        """Store the new keys and values."""
        k = self.k.at[self.write_BT].set(k_BTKH.astype(self.k.dtype))
        v = self.v.at[self.write_BT].set(v_BTKH.astype(self.v.dtype))
        return self._replace(k=k, v=v)

    def read(self) -> tuple[Array, Array]:
        """Return all keys and values that are read, [B, S, K, H]."""
        return self.k[self.read_BS], self.v[self.read_BS]


def visible(where: Where, cached: Where, window: int | None) -> Array:
    """Return the mask bool [B, T, S]: the query at i sees the key at j of its segment if 0 <= i - j (< window)."""
    distance_BTS = where.positions_BT[:, :, None] - cached.positions_BT[:, None, :]
    mask_BTS = distance_BTS >= 0
    if window is not None:
        mask_BTS = mask_BTS & (distance_BTS < window)
    if where.segments_BT is not None and cached.segments_BT is not None:
        mask_BTS = mask_BTS & (where.segments_BT[:, :, None] == cached.segments_BT[:, None, :])
    return mask_BTS


def attend(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array, *, scale: float, softcap: float | None = None
) -> Array:
    """Compute grouped-query attention [B, T, N, H] by the fastest form that gives the same. mask: see `visible`."""
    if q_BTNH.shape[1] > 1:
        return _attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, softcap=softcap)
    # On the CPU, which has no fast kernels for one row, a product is better than sums
    forms = {"default": partial(attend_one, scale=scale, softcap=softcap)}
    forms["cpu"] = partial(_attend, scale=scale, softcap=softcap)
    return jax.lax.platform_dependent(q_BTNH, k_BSKH, v_BSKH, mask_BTS, **forms)


def _attend(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array, *, scale: float, softcap: float | None
) -> Array:
    # JAX's own takes the softmax in float32, of float64 too
    if softcap is None and q_BTNH.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], scale=scale)
    return attend_plain(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, softcap=softcap)


def attend_one(
    q_B1NH: Array, k_BSKH: Array, v_BSKH: Array, mask_B1S: Array, *, scale: float, softcap: float | None = None
) -> Array:
    """One query a sequence as products and their sums, which XLA makes passes over the cache that copy nothing."""
    (B, _, N, H), K = q_B1NH.shape, k_BSKH.shape[2]
    wide = jnp.promote_types(q_B1NH.dtype, jnp.float32)
    q_BKG1H = q_B1NH.reshape(B, K, N // K, 1, H).astype(wide)
    k_BK1SH, v_BK1SH = (jnp.swapaxes(x, 1, 2)[:, :, None].astype(wide) for x in (k_BSKH, v_BSKH))
    scores_BKGS = (q_BKG1H * k_BK1SH).sum(-1) * scale
    if softcap is not None:
        scores_BKGS = softcap * jnp.tanh(scores_BKGS / softcap)
    scores_BKGS = jnp.where(mask_B1S[:, None], scores_BKGS, jnp.finfo(wide).min)
    mixed_BKGH = (jax.nn.softmax(scores_BKGS, axis=-1)[..., None] * v_BK1SH).sum(-2)
    return mixed_BKGH.astype(q_B1NH.dtype).reshape(B, 1, N, H)


def attend_plain(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array, *, scale: float, softcap: float | None = None
) -> Array:
    """Scores and softmax in float32 (float64 stays)."""
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=wide) * scale
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    # Finite, so that a row that sees nothing, as padding does, is no NaN
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(wide).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH).reshape(B, T, N, H)
