"""Gemma 1, 2 and 3 (text) in Keras 3, a translation of ``models/torch/decoder.py`` and ``models/jax/decoder.py``.

`Decoder` is a `keras.Model`: ``compile``, ``fit``, ``save`` and dtype policies work as in any other. The mathematics
is in plain functions, in the order of ``arch/reference.py``, on `keras.ops` alone. Norms, rotations, soft-caps and
softmax are computed in float32, whatever the weights are.

A weight's path, which layout maps and optimizers match on, is its name in `gemkit.arch.tensors.manifest` with slashes:
``model/layers/0/mlp/up_proj/weight``. Matrices are [out, in], as checkpoints store them.

Letters: B sequences, T new tokens, S visible tokens, D model width, F ffn width, N query heads, K key-value heads,
G = N/K query heads per key-value head, H head width, V vocabulary. ``q_BTNH`` has the axes B, T, N, H.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import keras
import numpy as np
from keras import KerasTensor as Tensor
from keras import ops

from gemkit.arch.config import LayerSpec, ModelConfig
from gemkit.arch.hf_config import from_hf, to_hf
from gemkit.arch.tensors import manifest
from gemkit.models.frameworks.layers import call
from gemkit.models.keras.attention import LayerCache, Where, attend, visible
from gemkit.models.keras.generate import Generator
from gemkit.models.keras.linear import LowRank, linear, rows
from gemkit.models.keras.logprobs import logprobs

Rotation = tuple[Tensor, Tensor]  # cosines and sines [B, T, 1, H/2]


def norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Normalise by the root mean square over the last axis. The gain is 1 + w; the type of x comes back."""
    x32 = ops.cast(x, "float32")
    gain = 1.0 + ops.cast(w, "float32")
    return ops.cast(x32 * ops.rsqrt(ops.mean(ops.square(x32), axis=-1, keepdims=True) + eps) * gain, x.dtype)


def inverse_frequencies(head_dim: int, layer: LayerSpec) -> np.ndarray:
    """Return the rotary frequencies float32 [H/2] in radians per position."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return np.float32(layer.rope_theta**-exponent) / np.float32(layer.rope_factor)


def rotation(positions_BT: Tensor, head_dim: int, layer: LayerSpec) -> Rotation:
    """Return cosines and sines [B, T, 1, H/2] of the positions' angles, in float32."""
    frequencies = ops.convert_to_tensor(inverse_frequencies(head_dim, layer), dtype="float32")
    angle_BT1H = (ops.cast(positions_BT, "float32")[..., None] * frequencies)[:, :, None]
    return ops.cos(angle_BT1H), ops.sin(angle_BT1H)


def rope(x_BTNH: Tensor, rotation: Rotation) -> Tensor:
    """Rotate by positions; element i pairs with element i + H/2."""
    (cos, sin), (first, second) = rotation, ops.split(ops.cast(x_BTNH, "float32"), 2, axis=-1)
    rotated = ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return ops.cast(rotated, x_BTNH.dtype)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * ops.tanh(x / cap)


class Weight(keras.layers.Layer):
    """A layer with one parameter, ``weight``, created at once: its shape needs no input. name: canonical."""

    def __init__(self, shape: tuple[int, ...], std: float, *, name: str, dtype) -> None:
        *self.scopes, name = name.split(".")
        super().__init__(name=name, dtype=dtype)
        start = keras.initializers.RandomNormal(stddev=std) if std else "zeros"
        with ExitStack() as stack:
            for scope in self.scopes:
                stack.enter_context(keras.name_scope(scope))
            # Each use casts for itself: an embedding only the rows that it looks up, a norm not at all
            self.weight = self.add_weight(shape, start, self._kind(), autocast=False, name="weight")
        self.built = True

    def __call__(self, x: Tensor) -> Tensor:
        # Past the checks of Keras, which cost PyTorch 0.2 ms a time and find nothing to do here
        return self.call(x)

    def _kind(self) -> str:
        return self.variable_dtype


