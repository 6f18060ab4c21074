"""From a checkpoint to a `Decoder`, one tensor at a time: memory holds the model and one tensor more."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from gemkit.arch.config import ModelConfig
from gemkit.arch.tensors import TensorSpec, manifest
from gemkit.errors import GemkitError, UsageError
from gemkit.models.frameworks.runner import check_memory
from gemkit.models.torch.decoder import Decoder
from gemkit.models.torch.linear import LowRank, Quantised, quantise
from gemkit.models.torch.runner import TorchRunner
from gemkit.weights.checkpoint import Tensor
from gemkit.weights.lora import LoraAdapter, LoraPart
from gemkit.weights.quant import GGMLType

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {"int8": 8, "int4": 4}  # of the matrices; activations are those of "auto"


def pick_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the type to compute in: "auto" is bfloat16 on accelerators that have it, else float32.

    Raises UsageError for float16 in Gemma 2 and 3, whose activations leave its range, and for bfloat16 on a GPU that
    only emulates it.
    """
    if name == "auto" or name in BITS:
        return torch.bfloat16 if device.type == "cuda" and _has_bfloat16() else torch.float32
    if name not in DTYPES:
        raise UsageError(f"dtype is {name!r}; choose from auto, {', '.join((*DTYPES, *BITS))}")
    if name == "float16" and config.post_norms:
        raise UsageError("float16 overflows in Gemma 2 and 3: choose bfloat16, or float32 where there is none")
    if name == "bfloat16" and device.type == "cuda" and not _has_bfloat16():
        raise UsageError("this GPU has no bfloat16: choose auto or float32")
    return DTYPES[name]


def _has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def load_runner(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    device: str | None = None,
    dtype: str = "auto",
    compile: bool | None = None,
    threads: int | None = None,
    max_tokens_per_step: int = 512,
    adapter: LoraAdapter | None = None,
) -> TorchRunner:
    """Load a runner on the CPU or an accelerator.

    weights: as in a `Checkpoint`. device: "cpu", "cuda", "cuda:1", …; None takes CUDA where there is one. dtype: see
    `pick_dtype`; "int8" and "int4" are of the matrices alone. compile, threads: as in `TorchRunner`.
    adapter: for all requests, unmerged.
    Raises UsageError for a device or type that cannot be had, GemkitError if memory is short.
    """
    place = pick_device(device)
    activations = pick_dtype(dtype, config, place)
    decoder = check_memory(load_decoder, config, weights, activations, place, BITS.get(dtype))
    if adapter is not None:
        for module in check_memory(adapt, decoder, adapter.parts).modules():
            if isinstance(module, LowRank):
                module.freeze()
    runner = TorchRunner(decoder, compile=compile, threads=threads, max_tokens_per_step=max_tokens_per_step)
    runner.adapter_count = int(adapter is not None)
    return runner


def pick_device(name: str | None) -> torch.device:
    """Return CUDA where there is one, or the device of that name. Raises UsageError if there is none."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"torch has no device {name!r} here; leave it out, or choose cpu") from None
    return device


def load_decoder(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bits: int | None = None,
    trainable: Callable[[TensorSpec], bool] | None = None,
) -> Decoder:
    """Load a decoder; norms stay float32. weights: as in a `Checkpoint`. dtype: of matrices and activations.

    bits: 8 or 4, of the matrices; those of the vocabulary have 8 at least. None: all are of dtype.
    trainable: selects parameters that take gradients; these are float32.
    Raises GemkitError that names a tensor that is missing, has another shape, or cannot have so few bits.
    """
    specs = manifest(config)
    decoder = empty_decoder(config)
    for name, spec in specs.items():
        tensor = weights.get(name)
        if tensor is None:
            raise GemkitError(f"the tensor {name} is missing: get the whole model")
        if tuple(tensor.shape) != spec.shape:
            raise GemkitError(f"the tensor {name} has shape {list(tensor.shape)}, not {list(spec.shape)}")
        value = to_torch(tensor)
        trained = trainable is not None and trainable(spec)
        if bits is not None and spec.quantise and not trained:
            try:
                put(decoder, name, quantise(value.to(device), bits_of(spec, bits)))
            except ValueError as error:
                raise GemkitError(f"{name}: {error}; choose another dtype") from None
        else:
            kind = torch.float32 if trained or spec.dtype_floor == "float32" else dtype
            put(decoder, name, value.to(device=device, dtype=kind))
            decoder.get_parameter(name).requires_grad_(trained)
    embedding = decoder.model.embed_tokens
    if not isinstance(embedding.weight, torch.Tensor) or embedding.weight.dtype != dtype:
        embedding.dtype = dtype
    return decoder.eval()


def empty_decoder(config: ModelConfig) -> Decoder:
    """Return a decoder without memory, for `put` to fill."""
    with torch.device("meta"):
        decoder = Decoder(config)
    assert dict(decoder.named_parameters()).keys() == manifest(config).keys()
    return decoder


def put(decoder: Decoder, name: str, value: torch.Tensor | Quantised | LowRank) -> None:
    """Set a parameter."""
    place, _, leaf = name.rpartition(".")
    module = decoder.get_submodule(place)
    delattr(module, leaf)  # a parameter cannot become a module
    setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False) if isinstance(value, torch.Tensor) else value)


def adapt(decoder: Decoder, parts: Mapping[str, LoraPart], dropout: float = 0.0) -> Decoder:
    """Put an adapter on a decoder's matrices, which are then frozen; its own arrays take gradients."""
    device = decoder.model.norm.weight.device
    for name, part in parts.items():
        weight = decoder.get_submodule(name.rpartition(".")[0]).weight
        base = weight.detach() if isinstance(weight, torch.Tensor) else weight
        arrays = [None if x is None else torch.tensor(x, device=device) for x in (part.a, part.b, part.magnitude)]
        put(decoder, name, LowRank(base, *arrays[:2], part.scale, arrays[2], dropout))
    return decoder


def bits_of(spec: TensorSpec, bits: int) -> int:
    """Return 8 for the vocabulary's matrices, each row of which is a token of its own, else bits."""
    return 8 if spec.letters[0] == "V" else bits


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Return a tensor's values: bfloat16 bit by bit, everything else by way of float32."""
    if tensor.type == GGMLType.BF16 and not tensor.add_one:
        return torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16).reshape(tensor.shape)
    return torch.from_numpy(np.ascontiguousarray(tensor.to_float32()))
