"""The engine's `Runner` on JAX: a cache of pages that jitted steps write in place, and few shapes to compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gemkit.arch.config import ModelConfig
from gemkit.engine.interface import Batch, PageGroup, StepResult, check_finite, page_groups
from gemkit.errors import GemkitError, UsageError
from gemkit.host import usable_cpus
from gemkit.models.frameworks import padded
from gemkit.models.frameworks.info import FrameworkInfo
from gemkit.models.jax import decoder
from gemkit.models.jax.load import BITS, load_params, pick_dtype
from gemkit.weights.checkpoint import Tensor

_HEAD_ROWS = 32  # rows of logits at a time
_FIRST_PAGES = 32  # a cache that grows is another shape: start with room for 2,000 tokens

Kept = list[tuple[Array, Array]]  # k and v [slots, K, H] of each layer


class JaxRunner(FrameworkInfo):
    """Runs a model with JAX, on the CPU, a GPU or a TPU.

    config, weights: as in a `Checkpoint`; memory holds the model and one tensor more while it loads.
    device: "cpu", "cuda", "tpu", "cuda:1", …; None takes JAX's first. dtype: see `load.pick_dtype`; "int8" and "int4"
    are of the matrices alone, see `linear`.
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
        place = _device(device)
        activations = pick_dtype(dtype, config, place)
        params = _memory(load_params, config, weights, activations, place, BITS.get(dtype))
        self._start(config, params, activations, place, max_tokens_per_step)

    @classmethod
    def of(
        cls, config: ModelConfig, params: decoder.Params, dtype: np.dtype, *, max_tokens_per_step: int = 512
    ) -> JaxRunner:
        """A runner of parameters that are there already; dtype: of the activations."""
        runner = cls.__new__(cls)
        device = next(iter(params["model.norm.weight"].devices()))
        runner._start(config, params, np.dtype(dtype), device, max_tokens_per_step)
        return runner

    def _start(
        self, config: ModelConfig, params: decoder.Params, dtype: np.dtype, device: jax.Device, max_tokens_per_step: int
    ) -> None:
        self.config, self.params, self.dtype, self.device = config, params, dtype, device
        self.groups = page_groups(config)
        self.max_tokens_per_step = max_tokens_per_step
        self.adapter_count = 0
        self.compilations = 0
        self.activations = self.dtype.name
        self.path = f"jax {self.device.platform}"
        self.threads = usable_cpus()
        model = (config, self.groups, self.dtype)
        self._hidden = jax.jit(self._counted(partial(_hidden, *model)), static_argnums=0, donate_argnums=3)
        self._decode = jax.jit(self._counted(partial(_decode, *model)), static_argnums=(0, 1), donate_argnums=4)
        self._take = jax.jit(self._counted(_take))
        self._likeliest = jax.jit(self._counted(partial(_likeliest, config)), static_argnums=0)
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
        return padded.in_parts(self._step, batch)

    def _step(self, batch: Batch) -> StepResult:
        wanted = np.flatnonzero(batch.draws)
        few = all(padded.greedy(batch.sampling[b]) for b in wanted)
        if len(batch.tokens) == len(batch.positions) <= _HEAD_ROWS:
            step = self._padded(batch)
            arguments = (step.sizes, few, self.params, step.flat(), self._cache)
            logits_BV, packed, self._cache = self._call(self._decode, *arguments)
            return padded.choose(self._known(logits_BV, packed, wanted, wanted, batch), batch, wanted)
        step, hidden_BTD = self._run(batch)
        known = []
        for part, hidden_RD in self._parts(hidden_BTD, step.rows[batch.starts[wanted + 1] - 1]):
            logits_RV, packed = self._call(self._likeliest, few, self.params, hidden_RD)
            known += self._known(logits_RV, packed, np.arange(len(wanted[part])), wanted[part], batch)
        return padded.choose(known, batch, wanted)

    def _known(
        self, logits_RV: Array, packed: Array, rows: np.ndarray, wanted: np.ndarray, batch: Batch
    ) -> list[padded.Logits]:
        """What `padded.choose` needs of some rows, which are those of the batch's sequences `wanted`."""
        packed = np.asarray(packed)
        k = packed.shape[1] // 2
        top, ids, sums = packed[:, :k], packed[:, k : 2 * k].astype(np.int32), packed[:, -1].astype(np.float64)
        check_finite(sums[rows])
        known = []
        for r, b in zip(rows, wanted, strict=True):
            whole = np.asarray(logits_RV[r]) if padded.needs_whole(batch.sampling[b]) else None
            known.append(padded.Logits(ids[r], top[r], float(top[r, 0]) + float(np.log(sums[r])), whole))
        return known

    def logits(self, batch: Batch) -> np.ndarray:
        step, hidden_BTD = self._run(batch)
        out = np.empty((len(batch.tokens), self.config.vocab_size), np.float32)
        for part, hidden_RD in self._parts(hidden_BTD, step.rows):
            logits_RV = self._call(self._likeliest, True, self.params, hidden_RD)[0]
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
        step = self._padded(batch)
        hidden_BTD, self._cache = self._call(self._hidden, step.sizes, self.params, step.flat(), self._cache)
        return step, hidden_BTD

    def _padded(self, batch: Batch) -> padded.Padded:
        for layer, (k, v) in enumerate(self._cache):
            # A step that was broken off took the cache with it; whoever used it starts over
            if k.is_deleted() or v.is_deleted():
                self._cache[layer] = _memory(self._empty, len(k) // self.page_size)
        return padded.pad(batch, self.page_size, [group.window for group in self.groups])

    def _call(self, function: Callable, *arguments):
        with _precision(self.dtype):
            return _memory(lambda: jax.block_until_ready(function(*arguments)))


# --- what is compiled ------------------------------------------------------------------------------------------------


def _hidden(
    config: ModelConfig,
    groups: Sequence[PageGroup],
    dtype: np.dtype,
    sizes: padded.Sizes,
    params: decoder.Params,
    flat: Array,
    kept: Kept,
) -> tuple[Array, Kept]:
    """Hidden states [B, T, D] of a `padded.Padded`, and the cache with the new tokens in it."""
    tokens_BT, positions_BT, _, places = padded.unpack(flat, sizes)
    place = {layer: place for group, place in zip(groups, places, strict=True) for layer in group.layers}
    caches = [decoder.LayerCache(*kept[layer], *place[layer]) for layer in range(len(kept))]
    hidden_BTD, caches = decoder.hidden(config, params, tokens_BT, positions_BT, caches, dtype)
    return hidden_BTD, [(cache.k, cache.v) for cache in caches]


def _decode(
    config: ModelConfig,
    groups: Sequence[PageGroup],
    dtype: np.dtype,
    sizes: padded.Sizes,
    few: bool,
    params: decoder.Params,
    flat: Array,
    kept: Kept,
) -> tuple[Array, Array, Kept]:
    """`_hidden` and `_likeliest` of a step of one token a sequence, in one call."""
    hidden_B1D, kept = _hidden(config, groups, dtype, sizes, params, flat, kept)
    return *_likeliest(config, few, params, hidden_B1D[:, 0]), kept


def _take(hidden_BTD: Array, rows_R: Array) -> Array:
    """Rows [R, D]; apart from the head, so that this is compiled once for R and not for all B and T."""
    return hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[rows_R]


def _likeliest(config: ModelConfig, few: bool, params: decoder.Params, hidden_RD: Array) -> tuple[Array, Array]:
    """Logits [R, V], and float32 [R, 2 k + 1]: the k largest, lower ids before equal ones, their ids, and
    Σ exp(logit - largest), NaN where a logit is not finite. k is 1 if few."""
    logits_RV = decoder.logits(config, params, hidden_RD)
    if few:
        ids_RK = logits_RV.argmax(-1, keepdims=True)
        top_RK = jnp.take_along_axis(logits_RV, ids_RK, -1)
    else:
        top_RK, ids_RK = jax.lax.top_k(logits_RV, min(padded.TOP, config.vocab_size))
    # Not less top_RK[:, :1]: a second use of it makes XLA sort the whole vocabulary
    sums_R1 = jnp.exp(logits_RV - logits_RV.max(-1, keepdims=True)).sum(-1, keepdims=True)
    sums_R1 = _checked(logits_RV, sums_R1[:, 0])[:, None]
    # Ids are exact in float32, up to 2**24
    return logits_RV, jnp.concatenate([top_RK, ids_RK.astype(top_RK.dtype), sums_R1], -1)


def _scores(config: ModelConfig, params: decoder.Params, hidden_RD: Array, ids_R: Array) -> tuple[Array, Array]:
    """The logits of ids less the largest [R], and Σ exp(logit - largest) [R], NaN where a logit is not finite."""
    logits_RV = decoder.logits(config, params, hidden_RD)
    logits_RV -= logits_RV.max(-1, keepdims=True)
    sums_R = _checked(logits_RV, jnp.exp(logits_RV).sum(-1))
    return jnp.take_along_axis(logits_RV, ids_R[:, None], 1)[:, 0], sums_R


def _checked(logits_RV: Array, sums_R: Array) -> Array:
    """The sums, NaN where a logit is minus infinity, which leaves no trace in a sum."""
    return jnp.where(jnp.isfinite(logits_RV.min(-1)), sums_R, jnp.nan)


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