class Norm(Weight):
    """Its weight is float32 always."""

    def __init__(self, width: int, eps: float, **kwargs) -> None:
        super().__init__((width,), 0.0, **kwargs)
        self.eps = eps

    def _kind(self) -> str:
        return "float32"

    def call(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.eps)


class Linear(Weight):
    low_rank: LowRank | None = None

    def call(self, x: Tensor) -> Tensor:
        return linear(x, self.weight if self.low_rank is None else self.low_rank)

    def adapt(self, rank: int, scale: float, dora: bool = False, dropout: float = 0.0) -> LowRank:
        """Freeze the matrix and add an adapter of zeros, float32; see `LowRank`."""
        outputs, inputs = self.weight.shape
        self.weight.trainable = False
        shapes = {"lora_a": (rank, inputs), "lora_b": (outputs, rank)} | ({"magnitude": (outputs,)} if dora else {})
        with ExitStack() as stack:
            for scope in self.scopes:
                stack.enter_context(keras.name_scope(scope))
            added = [
                self.add_weight(shape, "zeros", "float32", autocast=False, name=name) for name, shape in shapes.items()
            ]
        a, b, magnitude = (*added, None)[:3]
        # With a seed (int32) the masks depend on variables alone, on every backend
        seed = zlib.crc32(self.weight.path.encode()) >> 1
        self.dropout = keras.layers.Dropout(dropout, seed=seed) if dropout else None
        self.low_rank = LowRank(self.weight, a, b, scale, magnitude, self.dropout)
        return self.low_rank


class Embedding(Weight):
    def call(self, tokens_BT: Tensor) -> Tensor:
        return rows(self.weight, tokens_BT, self.compute_dtype)


class Attention(keras.layers.Layer):
    """Grouped-query attention. Returns its output and the cache with the new keys and values."""

    def __init__(self, c: ModelConfig, std: float, *, name: str, dtype) -> None:
        super().__init__(name=name.replace(".", "_"), dtype=dtype, autocast=False)  # cosines and sines stay float32
        D, N, K, H = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.heads, self.qk_norm = (N, K, H), c.qk_norm
        self.scale, self.softcap = 1 / math.sqrt(c.query_pre_attn_scalar), c.attn_logit_softcapping
        self.q_proj = Linear((N * H, D), std, name=f"{name}.q_proj", dtype=dtype)
        self.k_proj = Linear((K * H, D), std, name=f"{name}.k_proj", dtype=dtype)
        self.v_proj = Linear((K * H, D), std, name=f"{name}.v_proj", dtype=dtype)
        self.o_proj = Linear((D, N * H), std, name=f"{name}.o_proj", dtype=dtype)
        if c.qk_norm:
            self.q_norm = Norm(H, c.rms_norm_eps, name=f"{name}.q_norm", dtype=dtype)
            self.k_norm = Norm(H, c.rms_norm_eps, name=f"{name}.k_norm", dtype=dtype)
        self.built = True

    def call(
        self, x_BTD: Tensor, rotation: Rotation, mask_BTS: Tensor, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerCache | None]:
        (B, T, _), (N, K, H) = ops.shape(x_BTD), self.heads
        q_BTNH = ops.reshape(self.q_proj(x_BTD), (B, T, N, H))
        k_BSKH = ops.reshape(self.k_proj(x_BTD), (B, T, K, H))
        v_BSKH = ops.reshape(self.v_proj(x_BTD), (B, T, K, H))
        if self.qk_norm:
            q_BTNH, k_BSKH = self.q_norm(q_BTNH), self.k_norm(k_BSKH)
        q_BTNH, k_BSKH = rope(q_BTNH, rotation), rope(k_BSKH, rotation)
        if cache is not None:
            cache = cache.update(k_BSKH, v_BSKH)
            k_BSKH, v_BSKH = cache.read()
        mixed_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=self.scale, softcap=self.softcap)
        return self.o_proj(ops.reshape(mixed_BTNH, (B, T, N * H))), cache


