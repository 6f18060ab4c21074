"""Start of a new adapter: A random, B zero, so that the first step has the model's own outputs; NumPy, any framework.

Source: peft, ``LoraLayer.reset_lora_parameters`` (Kaiming uniform with a = √5, whose bound is 1 / √in).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.weights.lora import LoraConfig, LoraPart


def new_parts(
    config: LoraConfig, model: ModelConfig, seed: int, row_norms: Callable[[str], np.ndarray]
) -> dict[str, LoraPart]:
    """Return the parts of a new adapter by canonical weight name; each depends on the seed and its name alone.

    row_norms: returns the norms [out] of a matrix's rows by its name, where DoRA's magnitudes start.
    """
    parts = {}
    for name, (outputs, inputs) in config.weights(model).items():
        draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
        a = (draw.random((config.rank, inputs), np.float32) * 2 - 1) / np.float32(np.sqrt(inputs))
        magnitude = row_norms(name).astype(np.float32) if config.dora else None
        parts[name] = LoraPart(a, np.zeros((outputs, config.rank), np.float32), config.scale, magnitude)
    return parts


def named(name: str, part: LoraPart) -> dict[str, np.ndarray]:
    """Return a part's trained arrays: ``{name}.a``, ``.b`` and with DoRA ``.magnitude``, as the loops call them."""
    arrays = {f"{name}.a": part.a, f"{name}.b": part.b}
    return arrays if part.magnitude is None else {**arrays, f"{name}.magnitude": part.magnitude}


def trained_parts(start: dict[str, LoraPart], arrays: dict[str, np.ndarray]) -> dict[str, LoraPart]:
    """Return the parts with a loop's trained arrays in place of their first values; the inverse of `named`."""
    return {
        name: LoraPart(arrays[f"{name}.a"], arrays[f"{name}.b"], part.scale, arrays.get(f"{name}.magnitude"))
        for name, part in start.items()
    }
