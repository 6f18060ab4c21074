"""The one door to fast attention in Keras: `attend`, its plain form, which all others must equal, and the cache.

The fused form is taken on PyTorch where there is no soft-cap. `keras.ops.dot_product_attention` has an argument for one
that the backends ignore: the result would be another model.
"""

from __future__ import annotations

from typing import NamedTuple

import keras
import numpy as np
from keras import KerasTensor as Tensor
from keras import ops


class Where(NamedTuple):
    """Positions of tokens in their sequences; segments of packed rows, each a sequence of its own. int [B, T]."""

    positions_BT: Tensor
    segments_BT: Tensor | None = None


class LayerCache(NamedTuple):
    """One layer's keys and values so far, and the slots of the new ones; see `gemkit.models.keras.runner`.

    k, v: [slots, K, H].  write_BT: slot of each new token.  read_BS: slots to attend to.
    positions_BS: their positions; past all queries where there is nothing to see. Layers with the same window share it.
    """

    k: Tensor
    v: Tensor
    write_BT: Tensor
    read_BS: Tensor
    positions_BS: Tensor

    def update(self, k_BTKH: Tensor, v_BTKH: Tensor) -> LayerCache:
        """Store the new keys and values."""
        slots = ops.reshape(self.write_BT, (-1, 1))
        k = ops.scatter_update(self.k, slots, ops.reshape(k_BTKH, (-1, *self.k.shape[1:])))
        v = ops.scatter_update(self.v, slots, ops.reshape(v_BTKH, (-1, *self.v.shape[1:])))
        return self._replace(k=k, v=v)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values that are read, [B, S, K, H]."""
        return ops.take(self.k, self.read_BS, axis=0), ops.take(self.v, self.read_BS, axis=0)


def visible(where: Where, cached: Where, window: int | None) -> Tensor:
    """Return the mask bool [B, T, S]: the query at i sees the key at j of its segment if 0 <= i - j (< window)."""
    distance_BTS = where.positions_BT[:, :, None] - cached.positions_BT[:, None, :]
    mask_BTS = distance_BTS >= 0
    if window is not None:
        mask_BTS = ops.logical_and(mask_BTS, distance_BTS < window)
    if where.segments_BT is not None and cached.segments_BT is not None:
        same_BTS = ops.equal(where.segments_BT[:, :, None], cached.segments_BT[:, None, :])
        mask_BTS = ops.logical_and(mask_BTS, same_BTS)
    return mask_BTS


def attend(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_BTS: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Compute grouped-query attention [B, T, N, H] by the fastest form that gives the same. mask: see `visible`."""
    if softcap is None and keras.backend.backend() == "torch":
        return attend_fused(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale)
    return attend_plain(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, softcap=softcap)


def attend_plain(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_BTS: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Scores and softmax in float32."""
    (B, T, N, H), K = ops.shape(q_BTNH), k_BSKH.shape[2]
    q_BTKGH = ops.reshape(q_BTNH, (B, T, K, N // K, H))
    scores_BKGTS = ops.cast(ops.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH), "float32") * scale
    if softcap is not None:
        scores_BKGTS = softcap * ops.tanh(scores_BKGTS / softcap)
    # Finite, so that a row that sees nothing, as padding does, is no NaN
    scores_BKGTS = ops.where(mask_BTS[:, None, None], scores_BKGTS, float(np.finfo(np.float32).min))
    weights_BKGTS = ops.cast(ops.softmax(scores_BKGTS, axis=-1), v_BSKH.dtype)
    return ops.reshape(ops.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH), (B, T, N, H))


def attend_fused(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_BTS: Tensor, *, scale: float) -> Tensor:
    """The backend's own choice of kernels; SDPA on PyTorch."""
    return ops.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], scale=scale)