class Mlp(keras.layers.Layer):
    """Gated feed-forward with the tanh form of GELU."""

    def __init__(self, c: ModelConfig, std: float, *, name: str, dtype) -> None:
        super().__init__(name=name.replace(".", "_"), dtype=dtype, autocast=False)  # cosines and sines stay float32
        D, F = c.hidden_size, c.intermediate_size
        self.gate_proj = Linear((F, D), std, name=f"{name}.gate_proj", dtype=dtype)
        self.up_proj = Linear((F, D), std, name=f"{name}.up_proj", dtype=dtype)
        self.down_proj = Linear((D, F), std, name=f"{name}.down_proj", dtype=dtype)
        self.built = True

    def call(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(ops.gelu(self.gate_proj(x_BTD), approximate=True) * self.up_proj(x_BTD))


class Block(keras.layers.Layer):
    """One layer."""

    def __init__(self, c: ModelConfig, std: float, *, name: str, dtype) -> None:
        super().__init__(name=name.replace(".", "_"), dtype=dtype, autocast=False)  # cosines and sines stay float32
        D, eps = c.hidden_size, c.rms_norm_eps
        self.input_layernorm = Norm(D, eps, name=f"{name}.input_layernorm", dtype=dtype)
        self.self_attn = Attention(c, std, name=f"{name}.self_attn", dtype=dtype)
        self.post_attention_layernorm = Norm(D, eps, name=f"{name}.post_attention_layernorm", dtype=dtype)
        self.mlp = Mlp(c, std, name=f"{name}.mlp", dtype=dtype)
        self.post_norms = c.post_norms
        if c.post_norms:
            self.pre_feedforward_layernorm = Norm(D, eps, name=f"{name}.pre_feedforward_layernorm", dtype=dtype)
            self.post_feedforward_layernorm = Norm(D, eps, name=f"{name}.post_feedforward_layernorm", dtype=dtype)
        self.built = True

    def call(
        self, x_BTD: Tensor, rotation: Rotation, mask_BTS: Tensor, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerCache | None]:
        a_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), rotation, mask_BTS, cache)
        if not self.post_norms:
            x_BTD = x_BTD + a_BTD
            return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache
        x_BTD = x_BTD + self.post_attention_layernorm(a_BTD)
        return x_BTD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTD))), cache


class Stack(keras.layers.Layer):
    """Embedding, layers and final norm."""

    def __init__(self, c: ModelConfig, std: float, *, dtype) -> None:
        super().__init__(name="model", dtype=dtype, autocast=False)
        self.config = c
        self.embed_tokens = Embedding((c.vocab_size, c.hidden_size), std, name="model.embed_tokens", dtype=dtype)
        self.layers = [Block(c, std, name=f"model.layers.{i}", dtype=dtype) for i in range(len(c.layers))]
        self.norm = Norm(c.hidden_size, c.rms_norm_eps, name="model.norm", dtype=dtype)
        self.built = True

    def call(
        self, x_BTD: Tensor, where: Where, caches: Sequence[LayerCache] | None = None, *, run: Callable = call
    ) -> tuple[Tensor, list[LayerCache | None]]:
        layers, given = self.config.layers, caches or [None] * len(self.layers)
        # Built once a step for all layers of a kind
        kinds = dict(zip(layers, given))
        rotations = {layer: rotation(where.positions_BT, self.config.head_dim, layer) for layer in kinds}
        masks = {
            layer: visible(where, Where(cache.positions_BS) if cache else where, layer.sliding_window)
            for layer, cache in kinds.items()
        }
        written = []
        for module, layer, cache in zip(self.layers, layers, given, strict=True):
            x_BTD, cache = run(module, x_BTD, rotations[layer], masks[layer], cache)
            written.append(cache)
        return self.norm(x_BTD), written


