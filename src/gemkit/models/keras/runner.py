"""The engine's `Runner` on Keras: a cache of pages, and few shapes, which JAX and TensorFlow compile.

Letters: B sequences, T new tokens, R rows of hidden states, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import keras
import numpy as np
from keras import KerasTensor as Tensor
from keras import ops

from gemkit.arch.config import ModelConfig
from gemkit.errors import UsageError
from gemkit.host import usable_cpus
from gemkit.models.frameworks.batch import PaddedBatch
from gemkit.models.frameworks.choice import TOP
from gemkit.models.frameworks.runner import FrameworkRunner
from gemkit.models.keras.attention import LayerCache, Where

Caches = list[tuple[Tensor, Tensor]]  # k and v [slots, K, H] of each layer
Slots = tuple[np.ndarray, np.ndarray, np.ndarray]  # write [B, T], read [B, S], positions [B, S] of a page group


class Cached(Protocol):
    """The part of a decoder that runs with a cache."""

    config: ModelConfig
    compute_dtype: str
    dtype_policy: keras.DTypePolicy
    weights: list[keras.Variable]

    def hidden(self, tokens_BT: Tensor, where: Where, caches: Sequence[LayerCache]) -> tuple[Tensor, list]: ...

    def logits(self, x_BTD: Tensor) -> Tensor: ...

    def tensors(self) -> dict[str, keras.Variable]: ...


class KerasRunner(FrameworkRunner):
    """Run a decoder with Keras, on the backend that ``KERAS_BACKEND`` names and as many threads as that takes.

    compilations: how many graphs were made: one per function and shape; 0 on PyTorch, which runs eagerly.
    """

    first_pages = 1  # `Decoder.generate` reserves all that it needs

    def __init__(self, decoder: Cached, *, max_tokens_per_step: int = 512) -> None:
        self.compilations = 0
        name, size = decoder.dtype_policy.name, _element_size(decoder.compute_dtype)
        path = f"keras {keras.backend.backend()} {default_device()}"
        super().__init__(decoder, name, size, path, usable_cpus(), max_tokens_per_step)
        self._run_hidden = self._compiled(self._hidden_of, donate=True)
        self._run_take = self._compiled(_rows)
        self._run_top = {True: self._compiled(self._argmax_of), False: self._compiled(self._top_of)}
        self._run_logprobs = self._compiled(self._logprobs_of)

    def _weight_sizes(self) -> dict[str, int]:
        tensors = self.decoder.tensors().items()
        return {name: math.prod(tensor.shape) * _element_size(tensor.dtype) for name, tensor in tensors}

    def _allocate(self, pages: int) -> tuple[Tensor, Tensor]:
        shape = (pages * self.page_size, self.config.num_key_value_heads, self.config.head_dim)
        return ops.zeros(shape, self.decoder.compute_dtype), ops.zeros(shape, self.decoder.compute_dtype)

    def _grown(self, cache: tuple[Tensor, Tensor], pages: int) -> tuple[Tensor, Tensor]:
        more = self._allocate(pages - cache[0].shape[0] // self.page_size)
        return tuple(ops.concatenate(pair) for pair in zip(cache, more))

    def _hidden(self, step: PaddedBatch) -> Tensor:
        slots = [tuple(map(_ints, slots)) for slots in zip(step.write, step.read, step.read_positions, strict=True)]
        kv, self.caches = self.caches, []
        try:
            hidden_BTD, self.caches = self._run_hidden(kv, _ints(step.tokens), _ints(step.positions), slots)
        finally:
            if not self.caches:  # a failed step has donated them; their sequences start over
                self.caches = [self._allocate(k.shape[0] // self.page_size) for k, _ in kv]
        return hidden_BTD

    def _take(self, hidden_BTD: Tensor, rows: np.ndarray) -> Tensor:
        return self._run_take(hidden_BTD, _ints(rows))

    def _top(self, hidden_RD: Tensor, argmax: bool) -> tuple[Tensor, Tensor]:
        return self._run_top[argmax](hidden_RD)

    def _logprobs(self, hidden_RD: Tensor, ids_R: np.ndarray) -> np.ndarray:
        picked, sums = map(self._numpy, self._run_logprobs(hidden_RD, _ints(ids_R)))
        return picked - np.log(sums.astype(np.float64))

    def _numpy(self, array: Tensor) -> np.ndarray:
        return ops.convert_to_numpy(ops.cast(array, "float32"))

    # --- what is compiled ----------------------------------------------------------------------------------------

    def _hidden_of(
        self, kv: Caches, tokens_BT: Tensor, positions_BT: Tensor, slots: Sequence[Slots]
    ) -> tuple[Tensor, Caches]:
        """Return hidden states [B, T, D], and the caches with the new tokens in them."""
        of_layer = {layer: slot for group, slot in zip(self.groups, slots, strict=True) for layer in group.layers}
        caches = [LayerCache(*kv[layer], *of_layer[layer]) for layer in range(len(kv))]
        hidden_BTD, caches = self.decoder.hidden(tokens_BT, Where(positions_BT), caches)
        return hidden_BTD, [(cache.k, cache.v) for cache in caches]

    def _top_of(self, hidden_RD: Tensor, count: int = TOP) -> tuple[Tensor, Tensor]:
        """Return logits [R, V] and packed rows; see `gemkit.models.frameworks.choice`."""
        logits_RV = self.decoder.logits(hidden_RD)
        top_RK, ids_RK = ops.top_k(logits_RV, min(count, self.config.vocab_size))
        sums_R = ops.sum(ops.exp(logits_RV - ops.max(logits_RV, -1, keepdims=True)), -1)
        packed = [top_RK, ops.cast(ids_RK, "float32"), _checked(logits_RV, sums_R)[:, None]]
        return logits_RV, ops.concatenate(packed, -1)

    def _argmax_of(self, hidden_RD: Tensor) -> tuple[Tensor, Tensor]:
        return self._top_of(hidden_RD, 1)

    def _logprobs_of(self, hidden_RD: Tensor, ids_R: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of ids less the largest [R], and Σ exp(logit - largest) [R], NaN if one is not finite."""
        logits_RV = self.decoder.logits(hidden_RD)
        logits_RV = logits_RV - ops.max(logits_RV, -1, keepdims=True)
        sums_R = _checked(logits_RV, ops.sum(ops.exp(logits_RV), -1))
        return ops.take_along_axis(logits_RV, ids_R[:, None], axis=1)[:, 0], sums_R

    def _compiled(self, function: Callable, donate: bool = False) -> Callable:
        """Compile a function as the backend does. Python runs a compiled one only for a new shape, which is counted.

        donate: its first argument may be overwritten.
        """

        def counted(*arguments):
            self.compilations += 1
            return function(*arguments)

        match keras.backend.backend():
            case "jax":
                import jax

                variables = list(self.decoder.weights)

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


def default_device() -> str:
    """Return where the backend allocates arrays: "cpu", "gpu", "cuda" or "tpu"."""
    match keras.backend.backend():
        case "jax":
            import jax

            return jax.devices()[0].platform
        case "torch":
            from keras.src.backend.torch.core import get_device

            return get_device().partition(":")[0]
        case _:
            return "gpu" if keras.distribution.list_devices("gpu") else "cpu"


def _rows(hidden_BTD: Tensor, rows_R: Tensor) -> Tensor:
    return ops.take(ops.reshape(hidden_BTD, (-1, hidden_BTD.shape[-1])), rows_R, axis=0)


def _checked(logits_RV: Tensor, sums_R: Tensor) -> Tensor:
    """Return the sums, NaN where a logit is minus infinity, which leaves no trace in a sum."""
    return ops.where(ops.isfinite(ops.min(logits_RV, -1)), sums_R, float("nan"))


def _ints(array: np.ndarray) -> Tensor:
    return ops.convert_to_tensor(array, dtype="int32")


def _element_size(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
