"""The engine's `Runner` over a Keras decoder: a cache of pages, and few shapes, which JAX and TensorFlow compile.

Letters: B sequences, T new tokens, S slots read, R rows of hidden states, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import keras
import numpy as np
from keras import KerasTensor as Tensor
from keras import ops

from gemkit.arch.config import ModelConfig
from gemkit.engine.interface import Batch, StepResult, check_finite, check_single_draws, page_groups
from gemkit.errors import GemkitError, UsageError
from gemkit.models.frameworks import padded
from gemkit.models.keras.attention import LayerCache

_HEAD_ROWS = 32  # rows of logits at a time

Kept = list[tuple[Tensor, Tensor]]  # k and v [slots, K, H] of each layer
Place = tuple[np.ndarray, np.ndarray, np.ndarray]  # write [B, T], read [B, S], positions [B, S] of a page group


class Cached(Protocol):
    """What the steps need of a decoder."""

    config: ModelConfig
    compute_dtype: str

    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor, caches: Sequence[LayerCache]) -> tuple[Tensor, list]: ...

    def logits(self, x_BTD: Tensor) -> Tensor: ...

    def tensors(self) -> dict[str, keras.Variable]: ...


class Steps:
    """A decoder behind the engine's protocol. Its weights may change between steps.

    compilations: how many graphs were made: one per function and shape; 0 on PyTorch, which runs eagerly.
    """

    page_size = 64
    scratch_bytes = 0  # the frameworks keep their own

    def __init__(self, decoder: Cached, max_tokens_per_step: int = 512) -> None:
        self.decoder, self.config = decoder, decoder.config
        self.groups = page_groups(decoder.config)
        self.max_tokens_per_step, self.adapter_count = max_tokens_per_step, 0
        self.compilations = 0
        self._hidden = self._compiled(self._hidden_of, donate=True)
        self._take = self._compiled(lambda hidden_BTD, rows_R: _rows(hidden_BTD, rows_R))
        self._likeliest = self._compiled(self._likeliest_of)
        self._scores = self._compiled(self._scores_of)
        self.clear()

    def page_bytes(self, group: int) -> int:
        row = self.config.num_key_value_heads * self.config.head_dim * width(self.decoder.compute_dtype)
        return 2 * self.page_size * row * len(self.groups[group].layers)

    def clear(self) -> None:
        """Lets the cache go."""
        self._cache: Kept = [self._empty(1) for _ in self.config.layers]

    def reserve(self, pages: Sequence[int]) -> None:
        for group, count in zip(self.groups, pages, strict=True):
            wanted = padded.bucket(count + 1)
            for layer in group.layers:
                k, v = self._cache[layer]
                more = wanted - k.shape[0] // self.page_size
                if more > 0:
                    self._cache[layer] = tuple(
                        memory(ops.concatenate, [old, new]) for old, new in zip((k, v), self._empty(more))
                    )

    def _empty(self, pages: int) -> tuple[Tensor, Tensor]:
        shape = (pages * self.page_size, self.config.num_key_value_heads, self.config.head_dim)
        return tuple(memory(ops.zeros, shape, self.decoder.compute_dtype) for _ in range(2))

    # --- steps ---------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, at_least: tuple[int, int, int] = (1, 1, 1)) -> StepResult:
        """Runs the new tokens and draws. at_least: sequences, tokens and pages to pad to, so that shapes stay."""
        check_single_draws(batch)
        step, hidden_BTD = self._run(batch, at_least)
        wanted = np.flatnonzero(batch.draws)
        found = []
        for part, hidden_RD in self._parts(hidden_BTD, step.rows[batch.starts[wanted + 1] - 1], at_least[0]):
            found += self._reduced(hidden_RD, [batch.sampling[b] for b in wanted[part]])
        return padded.choose(found, batch, wanted)

    def _reduced(self, hidden_RD: Tensor, samplings: list) -> list[padded.Logits]:
        logits_RV, *reduced = memory(self._likeliest, hidden_RD)
        top, ids, sums = map(ops.convert_to_numpy, reduced)
        check_finite(sums[: len(samplings)])
        found = []
        for r, sampling in enumerate(samplings):
            order = np.lexsort((ids[r], -top[r]))  # the lower id before an equal one, which not every backend sees to
            whole = ops.convert_to_numpy(logits_RV[r]) if padded.needs_whole(sampling) else None
            log_sum = float(top[r].max()) + float(np.log(sums[r].astype(np.float64)))
            found.append(padded.Logits(ids[r][order], top[r][order], log_sum, whole))
        return found

    def logits(self, batch: Batch) -> np.ndarray:
        step, hidden_BTD = self._run(batch)
        out = np.empty((len(batch.tokens), self.config.vocab_size), np.float32)
        for part, hidden_RD in self._parts(hidden_BTD, step.rows):
            logits_RV = memory(self._likeliest, hidden_RD)[0]
            out[part] = ops.convert_to_numpy(logits_RV)[: len(out[part])]
        return out

    def score(self, batch: Batch, targets: np.ndarray) -> np.ndarray:
        step, hidden_BTD = self._run(batch)
        out = np.zeros(len(targets), np.float32)
        wanted = np.flatnonzero(targets >= 0)
        for part, hidden_RD in self._parts(hidden_BTD, step.rows[wanted]):
            some = wanted[part]
            ids = np.zeros(hidden_RD.shape[0], np.int32)
            ids[: len(some)] = targets[some]
            picked, sums = map(ops.convert_to_numpy, memory(self._scores, hidden_RD, _ints(ids)))
            out[some] = (picked - np.log(sums.astype(np.float64)))[: len(some)]
        return out

    def hidden(self, batch: Batch) -> np.ndarray:
        step, hidden_BTD = self._run(batch)
        rows = ops.convert_to_numpy(ops.cast(hidden_BTD, "float32")).reshape(-1, self.config.hidden_size)
        return rows[step.rows]

    def _parts(self, hidden_BTD: Tensor, rows: np.ndarray, at_least: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of hidden states, a few at a time: (where they stand in `rows`, [R, D], padded)."""
        for first in range(0, len(rows), _HEAD_ROWS):
            part = rows[first : first + _HEAD_ROWS]
            few = np.zeros(max(padded.bucket(len(part)), min(at_least, _HEAD_ROWS)), np.int32)
            few[: len(part)] = part
            yield slice(first, first + len(part)), memory(self._take, hidden_BTD, _ints(few))

    def _run(self, batch: Batch, at_least: tuple[int, int, int] = (1, 1, 1)) -> tuple[padded.Padded, Tensor]:
        """The padded step and the hidden states [B, T, D] after the final norm."""
        step = padded.pad(
            batch,
            self.page_size,
            rounded=lambda pages: padded.bucket(max(pages, at_least[2])),
            at_least=at_least[:2],
        )
        places = [tuple(map(_ints, place)) for place in zip(step.write, step.read, step.seen, strict=True)]
        kept, self._cache = self._cache, []
        try:
            hidden_BTD, self._cache = memory(self._hidden, kept, _ints(step.tokens), _ints(step.positions), places)
        finally:
            if not self._cache:  # a step that was broken off took the cache with it; whoever used it starts over
                self._cache = [self._empty(k.shape[0] // self.page_size) for k, _ in kept]
        return step, hidden_BTD

    # --- what is compiled ----------------------------------------------------------------------------------------

    def _hidden_of(
        self, kept: Kept, tokens_BT: Tensor, positions_BT: Tensor, places: Sequence[Place]
    ) -> tuple[Tensor, Kept]:
        """Hidden states [B, T, D], and the cache with the new tokens in it."""
        place = {layer: place for group, place in zip(self.groups, places, strict=True) for layer in group.layers}
        caches = [LayerCache(*kept[layer], *place[layer]) for layer in range(len(kept))]
        hidden_BTD, caches = self.decoder.hidden(tokens_BT, positions_BT, caches)
        return hidden_BTD, [(cache.k, cache.v) for cache in caches]

    def _likeliest_of(self, hidden_RD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits [R, V], the largest [R, k], their ids, and Σ exp(logit - largest) [R], NaN where one is not finite."""
        logits_RV = self.decoder.logits(hidden_RD)
        top_RK, ids_RK = ops.top_k(logits_RV, min(padded.TOP, self.config.vocab_size))
        sums_R = ops.sum(ops.exp(logits_RV - ops.max(logits_RV, -1, keepdims=True)), -1)
        return logits_RV, top_RK, ids_RK, _checked(logits_RV, sums_R)

    def _scores_of(self, hidden_RD: Tensor, ids_R: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of ids less the largest [R], and Σ exp(logit - largest) [R], NaN where one is not finite."""
        logits_RV = self.decoder.logits(hidden_RD)
        logits_RV = logits_RV - ops.max(logits_RV, -1, keepdims=True)
        sums_R = _checked(logits_RV, ops.sum(ops.exp(logits_RV), -1))
        return ops.take_along_axis(logits_RV, ids_R[:, None], axis=1)[:, 0], sums_R

    def _compiled(self, function: Callable, donate: bool = False) -> Callable:
        """A function as the backend runs it best. Python runs a compiled one only for a new shape, which is counted.

        donate: its first argument is not needed any more.
        """

        def counted(*arguments):
            self.compilations += 1
            return function(*arguments)

        match keras.backend.backend():
            case "jax":
                import jax

                variables = list(self.decoder.tensors().values())

                def pure(values, first, *rest):
                    with keras.StatelessScope(state_mapping=zip(variables, values)):
                        return counted(first, *rest)

                step = jax.jit(pure, donate_argnums=1 if donate else ())
                return lambda *arguments: step([v.value for v in variables], *arguments)
            case "tensorflow":
                import tensorflow as tf

                graphs = {}  # by shape: a tf.function of several shapes warns of them

                def step(*arguments):
                    key = tuple(tuple(array.shape) for array in tf.nest.flatten(arguments))
                    if key not in graphs:
                        graphs[key] = tf.function(counted).get_concrete_function(*arguments)
                    return graphs[key](*arguments)

                return step
            case "torch":
                import torch

                return torch.no_grad()(function)
            case backend:
                raise UsageError(f"gemkit generates with Keras on jax, torch and tensorflow, not on {backend}")


def memory(function: Callable, *arguments):
    """Calls a function whose want of memory is a user's error, whatever the backend calls it."""
    try:
        return function(*arguments)
    except Exception as error:
        kinds = ("MemoryError", "OutOfMemoryError", "ResourceExhaustedError")
        if type(error).__name__ in kinds or "RESOURCE_EXHAUSTED" in str(error):
            raise GemkitError(
                "memory is short for this model: choose a smaller one, a shorter context, or a narrower dtype"
            ) from None
        raise


def _rows(hidden_BTD: Tensor, rows_R: Tensor) -> Tensor:
    return ops.take(ops.reshape(hidden_BTD, (-1, hidden_BTD.shape[-1])), rows_R, axis=0)


def _checked(logits_RV: Tensor, sums_R: Tensor) -> Tensor:
    """The sums, NaN where a logit is minus infinity, which leaves no trace in a sum."""
    return ops.where(ops.isfinite(ops.min(logits_RV, -1)), sums_R, float("nan"))


def _ints(array: np.ndarray) -> Tensor:
    return ops.convert_to_tensor(array, dtype="int32")


def width(dtype: str) -> int:
    """Bytes of a number."""
    return 4 if dtype == "float32" else 2