@keras.saving.register_keras_serializable("gemkit")
class Decoder(keras.Model):
    """A Gemma model. `tensors` has the names of `gemkit.arch.tensors.manifest`, which are Hugging Face's.

    initializer_range: standard deviation of fresh matrices; 0 makes zeros, for weights that are loaded anyway.
    dtype: a dtype policy: "float32", "bfloat16" (norms stay float32), "mixed_bfloat16", ….

    Example: ``Decoder(config)(np.array([[2, 651, 6037]]))`` gives logits float32 [1, 3, V].
    """

    def __init__(self, config: ModelConfig, initializer_range: float = 0.02, **kwargs) -> None:
        super().__init__(**kwargs)
        self.config, self.initializer_range = config, initializer_range
        self.model = Stack(config, initializer_range, dtype=self.dtype_policy)
        if not config.tie_word_embeddings:
            shape = (config.vocab_size, config.hidden_size)
            self.lm_head = Linear(shape, initializer_range, name="lm_head", dtype=self.dtype_policy)
        self.built = True
        self.adapted: dict[str, tuple[int, float, bool, float]] = {}
        self._generator = Generator(self)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return the input of the first layer [B, T, D]."""
        x_BTD = self.model.embed_tokens(tokens_BT)
        # √D in the activations' own type: 55.5, not 55.43, for D = 3072 in bfloat16
        return x_BTD * ops.cast(math.sqrt(x_BTD.shape[-1]), x_BTD.dtype)

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
            where = Where(ops.arange(ops.shape(tokens_BT)[1], dtype="int32")[None])
        return self.model(self.embed(tokens_BT) if inputs is None else inputs, where, caches, run=run)

    @property
    def head(self) -> keras.Variable:
        """The output matrix [V, D]."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Return logits float32 [..., V] of hidden states."""
        return softcap(ops.cast(linear(x_BTD, self.head), "float32"), self.config.final_logit_softcapping)

    def logprobs(self, x_RD: Tensor, targets_R: Tensor, training: bool = True) -> Tensor:
        """Return log-probabilities float32 [R] of the next tokens, by chunks of rows; see `logprobs`."""
        return logprobs(x_RD, self.head, targets_R, self.config.final_logit_softcapping, training)

    def call(self, tokens_BT: Tensor, where: Where | None = None) -> Tensor:
        """Return logits float32 [B, T, V]; position t scores the token after ``tokens[:, t]``."""
        return self.logits(self.hidden(tokens_BT, where)[0])

    def adapt(self, name: str, rank: int, scale: float, dora: bool = False, dropout: float = 0.0) -> LowRank:
        """Add an adapter of zeros to the matrix of that canonical name, and freeze the matrix; see `Linear.adapt`."""
        module = self
        for part in name.removesuffix(".weight").split("."):
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        self.adapted[name] = rank, scale, dora, dropout
        return module.adapt(rank, scale, dora, dropout)

    def tensors(self) -> dict[str, keras.Variable]:
        """Return every parameter by its canonical name, in the order of the manifest."""
        found = {variable.path.replace("/", "."): variable for variable in self.weights}
        return {name: found[name] for name in manifest(self.config)}

    def generate(self, ids: Sequence[int] | Sequence[Sequence[int]], max_tokens: int = 128, **settings):
        """Return the new tokens of a prompt, or of each of a list: see `gemkit.models.keras.generate`."""
        return self._generator.generate(ids, max_tokens, **settings)

    @property
    def compilations(self) -> int:
        """Number of graphs that `generate` has compiled: one per function and shape; 0 on PyTorch."""
        return self._generator.runner.compilations

    def get_config(self) -> dict:
        config = {"config": to_hf(self.config), "initializer_range": self.initializer_range, "adapted": self.adapted}
        frozen = [name for name, variable in self.tensors().items() if not variable.trainable]
        return {**super().get_config(), **config, "frozen": frozen}

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None) -> Decoder:
        options = dict(config)
        adapted, frozen = options.pop("adapted", {}), options.pop("frozen", ())
        decoder = cls(from_hf(options.pop("config")), **options)
        for name, parts in adapted.items():
            decoder.adapt(name, *parts)
        tensors = decoder.tensors()
        for name in frozen:
            tensors[name].trainable = False
        return decoder
