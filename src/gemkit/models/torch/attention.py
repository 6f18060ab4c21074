"""The one door to fast attention in PyTorch: `attend`, its plain form, which all others must equal, and the cache.

SDPA is taken where there is no soft-cap. With one (Gemma 2), FlexAttention on CUDA, else the plain form: SDPA cannot
soft-cap, and leaving the cap out would be another model. Compiled for CUDA, one query a sequence is a form of its own,
and a soft-cap the plain form, which the compiler fuses.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Where(NamedTuple):
    """Positions of tokens in their sequences; segments of packed rows, each a sequence of its own. int [B, T]."""

    positions_BT: Tensor
    segments_BT: Tensor | None = None


class LayerCache(NamedTuple):
    """One layer's keys and values so far, and the slots of the new ones; see `gemkit.models.torch.runner`.

    k, v: [slots, K, H], written in place.  write_BT: slot of each new token.  read_BS: slots to attend to.
    positions_BS: their positions; past all queries where there is nothing to see. Layers with the same window share it.
    """

    k: Tensor
    v: Tensor
    write_BT: Tensor
    read_BS: Tensor
    positions_BS: Tensor

    def update(self, k_BTKH: Tensor, v_BTKH: Tensor) -> LayerCache:
        """Store the new keys and values."""
        slots = self.write_BT.reshape(-1)
        self.k.index_copy_(0, slots, k_BTKH.flatten(0, 1).to(self.k.dtype))
        self.v.index_copy_(0, slots, v_BTKH.flatten(0, 1).to(self.v.dtype))
        return self

    def read(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values that are read, [B, S, K, H]."""
        return self.k[self.read_BS], self.v[self.read_BS]


def visible(where: Where, cached: Where, window: int | None) -> Tensor:
    """Return the mask bool [B, T, S]: the query at i sees the key at j of its segment if 0 <= i - j (< window)."""
    distance_BTS = where.positions_BT[:, :, None] - cached.positions_BT[:, None, :]
    mask_BTS = distance_BTS >= 0
    if window is not None:
        mask_BTS = mask_BTS & (distance_BTS < window)
    if where.segments_BT is not None and cached.segments_BT is not None:
        mask_BTS = mask_BTS & (where.segments_BT[:, :, None] == cached.segments_BT[:, None, :])
    return mask_BTS


def attend(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_BTS: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Compute grouped-query attention [B, T, N, H] by the fastest form that gives the same. mask: see `visible`."""
    compiling, one = torch.compiler.is_compiling(), q_BTNH.shape[1] == 1
    if compiling and one and q_BTNH.is_cuda:
        return attend_one(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, softcap=softcap)
    if softcap is None:
        return attend_sdpa(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale)
    if q_BTNH.is_cuda and not one and not compiling and q_BTNH.dtype != torch.float64:
        return attend_flex(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, softcap=softcap)
    return attend_plain(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale, softcap=softcap)


def attend_plain(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_BTS: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Scores and softmax in float32 (float64 stays)."""
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    wide = torch.promote_types(q_BTNH.dtype, torch.float32)
    q_BTKGH = q_BTNH.view(B, T, K, N // K, H)
    scores_BKGTS = torch.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH).to(wide) * scale
    if softcap is not None:
        scores_BKGTS = softcap * torch.tanh(scores_BKGTS / softcap)
    # Finite, so that a row that sees nothing, as padding does, is no NaN
    scores_BKGTS = scores_BKGTS.masked_fill(~mask_BTS[:, None, None], torch.finfo(wide).min)
    weights_BKGTS = scores_BKGTS.softmax(-1).to(v_BSKH.dtype)
    return torch.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH).reshape(B, T, N, H)


def attend_one(
    q_B1NH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_B1S: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """One query a sequence as products and their sums: compiled, they copy no cache. Not for eager runs."""
    (B, _, N, H), K = q_B1NH.shape, k_BSKH.shape[2]
    wide = torch.promote_types(q_B1NH.dtype, torch.float32)
    q_BKG1H = q_B1NH.view(B, K, N // K, 1, H).to(wide)
    k_BK1SH, v_BK1SH = (x.transpose(1, 2)[:, :, None].to(wide) for x in (k_BSKH, v_BSKH))
    scores_BKGS = (q_BKG1H * k_BK1SH).sum(-1) * scale
    if softcap is not None:
        scores_BKGS = softcap * torch.tanh(scores_BKGS / softcap)
    scores_BKGS = scores_BKGS.masked_fill(~mask_B1S[:, None], torch.finfo(wide).min)
    mixed_BKGH = (scores_BKGS.softmax(-1)[..., None] * v_BK1SH).sum(-2)
    return mixed_BKGH.to(q_B1NH.dtype).view(B, 1, N, H)


def attend_sdpa(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_BTS: Tensor, *, scale: float) -> Tensor:
    """PyTorch's own choice of kernels."""
    (B, S, K, H), N = k_BSKH.shape, q_BTNH.shape[2]
    if q_BTNH.is_cuda and K != N:
        # Of the fast kernels, none takes a mask and shared heads
        k_BSKH, v_BSKH = (x[:, :, :, None].expand(B, S, K, N // K, H).flatten(2, 3) for x in (k_BSKH, v_BSKH))
    mixed_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=mask_BTS[:, None],
        scale=scale,
        enable_gqa=q_BTNH.shape[2] != k_BSKH.shape[2],
    )
    return mixed_BNTH.transpose(1, 2)


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def attend_flex(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    mask_BTS: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    compiled: bool = True,
) -> Tensor:
    """FlexAttention with soft-cap and mask in its score function; uncompiled it runs anywhere, for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    def score(value: Tensor, b: Tensor, n: Tensor, t: Tensor, s: Tensor) -> Tensor:
        value = value if softcap is None else softcap * torch.tanh(value / softcap)
        return torch.where(mask_BTS[b, t, s], value, torch.finfo(torch.float32).min)

    run = _compiled_flex() if compiled else flex_attention
    mixed_BNTH = run(
        q_BTNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        score_mod=score,
        scale=scale,
        enable_gqa=q_BTNH.shape[2] != k_BSKH.shape[2],
    )
    return mixed_BNTH.transpose(1, 2)
