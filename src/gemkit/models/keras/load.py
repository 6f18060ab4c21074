"""From a checkpoint to a `Decoder`, one tensor at a time: memory holds the model and one tensor more."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import keras

from gemkit.arch.config import ModelConfig
from gemkit.arch.tensors import TensorSpec, manifest
from gemkit.errors import GemkitError, UsageError
from gemkit.models.frameworks.runner import check_memory
from gemkit.models.keras.decoder import Decoder
from gemkit.models.keras.runner import KerasRunner, default_device
from gemkit.weights.checkpoint import Tensor
from gemkit.weights.lora import LoraAdapter, LoraPart

POLICIES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")


def check_dtype(name: str, config: ModelConfig) -> str:
    """Return the dtype policy's name.

    Raises UsageError for one that is unknown, and for float16 in Gemma 2 and 3, whose activations leave its range.
    """
    if name not in POLICIES:
        raise UsageError(f"dtype is {name!r}; choose from {', '.join(POLICIES)}")
    if name.endswith("float16") and not name.endswith("bfloat16") and config.post_norms:
        raise UsageError("float16 overflows in Gemma 2 and 3: choose bfloat16, or float32 where there is none")
    return name


def check_device(device: str | None) -> None:
    """Raise UsageError for another device than the one where the backend allocates arrays."""
    if device not in (None, place := default_device()):
        raise UsageError(
            f"device is {device!r}; Keras runs on {place} here: set CUDA_VISIBLE_DEVICES or JAX_PLATFORMS instead"
        )


def load_runner(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    device: str | None = None,
    dtype: str = "auto",
    threads: int | None = None,
    max_tokens_per_step: int = 512,
    adapter: LoraAdapter | None = None,
) -> KerasRunner:
    """Load a runner on the backend that ``KERAS_BACKEND`` names.

    weights: as in a `Checkpoint`. dtype: a dtype policy of Keras, "auto" for the one that it is set to. device: Keras
    cannot choose; None or the place where the backend puts arrays anyway. threads: ignored, the backend chooses.
    adapter: for all requests, unmerged.
    Raises UsageError for a device or dtype that cannot be had, GemkitError if memory is short.
    """
    check_device(device)
    policy = keras.config.dtype_policy().name if dtype == "auto" else dtype
    decoder = check_memory(load_decoder, config, weights, policy)
    if adapter is not None:
        check_memory(adapt, decoder, adapter.parts)
    runner = KerasRunner(decoder, max_tokens_per_step=max_tokens_per_step)
    runner.adapter_count = int(adapter is not None)
    return runner


def adapt(decoder: Decoder, parts: Mapping[str, LoraPart], dropout: float = 0.0) -> Decoder:
    """Put an adapter on a decoder; its own parameters are frozen, the adapter's take gradients."""
    for variable in decoder.tensors().values():
        variable.trainable = False
    for name, part in parts.items():
        weight = decoder.adapt(name, part.rank, part.scale, part.magnitude is not None, dropout)
        for variable, value in ((weight.a, part.a), (weight.b, part.b), (weight.magnitude, part.magnitude)):
            if variable is not None:
                variable.assign(value)
    return decoder


def load_decoder(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: str = "float32",
    trainable: Callable[[TensorSpec], bool] | None = None,
) -> Decoder:
    """Load a decoder; norms stay float32. weights: as in a `Checkpoint`. dtype: a dtype policy.

    trainable: selects parameters that take gradients, all if None; "mixed_bfloat16" holds them in float32.

    Raises GemkitError that names a tensor that is missing or has another shape.
    """
    specs = manifest(config)
    for name, spec in specs.items():
        if name not in weights:
            raise GemkitError(f"the tensor {name} is missing: get the whole model")
        if tuple(weights[name].shape) != spec.shape:
            raise GemkitError(f"the tensor {name} has shape {list(weights[name].shape)}, not {list(spec.shape)}")
    decoder = Decoder(config, initializer_range=0.0, dtype=check_dtype(dtype, config))
    parameters = decoder.tensors()
    assert parameters.keys() == specs.keys()
    for name, parameter in parameters.items():
        parameter.assign(weights[name].to_float32())
        parameter.trainable = trainable is None or trainable(specs[name])
    return decoder
