"""From a checkpoint to a `Decoder`, one tensor at a time: memory holds the model and one tensor more."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from gemkit.arch.config import ModelConfig
from gemkit.arch.tensors import manifest
from gemkit.errors import GemkitError, UsageError
from gemkit.models.torch.decoder import Decoder
from gemkit.weights.checkpoint import Tensor
from gemkit.weights.quant import GGMLType

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The type to compute in: "auto" is bfloat16 on accelerators that have it, else float32.

    Raises UsageError for float16 in Gemma 2 and 3, whose activations leave its range.
    """
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if name not in DTYPES:
        raise UsageError(f"dtype is {name!r}; choose from auto, {', '.join(DTYPES)}")
    if name == "float16" and config.post_norms:
        raise UsageError("float16 overflows in Gemma 2 and 3: choose bfloat16, or float32 where there is none")
    return DTYPES[name]


def load_decoder(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder with these weights; norms stay float32. weights: as in a `Checkpoint`.

    Raises GemkitError that names a tensor that is missing or has another shape.
    """
    specs = manifest(config)
    with torch.device("meta"):
        decoder = Decoder(config)
    parameters = dict(decoder.named_parameters())
    assert parameters.keys() == specs.keys()
    for name, spec in specs.items():
        tensor = weights.get(name)
        if tensor is None:
            raise GemkitError(f"the tensor {name} is missing: get the whole model")
        if tuple(tensor.shape) != spec.shape:
            raise GemkitError(f"the tensor {name} has shape {list(tensor.shape)}, not {list(spec.shape)}")
        kind = torch.float32 if spec.dtype_floor == "float32" else dtype
        place, _, leaf = name.rpartition(".")
        value = to_torch(tensor).to(device=device, dtype=kind)
        setattr(decoder.get_submodule(place), leaf, torch.nn.Parameter(value, requires_grad=False))
    return decoder.eval()


def to_torch(tensor: Tensor) -> torch.Tensor:
    """A tensor's values: bfloat16 bit by bit, everything else by way of float32."""
    if tensor.type == GGMLType.BF16 and not tensor.add_one:
        return torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16).reshape(tensor.shape)
    return torch.from_numpy(np.ascontiguousarray(tensor.to_float32()))
