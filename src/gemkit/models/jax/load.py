"""From a checkpoint to the decoder's parameters, one tensor at a time: memory holds the model and one tensor more."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from gemkit.arch.config import ModelConfig
from gemkit.arch.tensors import TensorSpec, manifest
from gemkit.errors import GemkitError, UsageError
from gemkit.models.jax.linear import Quantised, quantise
from gemkit.weights.checkpoint import Tensor
from gemkit.weights.quant import GGMLType

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
BITS = {"int8": 8, "int4": 4}  # of the matrices; activations are those of "auto"


def pick_dtype(name: str, config: ModelConfig, device: jax.Device) -> np.dtype:
    """The type to compute in: "auto" is bfloat16 on accelerators that have it, else float32.

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


def load_params(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: np.dtype = jnp.float32,
    device: jax.Device | jax.sharding.Sharding | None = None,
    bits: int | None = None,
) -> dict[str, Array | Quantised]:
    """The parameters by name; norms stay float32. weights: as in a `Checkpoint`. device: JAX's first if None.

    bits: 8 or 4, of the matrices; those of the vocabulary have 8 at least. None: all are of dtype.
    Raises GemkitError that names a tensor that is missing, has another shape, or cannot have so few bits.
    """
    params = {}
    for name, spec in manifest(config).items():
        tensor = weights.get(name)
        if tensor is None:
            raise GemkitError(f"the tensor {name} is missing: get the whole model")
        if tuple(tensor.shape) != spec.shape:
            raise GemkitError(f"the tensor {name} has shape {list(tensor.shape)}, not {list(spec.shape)}")
        if bits is not None and spec.quantise:
            try:
                value = _quantised(to_numpy(tensor), bits_of(spec, bits), device)
            except ValueError as error:
                raise GemkitError(f"{name}: {error}; choose another dtype") from None
        else:
            value = jax.device_put(to_numpy(tensor).astype(_kind(spec, dtype), copy=False), device)
        params[name] = jax.block_until_ready(value)
    return params


def bits_of(spec: TensorSpec, bits: int) -> int:
    """Those of a tensor in a model of so many bits: each row of the vocabulary's matrices is a token of its own."""
    return 8 if spec.letters[0] == "V" else bits


_PIECE = 1 << 23  # numbers that are widened at a time


def _quantised(values: np.ndarray, bits: int, device: jax.Device | jax.sharding.Sharding | None) -> Quantised:
    rows = max(1, _PIECE // values.shape[1])
    pieces = [values[at : at + rows] for at in range(0, len(values), rows)]
    found = [jax.block_until_ready(_quantise(jax.device_put(piece, device), bits)) for piece in pieces]
    return Quantised(*(jnp.concatenate(parts) for parts in zip(*found)))


_quantise = jax.jit(quantise, static_argnums=1)


def abstract_params(
    config: ModelConfig, dtype: np.dtype = jnp.float32, bits: int | None = None
) -> dict[str, jax.ShapeDtypeStruct | Quantised]:
    """What `load_params` would return, without memory: for ``jax.eval_shape``, lowering, and exact counts."""
    params = {}
    for name, spec in manifest(config).items():
        params[name] = jax.ShapeDtypeStruct(spec.shape, _kind(spec, dtype))
        if bits is not None and spec.quantise:
            params[name] = jax.eval_shape(partial(quantise, bits=bits_of(spec, bits)), params[name])
    return params


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's values in memory of their own: bfloat16 bit by bit, everything else by way of float32."""
    if tensor.type == GGMLType.BF16 and not tensor.add_one:
        return np.array(tensor.data).view(ml_dtypes.bfloat16).reshape(tensor.shape)
    return np.ascontiguousarray(tensor.to_float32())


def _kind(spec: TensorSpec, dtype: np.dtype) -> np.dtype:
    return jnp.promote_types(dtype, spec.dtype_floor) if spec.dtype_floor == "float32" else np.dtype(dtype)
