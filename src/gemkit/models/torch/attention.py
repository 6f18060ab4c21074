"""The one door to fast attention in PyTorch: `attend`, and its plain form, which all others must equal.

SDPA is taken where there is no soft-cap. With one (Gemma 2), FlexAttention on CUDA, else the plain form: SDPA cannot
soft-cap, and leaving the cap out would be another model.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


def visible(positions_BT: Tensor, positions_BS: Tensor, window: int | None) -> Tensor:
    """bool [B, T, S]: the query at i sees the key at j if 0 <= i - j, and i - j < window where there is one."""
    distance_BTS = positions_BT[:, :, None] - positions_BS[:, None, :]
    seen_BTS = distance_BTS >= 0
    return seen_BTS if window is None else seen_BTS & (distance_BTS < window)


def attend(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    positions_BT: Tensor,
    positions_BS: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Grouped-query attention [B, T, N, H] by the fastest form that gives the same."""
    if softcap is None:
        return attend_sdpa(q_BTNH, k_BSKH, v_BSKH, visible(positions_BT, positions_BS, window), scale=scale)
    if q_BTNH.is_cuda and q_BTNH.shape[1] > 1 and q_BTNH.dtype != torch.float64:
        return attend_flex(
            q_BTNH, k_BSKH, v_BSKH, positions_BT, positions_BS, scale=scale, softcap=softcap, window=window
        )
    return attend_plain(
        q_BTNH, k_BSKH, v_BSKH, visible(positions_BT, positions_BS, window), scale=scale, softcap=softcap
    )


def attend_plain(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visible_BTS: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Scores and softmax in float32 (float64 stays)."""
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    wide = torch.promote_types(q_BTNH.dtype, torch.float32)
    q_BTKGH = q_BTNH.view(B, T, K, N // K, H)
    scores_BKGTS = torch.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH).to(wide) * scale
    if softcap is not None:
        scores_BKGTS = softcap * torch.tanh(scores_BKGTS / softcap)
    # Finite, so that a row that sees nothing, as padding does, is no NaN
    scores_BKGTS = scores_BKGTS.masked_fill(~visible_BTS[:, None, None], torch.finfo(wide).min)
    weights_BKGTS = scores_BKGTS.softmax(-1).to(v_BSKH.dtype)
    return torch.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH).reshape(B, T, N, H)


def attend_sdpa(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visible_BTS: Tensor, *, scale: float) -> Tensor:
    """PyTorch's own choice of kernels."""
    mixed_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=visible_BTS[:, None],
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
    positions_BT: Tensor,
    positions_BS: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    compiled: bool = True,
) -> Tensor:
    """FlexAttention with soft-cap and window in its score function; uncompiled it runs anywhere, for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    def score(value: Tensor, b: Tensor, n: Tensor, t: Tensor, s: Tensor) -> Tensor:
        distance = positions_BT[b, t] - positions_BS[b, s]
        value = value if softcap is None else softcap * torch.tanh(value / softcap)
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return torch.where(seen, value, torch.finfo(torch.float32).min)

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
