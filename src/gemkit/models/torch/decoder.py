"""Gemma 1, 2 and 3 (text) in PyTorch, a translation of ``models/jax/decoder.py`` and ``models/keras/decoder.py``.

`Decoder` has the parameters and the keys of Hugging Face's checkpoints, and comes in the order of
``arch/reference.py``. Norms, rotations, soft-caps and softmax are computed in float32, whatever the weights are.

Letters: B sequences, T new tokens, S visible tokens, D model width, F ffn width, N query heads, K key-value heads,
G = N/K query heads per key-value head, H head width, V vocabulary. ``q_BTNH`` has the axes B, T, N, H.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemkit.arch.config import LayerSpec, ModelConfig
from gemkit.models.frameworks.layers import call
from gemkit.models.torch.attention import LayerCache, Where, attend, visible
from gemkit.models.torch.linear import Embedding, Linear, Quantised, linear
from gemkit.models.torch.logprobs import logprobs

Rotation = tuple[Tensor, Tensor]  # cosines and sines [B, T, 1, H/2]


def widen(x: Tensor) -> Tensor:
    """Return x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Normalise by the root mean square over the last axis. The gain is 1 + w; the type of x comes back."""
    x32 = widen(x)
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * (1.0 + widen(w))).to(x.dtype)


def inverse_frequencies(head_dim: int, layer: LayerSpec, device: torch.device) -> Tensor:
    """Return the rotary frequencies float32 [H/2] in radians per position."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    return (layer.rope_theta**-exponent).float() / layer.rope_factor


def rotation(positions_BT: Tensor, head_dim: int, layer: LayerSpec, dtype: torch.dtype = torch.float32) -> Rotation:
    """Return cosines and sines [B, T, 1, H/2] of the positions' angles, in float32 whatever dtype is."""
    frequencies = inverse_frequencies(head_dim, layer, positions_BT.device)
    # A float32 product in float64 too: see the reference
    angle_BT1H = (positions_BT.float()[..., None] * frequencies)[:, :, None]
    angle_BT1H = angle_BT1H.to(torch.promote_types(dtype, torch.float32))
    return angle_BT1H.cos(), angle_BT1H.sin()


def rope(x_BTNH: Tensor, rotation: Rotation) -> Tensor:
    """Rotate by positions; element i pairs with element i + H/2."""
    (cos, sin), (first, second) = rotation, widen(x_BTNH).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_BTNH.dtype)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        N, K, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.heads = N, K, H
        self.scale, self.softcap = 1 / math.sqrt(c.query_pre_attn_scalar), c.attn_logit_softcapping
        self.q_proj = Linear(c.hidden_size, N * H, bias=False)
        self.k_proj = Linear(c.hidden_size, K * H, bias=False)
        self.v_proj = Linear(c.hidden_size, K * H, bias=False)
        self.o_proj = Linear(N * H, c.hidden_size, bias=False)
        self.q_norm = Norm(H, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = Norm(H, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(
        self, x_BTD: Tensor, rotation: Rotation, mask_BTS: Tensor, cache: LayerCache | None
    ) -> tuple[Tensor, LayerCache | None]:
        (B, T, _), (N, K, H) = x_BTD.shape, self.heads
        q_BTNH = self.q_norm(self.q_proj(x_BTD).view(B, T, N, H))
        k_BSKH = self.k_norm(self.k_proj(x_BTD).view(B, T, K, H))
        v_BSKH = self.v_proj(x_BTD).view(B, T, K, H)
        q_BTNH, k_BSKH = rope(q_BTNH, rotation), rope(k_BSKH, rotation)
        if cache is not None:
            cache = cache.update(k_BSKH, v_BSKH)
            k_BSKH, v_BSKH = cache.read()
        mixed_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=self.scale, softcap=self.softcap)
        return self.o_proj(mixed_BTNH.reshape(B, T, N * H)), cache


class Mlp(nn.Module):
    """Gated feed-forward with the tanh form of GELU."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x_BTD), approximate="tanh") * self.up_proj(x_BTD))


class Block(nn.Module):
    """One layer."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        D, eps = c.hidden_size, c.rms_norm_eps
        self.input_layernorm = Norm(D, eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = Norm(D, eps)
        self.mlp = Mlp(c)
        self.post_norms = c.post_norms
        if c.post_norms:
            self.pre_feedforward_layernorm = Norm(D, eps)
            self.post_feedforward_layernorm = Norm(D, eps)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation, mask_BTS: Tensor, cache: LayerCache | None
    ) -> tuple[Tensor, LayerCache | None]:
        a_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), rotation, mask_BTS, cache)
        if not self.post_norms:
            x_BTD = x_BTD + a_BTD
            return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache
        x_BTD = x_BTD + self.post_attention_layernorm(a_BTD)
        return x_BTD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTD))), cache


