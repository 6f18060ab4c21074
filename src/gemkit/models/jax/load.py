"""From a checkpoint to a `Decoder`, one tensor at a time: memory holds the model and one tensor more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.arch.tensors import TensorSpec, manifest
from gemkit.errors import GemkitError, UsageError
from gemkit.models.frameworks.quantise import PIECE
from gemkit.models.frameworks.runner import check_memory
from gemkit.models.jax.decoder import Decoder
from gemkit.models.jax.linear import LowRank, Quantised, quantise
from gemkit.models.jax.runner import JaxRunner
from gemkit.weights.checkpoint import Tensor
from gemkit.weights.lora import LoraAdapter, LoraPart
from gemkit.weights.quant import GGMLType

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
BITS = {"int8": 8, "int4": 4}  # of the matrices; activations are those of "auto"


def pick_dtype(name: str, config: ModelConfig, device: jax.Device) -> np.dtype:
    """Return the type to compute in: "auto" is bfloat16 on accelerators that have it, else float32.

    Raises UsageError for float16 in Gemma 2 and 3, whose activations leave its range, and for bfloat16 on a GPU that
    has none.
    """
    if name == "auto" or name in BITS:
        return np.dtype(jnp.bfloat16 if _has_bfloat16(device) else jnp.float32)
    if name not in DTYPES:
        raise UsageError(f"dtype is {name!r}; choose from auto, {', '.join((*DTYPES, *BITS))}")
    if name == "float16" and config.post_norms:
        raise UsageError("float16 overflows in Gemma 2 and 3: choose bfloat16, or float32 where there is none")
    if name == "bfloat16" and device.platform == "gpu" and not _has_bfloat16(device):
        raise UsageError("this GPU has no bfloat16: choose auto or float32")
    return np.dtype(DTYPES[name])


def _has_bfloat16(device: jax.Device) -> bool:
    if device.platform == "gpu":
        # NVIDIA says "8.0", AMD "gfx90a"
        major = str(getattr(device, "compute_capability", "")).split(".")[0]
        return not major.isdigit() or int(major) >= 8
    return device.platform != "cpu"


def load_runner(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    device: str | None = None,
    dtype: str = "auto",
    threads: int | None = None,
    max_tokens_per_step: int = 512,
    adapter: LoraAdapter | None = None,
) -> JaxRunner:
    """Load a runner on the CPU, a GPU or a TPU.

    weights: as in a `Checkpoint`. device: "cpu", "cuda", "tpu", "cuda:1", …; None takes JAX's first. dtype: see
    `pick_dtype`; "int8" and "int4" are of the matrices alone. threads: ignored, JAX takes every core.
    adapter: for all requests, unmerged.
    Raises UsageError for a device or type that cannot be had, GemkitError if memory is short.
    """
    place = pick_device(device)
    activations = pick_dtype(dtype, config, place)
    decoder = check_memory(load_decoder, config, weights, activations, place, BITS.get(dtype))
    if adapter is not None:
        decoder = check_memory(lambda: _frozen(adapt(decoder, adapter.parts)))
    runner = JaxRunner(decoder, max_tokens_per_step=max_tokens_per_step)
    runner.adapter_count = int(adapter is not None)
    return runner


def pick_device(name: str | None) -> jax.Device:
    """Return JAX's first device, or the one of that name. Raises UsageError if there is none."""
    if name is None:
        return jax.devices()[0]
    platform, _, index = name.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, ValueError, IndexError):
        raise UsageError(f"JAX has no device {name!r} here; leave it out, or choose cpu") from None


