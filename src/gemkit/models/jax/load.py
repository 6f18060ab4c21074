"""From a checkpoint to the decoder's parameters, one tensor at a time: memory holds the model and one tensor more."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from gemkit.arch.config import ModelConfig
from gemkit.arch.tensors import TensorSpec, manifest
from gemkit.errors import GemkitError, UsageError
from gemkit.weights.checkpoint import Tensor
from gemkit.weights.quant import GGMLType

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def pick_dtype(name: str, config: ModelConfig, device: jax.Device) -> np.dtype:
    """The type to compute in: "auto" is bfloat16 on accelerators that have it, else float32.

    Raises UsageError for float16 in Gemma 2 and 3, whose activations leave its range.
    """
    if name == "auto":
        return np.dtype(jnp.bfloat16 if _has_bfloat16(device) else jnp.float32)
    if name not in DTYPES:
        raise UsageError(f"dtype is {name!r}; choose from auto, {', '.join(DTYPES)}")
    if name == "float16" and config.post_norms:
        raise UsageError("float16 overflows in Gemma 2 and 3: choose bfloat16, or float32 where there is none")
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
) -> dict[str, Array]:
    """The parameters by name; norms stay float32. weights: as in a `Checkpoint`. device: JAX's first if None.

    Raises GemkitError that names a tensor that is missing or has another shape.
    """
    params = {}
    for name, spec in manifest(config).items():
        tensor = weights.get(name)
        if tensor is None:
            raise GemkitError(f"the tensor {name} is missing: get the whole model")
        if tuple(tensor.shape) != spec.shape:
            raise GemkitError(f"the tensor {name} has shape {list(tensor.shape)}, not {list(spec.shape)}")
        value = to_numpy(tensor).astype(_kind(spec, dtype), copy=False)
        params[name] = jax.device_put(value, device).block_until_ready()
    return params


def abstract_params(config: ModelConfig, dtype: np.dtype = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """What `load_params` would return, without memory: for ``jax.eval_shape``, lowering, and exact counts."""
    return {name: jax.ShapeDtypeStruct(spec.shape, _kind(spec, dtype)) for name, spec in manifest(config).items()}


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's values in memory of their own: bfloat16 bit by bit, everything else by way of float32."""
    if tensor.type == GGMLType.BF16 and not tensor.add_one:
        return np.array(tensor.data).view(ml_dtypes.bfloat16).reshape(tensor.shape)
    return np.ascontiguousarray(tensor.to_float32())


def _kind(spec: TensorSpec, dtype: np.dtype) -> np.dtype:
    return jnp.promote_types(dtype, spec.dtype_floor) if spec.dtype_floor == "float32" else np.dtype(dtype)
