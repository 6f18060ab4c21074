"""Gemma 1, 2 and 3 (text) in PyTorch: read it beside ``models/jax/decoder.py`` and ``models/keras/decoder.py``.

`Decoder` has the parameters and the keys of Hugging Face's checkpoints, and comes in the order of
``arch/reference.py``. Norms, rotations, soft-caps and softmax are computed in float32, whatever the weights are.

Letters: B sequences, T new tokens, S visible tokens, D model width, F ffn width, N query heads, K key-value heads,
G = N/K query heads per key-value head, H head width, V vocabulary. ``q_BTNH`` has the axes B, T, N, H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemkit.arch.config import LayerSpec, ModelConfig
from gemkit.models.torch.attention import attend
from gemkit.models.torch.linear import Embedding, Linear, linear


@dataclass
class LayerCache:
    """One layer's keys and values so far, and where the new ones go; see `gemkit.models.torch.runner`.

    k, v: [slots, K, H], written in place.  write_BT: slot of each new token.  read_BS: slots to attend to.
    positions_BS: their positions; past all queries where there is nothing to see.
    """

    k: Tensor
    v: Tensor
    write_BT: Tensor
    read_BS: Tensor
    positions_BS: Tensor

    def update(self, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stores the new keys and values; returns all that are read, [B, S, K, H], and their positions."""
        slots = self.write_BT.reshape(-1)
        self.k.index_copy_(0, slots, k_BTKH.flatten(0, 1).to(self.k.dtype))
        self.v.index_copy_(0, slots, v_BTKH.flatten(0, 1).to(self.v.dtype))
        return self.k[self.read_BS], self.v[self.read_BS], self.positions_BS


def widen(x: Tensor) -> Tensor:
    """float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis. The stored weight is w, the gain 1 + w; the type of x comes back."""
    x32 = widen(x)
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * (1.0 + widen(w))).to(x.dtype)


def inverse_frequencies(head_dim: int, layer: LayerSpec, device: torch.device) -> Tensor:
    """Rotary frequencies float32 [H/2] in radians per position."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    return (layer.rope_theta**-exponent).float() / layer.rope_factor


def rope(x_BTNH: Tensor, positions_BT: Tensor, layer: LayerSpec) -> Tensor:
    """Rotates by positions; element i pairs with element i + H/2."""
    frequencies = inverse_frequencies(x_BTNH.shape[-1], layer, x_BTNH.device)
    first, second = widen(x_BTNH).chunk(2, -1)
    # A float32 product in float64 too: see the reference
    angle_BT1H = (positions_BT.float()[..., None] * frequencies)[:, :, None].to(first.dtype)
    cos, sin = angle_BT1H.cos(), angle_BT1H.sin()
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

    def __init__(self, c: ModelConfig, layer: LayerSpec) -> None:
        super().__init__()
        N, K, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.heads, self.layer = (N, K, H), layer
        self.scale, self.softcap = 1 / math.sqrt(c.query_pre_attn_scalar), c.attn_logit_softcapping
        self.q_proj = Linear(c.hidden_size, N * H, bias=False)
        self.k_proj = Linear(c.hidden_size, K * H, bias=False)
        self.v_proj = Linear(c.hidden_size, K * H, bias=False)
        self.o_proj = Linear(N * H, c.hidden_size, bias=False)
        self.q_norm = Norm(H, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = Norm(H, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, cache: LayerCache | None) -> Tensor:
        (B, T, _), (N, K, H) = x_BTD.shape, self.heads
        q_BTNH = self.q_norm(self.q_proj(x_BTD).view(B, T, N, H))
        k_BSKH = self.k_norm(self.k_proj(x_BTD).view(B, T, K, H))
        v_BSKH = self.v_proj(x_BTD).view(B, T, K, H)
        q_BTNH, k_BSKH = rope(q_BTNH, positions_BT, self.layer), rope(k_BSKH, positions_BT, self.layer)
        positions_BS = positions_BT
        if cache is not None:
            k_BSKH, v_BSKH, positions_BS = cache.update(k_BSKH, v_BSKH)
        window = self.layer.sliding_window
        mixed_BTNH = attend(
            q_BTNH, k_BSKH, v_BSKH, positions_BT, positions_BS, scale=self.scale, softcap=self.softcap, window=window
        )
        return self.o_proj(mixed_BTNH.reshape(B, T, N * H))


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

    def __init__(self, c: ModelConfig, layer: LayerSpec) -> None:
        super().__init__()
        D, eps = c.hidden_size, c.rms_norm_eps
        self.input_layernorm = Norm(D, eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = Norm(D, eps)
        self.mlp = Mlp(c)
        self.post_norms = c.post_norms
        if c.post_norms:
            self.pre_feedforward_layernorm = Norm(D, eps)
            self.post_feedforward_layernorm = Norm(D, eps)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, cache: LayerCache | None) -> Tensor:
        a_BTD = self.self_attn(self.input_layernorm(x_BTD), positions_BT, cache)
        if not self.post_norms:
            x_BTD = x_BTD + a_BTD
            return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        x_BTD = x_BTD + self.post_attention_layernorm(a_BTD)
        return x_BTD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTD)))


class Stack(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, layer) for layer in c.layers)
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor, caches: list[LayerCache] | None, run: Callable = Block.__call__
    ) -> Tensor:
        x_BTD = self.embed_tokens(tokens_BT)
        # √D in the activations' own type: 55.5, not 55.43, for D = 3072 in bfloat16
        x_BTD = x_BTD * torch.full((), math.sqrt(x_BTD.shape[-1]), dtype=x_BTD.dtype, device=x_BTD.device)
        for i, layer in enumerate(self.layers):
            x_BTD = run(layer, x_BTD, positions_BT, caches[i] if caches else None)
        return self.norm(x_BTD)


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
        embedding = self.model.embed_tokens
        return embedding.weight.dtype if isinstance(embedding.weight, Tensor) else embedding.dtype

    def hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        caches: list[LayerCache] | None = None,
        run: Callable = Block.__call__,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm.

        positions: 0, 1, 2, … if None. caches: one per layer. run: how a layer is called, as ``run(layer, x, …)``.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        return self.model(tokens_BT, positions_BT, caches, run)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits float32 [..., V] of hidden states."""
        head_VD = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return softcap(widen(linear(x_BTD, head_VD)), self.config.final_logit_softcapping)

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor | None = None, caches: list[LayerCache] | None = None
    ) -> Tensor:
        """Logits float32 [B, T, V]; position t scores the token after ``tokens[:, t]``."""
        return self.logits(self.hidden(tokens_BT, positions_BT, caches))
