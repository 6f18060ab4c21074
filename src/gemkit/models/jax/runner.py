"""The engine's `Runner` on JAX: a cache of pages that jitted steps write in place, and few shapes to compile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gemkit.arch.config import ModelConfig
from gemkit.engine.runner import Batch, PageGroup, StepResult, page_groups
from gemkit.errors import GemkitError, UsageError
from gemkit.models import padded
from gemkit.models.jax import decoder
from gemkit.models.jax.load import load_params, pick_dtype
from gemkit.weights.checkpoint import Tensor

_HEAD_ROWS = 32  # rows of logits at a time
_FIRST_PAGES = 32  # a cache that grows is another shape: start with room for 2,000 tokens

Kept = list[tuple[Array, Array]]  # k and v [slots, K, H] of each layer
Place = tuple[np.ndarray, np.ndarray, np.ndarray]  # write [B, T], read [B, S], positions [B, S] of a page group


class JaxRunner:
    """Runs a model with JAX, on the CPU, a GPU or a TPU.

    config, weights: as in a `Checkpoint`; memory holds the model and one tensor more while it loads.
    device: "cpu", "cuda", "tpu", "cuda:1", …; None takes JAX's first. dtype: see `load.pick_dtype`.
    threads: not in JAX's hands; it takes every core.
    compilations: how many shapes were compiled so far. The first step of a shape takes seconds.
    Raises UsageError for a device or type that cannot be had, GemkitError if memory is short.
    """

    page_size = 64
    scratch_bytes = 0  # JAX keeps its own

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        device: str | None = None,
        dtype: str = "auto",
        threads: int | None = None,
        max_tokens_per_step: int = 512,
    ) -> None:
        self.config = config
        self.groups = page_groups(config)
        self.max_tokens_per_step = max_tokens_per_step
        self.adapter_count = 0
        self.compilations = 0
        self.device = _device(device)
        self.dtype = pick_dtype(dtype, config, self.device)
        self.activations = self.dtype.name
        self.path = f"jax {self.device.platform}"
        self.threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.params: dict[str, Array] = _memory(load_params, config, weights, self.dtype, self.device)
        self._hidden = jax.jit(self._counted(partial(_hidden, config, self.groups)), donate_argnums=3)
        self._take = jax.jit(self._counted(_take))
        self._likeliest = jax.jit(self._counted(partial(_likeliest, config)))
        self._scores = jax.jit(self._counted(partial(_scores, config)))
        self._cache: Kept = [self._empty(1) for _ in config.layers]

    def _counted(self, function: Callable) -> Callable:
        """JAX calls a jitted function itself only to compile it for a new shape."""

        def traced(*arguments):
            self.compilations += 1
            return function(*arguments)

        return traced

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return sum(value.nbytes for value in self.params.values())

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that one token reads: an untied embedding gives a row alone."""
        if self.config.tie_word_embeddings:
            return self.weight_bytes
        return self.weight_bytes - self.params["model.embed_tokens.weight"].nbytes

    def page_bytes(self, group: int) -> int:
        row = self.config.num_key_value_heads * self.config.head_dim * self.dtype.itemsize
        return 2 * self.page_size * row * len(self.groups[group].layers)

    def reserve(self, pages: Sequence[int]) -> None:
        for group, count in zip(self.groups, pages, strict=True):
            wanted = max(_FIRST_PAGES, padded.bucket(count + 1))
            for layer in group.layers:
                more = wanted - len(self._cache[layer][0]) // self.page_size
                if more > 0:
                    self._cache[layer] = _memory(self._grown, self._cache[layer], more)

    def _empty(self, pages: int) -> tuple[Array, Array]:
        shape = (pages * self.page_size, self.config.num_key_value_heads, self.config.head_dim)
        k, v = (jnp.zeros(shape, self.dtype, device=self.device) for _ in range(2))
        return k, v

    def _grown(self, old: tuple[Array, Array], pages: int) -> tuple[Array, Array]:
        k, v = map(jnp.concatenate, zip(old, self._empty(pages)))
        return k, v

    # --- steps ---------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepResult:
        step, hidden_BTD = self._run(batch)
        wanted = np.flatnonzero(batch.sample)
        found = []
        for part, hidden_RD in self._parts(hidden_BTD, step.rows[batch.starts[wanted + 1] - 1]):
            found += self._reduced(hidden_RD, [batch.sampling[b] for b in wanted[part]])
        return padded.choose(found, batch, wanted)

    def _reduced(self, hidden_RD: Array, samplings: list) -> list[padded.Logits]:
        logits_RV, *reduced = self._call(self._likeliest, self.params, hidden_RD)
        top, ids, sums = map(np.asarray, reduced)
        if not np.isfinite(sums[: len(samplings)]).all():
            raise GemkitError("the model produced logits that are not numbers; the weights are damaged or out of range")
        log_sums = top[:, 0].astype(np.float64) + np.log(sums.astype(np.float64))
        found = []
        for r, sampling in enumerate(samplings):
            whole = np.asarray(logits_RV[r]) if padded.needs_whole(sampling) else None
            found.append(padded.Logits(ids[r], top[r], float(log_sums[r]), whole))
        return found

    def logits(self, batch: Batch) -> np.ndarray:
        step, hidden_BTD = self._run(batch)
        out = np.empty((len(batch.tokens), self.config.vocab_size), np.float32)
        for part, hidden_RD in self._parts(hidden_BTD, step.rows):
            logits_RV = self._call(self._likeliest, self.params, hidden_RD)[0]
            out[part] = np.asarray(logits_RV)[: len(out[part])]
        return out

    def score(self, batch: Batch, targets: np.ndarray) -> np.ndarray:
        step, hidden_BTD = self._run(batch)
        out = np.zeros(len(targets), np.float32)
        wanted = np.flatnonzero(targets >= 0)
        for part, hidden_RD in self._parts(hidden_BTD, step.rows[wanted]):
            some = wanted[part]
            ids = np.zeros(len(hidden_RD), np.int32)
            ids[: len(some)] = targets[some]
            picked, sums = map(np.asarray, self._call(self._scores, self.params, hidden_RD, ids))
            out[some] = (picked - np.log(sums.astype(np.float64)))[: len(some)]
        return out

    def hidden(self, batch: Batch) -> np.ndarray:
        step, hidden_BTD = self._run(batch)
        return np.asarray(hidden_BTD).reshape(-1, self.config.hidden_size)[step.rows].astype(np.float32)

    def _parts(self, hidden_BTD: Array, rows: np.ndarray) -> Iterator[tuple[slice, Array]]:
        """Some rows of hidden states, a few at a time: (where they stand in `rows`, [R, D], padded)."""
        for first in range(0, len(rows), _HEAD_ROWS):
            part = rows[first : first + _HEAD_ROWS]
            few = np.zeros(padded.bucket(len(part)), np.int32)
            few[: len(part)] = part
            yield slice(first, first + len(part)), self._call(self._take, hidden_BTD, few)

    def _run(self, batch: Batch) -> tuple[padded.Padded, Array]:
        """The padded step and the hidden states [B, T, D] after the final norm."""
        step = padded.pad(batch, self.page_size)
        for layer, (k, v) in enumerate(self._cache):
            # A step that was broken off took the cache with it; whoever used it starts over
            if k.is_deleted() or v.is_deleted():
                self._cache[layer] = _memory(self._empty, len(k) // self.page_size)
        places: list[Place] = list(zip(step.write, step.read, step.seen, strict=True))
        hidden_BTD, self._cache = self._call(
            self._hidden, self.params, step.tokens, step.positions, self._cache, places
        )
        return step, hidden_BTD

    def _call(self, function: Callable, *arguments):
        with _precision(self.dtype):
            return _memory(lambda: jax.block_until_ready(function(*arguments)))


# --- what is compiled ------------------------------------------------------------------------------------------------


def _hidden(
    config: ModelConfig,
    groups: Sequence[PageGroup],
    params: decoder.Params,
    tokens_BT: Array,
    positions_BT: Array,
    kept: Kept,
    places: Sequence[Place],
) -> tuple[Array, Kept]:
    """Hidden states [B, T, D], and the cache with the new tokens in it."""
    place = {layer: place for group, place in zip(groups, places, strict=True) for layer in group.layers}
    caches = [decoder.LayerCache(*kept[layer], *place[layer]) for layer in range(len(kept))]
    hidden_BTD, caches = decoder.hidden(config, params, tokens_BT, positions_BT, caches)
    return hidden_BTD, [(cache.k, cache.v) for cache in caches]


def _take(hidden_BTD: Array, rows_R: Array) -> Array:
    """Rows [R, D]; apart from the head, so that this is compiled once for R and not for all B and T."""
    return hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[rows_R]


def _likeliest(config: ModelConfig, params: decoder.Params, hidden_RD: Array) -> tuple[Array, Array, Array, Array]:
    """Logits [R, V], the largest [R, k], lower ids before equal ones, their ids, and Σ exp(logit - largest) [R]."""
    logits_RV = decoder.logits(config, params, hidden_RD)
    top_RK, ids_RK = jax.lax.top_k(logits_RV, min(padded.TOP, config.vocab_size))
    # Not less top_RK[:, :1]: a second use of it makes XLA sort the whole vocabulary
    return logits_RV, top_RK, ids_RK, jnp.exp(logits_RV - logits_RV.max(-1, keepdims=True)).sum(-1)


def _scores(config: ModelConfig, params: decoder.Params, hidden_RD: Array, ids_R: Array) -> tuple[Array, Array]:
    """The logits of ids less the largest [R], and Σ exp(logit - largest) [R]."""
    logits_RV = decoder.logits(config, params, hidden_RD)
    logits_RV -= logits_RV.max(-1, keepdims=True)
    return jnp.take_along_axis(logits_RV, ids_R[:, None], 1)[:, 0], jnp.exp(logits_RV).sum(-1)


def _precision(dtype: np.dtype) -> AbstractContextManager:
    """float32 is float32: GPUs and TPUs would round the factors of a product."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else nullcontext()


def _device(name: str | None) -> jax.Device:
    if name is None:
        return jax.devices()[0]
    platform, _, index = name.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, ValueError, IndexError):
        raise UsageError(f"JAX has no device {name!r} here; leave it out, or choose cpu") from None


def _memory(function: Callable, *arguments):
    """Calls a function whose want of memory is a user's error."""
    try:
        return function(*arguments)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise GemkitError(
                "memory is short for this model: choose a smaller one, a shorter context, or a narrower dtype"
            ) from None
        raise