def load_decoder(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: np.dtype = jnp.float32,
    device: jax.Device | jax.sharding.Sharding | None = None,
    bits: int | None = None,
    trainable: Callable[[TensorSpec], bool] | None = None,
) -> Decoder:
    """Load a decoder; norms stay float32. weights: as in a `Checkpoint`. dtype: of matrices and activations.

    device: JAX's first if None. bits: 8 or 4, of the matrices; those of the vocabulary have 8 at least. None: all are
    of dtype. trainable: selects parameters that are to take gradients; these are float32.
    Raises GemkitError that names a tensor that is missing, has another shape, or cannot have so few bits.
    """
    params = {}
    for name, spec in manifest(config).items():
        tensor = weights.get(name)
        if tensor is None:
            raise GemkitError(f"the tensor {name} is missing: get the whole model")
        if tuple(tensor.shape) != spec.shape:
            raise GemkitError(f"the tensor {name} has shape {list(tensor.shape)}, not {list(spec.shape)}")
        trained = trainable is not None and trainable(spec)
        if bits is not None and spec.quantise and not trained:
            try:
                value = _quantised(to_numpy(tensor), bits_of(spec, bits), device)
            except ValueError as error:
                raise GemkitError(f"{name}: {error}; choose another dtype") from None
        else:
            kind = np.dtype(np.float32) if trained else _kind(spec, dtype)
            value = jax.device_put(to_numpy(tensor).astype(kind, copy=False), device)
        params[name] = jax.block_until_ready(value)
    return Decoder(config, params, np.dtype(dtype))


def adapt(decoder: Decoder, parts: Mapping[str, LoraPart], dropout: float = 0.0) -> Decoder:
    """Return a decoder with an adapter on its matrices."""
    place, adapted = decoder.params["model.norm.weight"].sharding, {}
    for name, part in parts.items():
        arrays = [None if x is None else jax.device_put(x, place) for x in (part.a, part.b, part.magnitude)]
        adapted[name] = LowRank(decoder.params[name], *arrays[:2], part.scale, arrays[2], dropout)
    return replace(decoder, params={**decoder.params, **adapted})


def _frozen(decoder: Decoder) -> Decoder:
    """Return a decoder whose adapter's gains are computed once."""
    gains = jax.jit(LowRank.gain)
    adapted = {
        name: replace(value, magnitude=None, fixed_gain=gains(value))
        for name, value in decoder.params.items()
        if isinstance(value, LowRank) and value.magnitude is not None
    }
    return replace(decoder, params={**decoder.params, **adapted})


def bits_of(spec: TensorSpec, bits: int) -> int:
    """Return 8 for the vocabulary's matrices, each row of which is a token of its own, else bits."""
    return 8 if spec.letters[0] == "V" else bits


def _quantised(values: np.ndarray, bits: int, device: jax.Device | jax.sharding.Sharding | None) -> Quantised:
    rows = max(1, PIECE // values.shape[1])
    pieces = [values[at : at + rows] for at in range(0, len(values), rows)]
    found = [jax.block_until_ready(_quantise(jax.device_put(piece, device), bits)) for piece in pieces]
    return Quantised(*(jnp.concatenate(parts) for parts in zip(*found)))


_quantise = jax.jit(quantise, static_argnums=1)


def abstract_decoder(config: ModelConfig, dtype: np.dtype = jnp.float32, bits: int | None = None) -> Decoder:
    """Return a decoder of shapes without memory, for ``jax.eval_shape``, lowering, and exact counts."""
    params = {}
    for name, spec in manifest(config).items():
        params[name] = jax.ShapeDtypeStruct(spec.shape, _kind(spec, dtype))
        if bits is not None and spec.quantise:
            params[name] = jax.eval_shape(partial(quantise, bits=bits_of(spec, bits)), params[name])
    return Decoder(config, params, np.dtype(dtype))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor's values in memory of their own: bfloat16 bit by bit, everything else by way of float32."""
    if tensor.type == GGMLType.BF16 and not tensor.add_one:
        return np.array(tensor.data).view(ml_dtypes.bfloat16).reshape(tensor.shape)
    return np.ascontiguousarray(tensor.to_float32())


def _kind(spec: TensorSpec, dtype: np.dtype) -> np.dtype:
    return jnp.promote_types(dtype, spec.dtype_floor) if spec.dtype_floor == "float32" else np.dtype(dtype)
