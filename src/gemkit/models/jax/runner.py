"""The engine's `Runner` on JAX: a cache of pages that jitted steps write in place, and few shapes to compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gemkit.engine.interface import PageGroup
from gemkit.host import usable_cpus
from gemkit.models.frameworks.batch import PaddedBatch, Sizes, unpack
from gemkit.models.frameworks.choice import TOP
from gemkit.models.frameworks.runner import FrameworkRunner
from gemkit.models.jax.attention import LayerCache, Where
from gemkit.models.jax.decoder import Decoder, Params

Caches = list[tuple[Array, Array]]  # k and v [slots, K, H] of each layer


class JaxRunner(FrameworkRunner):
    """Run a decoder with JAX, where its parameters are, on every core of a CPU.

    compilations: how many shapes were compiled so far. The first step of a shape takes seconds.
    """

    def __init__(self, decoder: Decoder, *, max_tokens_per_step: int = 512) -> None:
        self.dtype, self.compilations = np.dtype(decoder.dtype), 0
        self.device = next(iter(decoder.params["model.norm.weight"].devices()))
        name, path = self.dtype.name, f"jax {self.device.platform}"
        super().__init__(decoder, name, self.dtype.itemsize, path, usable_cpus(), max_tokens_per_step)
        model = replace(decoder, params={})  # parameters are an argument: in the graph they would be constants
        self._run_hidden = self._jit(partial(_hidden, model, self.groups), static_argnums=0, donate_argnums=3)
        self._run_decode = self._jit(partial(_decode, model, self.groups), static_argnums=(0, 1), donate_argnums=4)
        self._run_take = self._jit(_take)
        self._run_top = self._jit(partial(_top, model), static_argnums=0)
        self._run_logprobs = self._jit(partial(_logprobs, model))

    def _jit(self, function: Callable, **options: Any) -> Callable:
        """Jit a function. Python runs it only to compile it for a new shape, which is counted."""

        def traced(*arguments):
            self.compilations += 1
            return function(*arguments)

        return jax.jit(traced, **options)

    def _weight_sizes(self) -> dict[str, int]:
        return {name: value.nbytes for name, value in self.decoder.params.items()}

    def _allocate(self, pages: int) -> tuple[Array, Array]:
        shape = (pages * self.page_size, self.config.num_key_value_heads, self.config.head_dim)
        k, v = (jnp.zeros(shape, self.dtype, device=self.device) for _ in range(2))
        return k, v

    def _grown(self, cache: tuple[Array, Array], pages: int) -> tuple[Array, Array]:
        k, v = map(jnp.concatenate, zip(cache, self._allocate(pages - len(cache[0]) // self.page_size)))
        return k, v

    def _hidden(self, step: PaddedBatch) -> Array:
        self._restore_caches()
        hidden_BTD, self.caches = self._run_hidden(step.sizes, self.decoder.params, step.flat(), self.caches)
        return hidden_BTD

    def _decode(self, step: PaddedBatch, argmax: bool) -> tuple[Array, Array]:
        self._restore_caches()
        arguments = (step.sizes, argmax, self.decoder.params, step.flat(), self.caches)
        logits_BV, packed, self.caches = self._run_decode(*arguments)
        return logits_BV, packed

    def _restore_caches(self) -> None:
        """Allocate caches that a failed step has donated; their sequences start over."""
        for layer, (k, v) in enumerate(self.caches):
            if k.is_deleted() or v.is_deleted():
                self.caches[layer] = self._allocate(len(k) // self.page_size)

    def _take(self, hidden_BTD: Array, rows: np.ndarray) -> Array:
        return self._run_take(hidden_BTD, rows)

    def _top(self, hidden_RD: Array, argmax: bool) -> tuple[Array, Array]:
        return self._run_top(argmax, self.decoder.params, hidden_RD)

    def _logprobs(self, hidden_RD: Array, ids_R: np.ndarray) -> np.ndarray:
        picked, sums = map(np.asarray, self._run_logprobs(self.decoder.params, hidden_RD, ids_R))
        return picked - np.log(sums.astype(np.float64))

    def _numpy(self, array: Array) -> np.ndarray:
        return np.asarray(array).astype(np.float32, copy=False)

    def _call(self, function: Callable, *arguments: Any) -> Any:
        with _precision(self.dtype):
            return super()._call(lambda: jax.block_until_ready(function(*arguments)))


# --- what is compiled ------------------------------------------------------------------------------------------------


def _hidden(
    model: Decoder, groups: Sequence[PageGroup], sizes: Sizes, params: Params, flat: Array, kv: Caches
) -> tuple[Array, Caches]:
    """Return hidden states [B, T, D] of a `PaddedBatch`, and the caches with the new tokens in them."""
    tokens_BT, positions_BT, slots = unpack(flat, sizes)
    of_layer = {layer: slot for group, slot in zip(groups, slots, strict=True) for layer in group.layers}
    caches = [LayerCache(*kv[layer], *of_layer[layer]) for layer in range(len(kv))]
    hidden_BTD, caches = replace(model, params=params).hidden(tokens_BT, Where(positions_BT), caches)
    return hidden_BTD, [(cache.k, cache.v) for cache in caches]


def _decode(
    model: Decoder,
    groups: Sequence[PageGroup],
    sizes: Sizes,
    argmax: bool,
    params: Params,
    flat: Array,
    kv: Caches,
) -> tuple[Array, Array, Caches]:
    """Return `_top` of `_hidden` of a step of one token a sequence, in one call."""
    hidden_B1D, kv = _hidden(model, groups, sizes, params, flat, kv)
    return *_top(model, argmax, params, hidden_B1D[:, 0]), kv


def _take(hidden_BTD: Array, rows_R: Array) -> Array:
    """Return rows [R, D]; apart from the head, so that this is compiled once for R and not for all B and T."""
    return hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[rows_R]


def _top(model: Decoder, argmax: bool, params: Params, hidden_RD: Array) -> tuple[Array, Array]:
    """Return logits [R, V] and packed rows; see `gemkit.models.frameworks.choice`."""
    logits_RV = replace(model, params=params).logits(hidden_RD)
    if argmax:
        ids_RK = logits_RV.argmax(-1, keepdims=True)
        top_RK = jnp.take_along_axis(logits_RV, ids_RK, -1)
    else:
        top_RK, ids_RK = jax.lax.top_k(logits_RV, min(TOP, model.config.vocab_size))
    # Not less top_RK[:, :1]: a second use of it makes XLA sort the whole vocabulary
    sums_R = _checked(logits_RV, jnp.exp(logits_RV - logits_RV.max(-1, keepdims=True)).sum(-1))
    return logits_RV, jnp.concatenate([top_RK, ids_RK.astype(top_RK.dtype), sums_R[:, None]], -1)


def _logprobs(model: Decoder, params: Params, hidden_RD: Array, ids_R: Array) -> tuple[Array, Array]:
    """Return the logits of ids less the largest [R], and Σ exp(logit - largest) [R], NaN if one is not finite."""
    logits_RV = replace(model, params=params).logits(hidden_RD)
    logits_RV -= logits_RV.max(-1, keepdims=True)
    sums_R = _checked(logits_RV, jnp.exp(logits_RV).sum(-1))
    return jnp.take_along_axis(logits_RV, ids_R[:, None], 1)[:, 0], sums_R


def _checked(logits_RV: Array, sums_R: Array) -> Array:
    """Return the sums, NaN where a logit is minus infinity, which leaves no trace in a sum."""
    return jnp.where(jnp.isfinite(logits_RV.min(-1)), sums_R, jnp.nan)


def _precision(dtype: np.dtype) -> AbstractContextManager:
    """float32 is float32: GPUs and TPUs would round the factors of a product."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else nullcontext()