class Stack(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in c.layers)
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)

    def forward(
        self, x_BTD: Tensor, where: Where, caches: Sequence[LayerCache] | None, run: Callable = call
    ) -> tuple[Tensor, list[LayerCache | None]]:
        layers, given = self.config.layers, caches or [None] * len(self.layers)
        # Built once a step for all layers of a kind
        kinds = dict(zip(layers, given))
        rotations = {layer: rotation(where.positions_BT, self.config.head_dim, layer, x_BTD.dtype) for layer in kinds}
        masks = {
            layer: visible(where, Where(cache.positions_BS) if cache else where, layer.sliding_window)
            for layer, cache in kinds.items()
        }
        written = []
        for module, layer, cache in zip(self.layers, layers, given, strict=True):
            x_BTD, cache = run(module, x_BTD, rotations[layer], masks[layer], cache)
            written.append(cache)
        return self.norm(x_BTD), written


class Decoder(nn.Module):
    """A Gemma model. ``state_dict`` has the names of `gemkit.arch.tensors.manifest`, which are Hugging Face's.

    Example: ``Decoder(config)(torch.tensor([[2, 651, 6037]]))`` gives logits float32 [1, 3, V].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations."""
        return self.model.embed_tokens.output_dtype

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return the input of the first layer [B, T, D]."""
        x_BTD = self.model.embed_tokens(tokens_BT)
        # √D in the activations' own type: 55.5, not 55.43, for D = 3072 in bfloat16
        return x_BTD * torch.full((), math.sqrt(x_BTD.shape[-1]), dtype=x_BTD.dtype, device=x_BTD.device)

    def hidden(
        self,
        tokens_BT: Tensor,
        where: Where | None = None,
        caches: Sequence[LayerCache] | None = None,
        *,
        inputs: Tensor | None = None,
        run: Callable = call,
    ) -> tuple[Tensor, list[LayerCache | None]]:
        """Return hidden states [B, T, D] after the final norm, and the caches with the new tokens.

        where: positions 0, 1, 2, … if None. caches: one per layer. inputs: takes the place of `embed`.
        run: calls a layer, as ``run(layer, x, …)``; for activation checkpointing and the like.
        """
        if where is None:
            where = Where(torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT))
        return self.model(self.embed(tokens_BT) if inputs is None else inputs, where, caches, run)

    @property
    def head(self) -> Tensor | Quantised:
        """The output matrix [V, D]."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Return logits float32 [..., V] of hidden states."""
        return softcap(widen(linear(x_BTD, self.head)), self.config.final_logit_softcapping)

    def logprobs(self, x_RD: Tensor, targets_R: Tensor) -> Tensor:
        """Return log-probabilities float32 [R] of the next tokens, by chunks of rows; differentiable."""
        return logprobs(x_RD, self.head, targets_R, self.config.final_logit_softcapping)

    def forward(self, tokens_BT: Tensor, where: Where | None = None) -> Tensor:
        """Return logits float32 [B, T, V]; position t scores the token after ``tokens[:, t]``."""
        return self.logits(self.hidden(tokens_BT, where)[0])
