"""Parts of adapters as training would leave them: random, and large enough to change every logit."""

from collections.abc import Mapping

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.train.adapter import new_parts
from gemkit.weights.lora import LoraConfig, LoraPart, row_lengths


def trained_parts(
    config: LoraConfig, model: ModelConfig, params: Mapping[str, np.ndarray], seed: int = 0
) -> dict[str, LoraPart]:
    """Parts by weight name; params: the model's, whose rows DoRA's magnitudes begin with."""
    random = np.random.default_rng(seed)
    parts = {}
    for name, part in new_parts(config, model, seed, lambda name: row_lengths(params[name])).items():
        b = random.standard_normal(part.b.shape).astype(np.float32) / 4
        m = part.magnitude
        m = None if m is None else m * random.uniform(0.6, 1.4, len(m)).astype(np.float32)
        parts[name] = LoraPart(part.a, b, part.scale, m)
    return parts
