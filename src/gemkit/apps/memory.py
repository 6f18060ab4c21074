"""What fits into memory: the published sizes by type, and one model with its context.

`gemkit show` asks the C++ core for the plan of a model that it has loaded. Here there may be no core and no model, so
the numbers come from the configuration alone; a test holds the two together.
"""

from __future__ import annotations

from typing import Any

from gemkit.arch.config import ModelConfig
from gemkit.arch.presets import PRESETS
from gemkit.weights.quant import BLOCKS, GGMLType

CONTEXT = 4096  # tokens that the table of models makes room for
ROOM = 200 << 20  # Python, its libraries and the activations
_STEP = 512  # tokens in one step of a long prompt

# Type of the matrices, and of the embedding, which as the output matrix should not go below 8 bits.
TYPES = {
    "bf16": (GGMLType.BF16, GGMLType.BF16),
    "Q8_0": (GGMLType.Q8_0, GGMLType.Q8_0),
    "Q4": (GGMLType.Q4_K, GGMLType.Q8_0),
}


def cache_bytes(config: ModelConfig, tokens: int) -> int:
    """The keys and values of one sequence in 16 bits: a sliding layer keeps its window and the step that runs."""
    one = 2 * 2 * config.num_key_value_heads * config.head_dim
    seen = (tokens if la.sliding_window is None else min(tokens, la.sliding_window + _STEP) for la in config.layers)
    return sum(one * count for count in seen)


def weight_bytes(config: ModelConfig, matrices: GGMLType, embedding: GGMLType) -> int:
    """Bytes of a model's weights in these types."""
    counts = config.parameter_counts()
    parts = ((counts.embedding, embedding), (counts.non_embedding, matrices))
    return int(sum(count * BLOCKS[kind].bytes / BLOCKS[kind].elements for count, kind in parts))


def models(free: int | None, bandwidth: float | None) -> list[dict[str, Any]]:
    """The published sizes, small ones first: bytes in each type with a context of `CONTEXT`, and whether they fit.

    bandwidth: in GB/s. A decoded token reads about all weights once, so its rate is about bandwidth / bytes.
    """
    rows, seen = [], []
    for preset in sorted(PRESETS.values(), key=lambda p: p.config.parameter_count()):
        if preset.config in seen:
            continue
        seen.append(preset.config)
        types = {}
        for name, kinds in TYPES.items():
            weights = weight_bytes(preset.config, *kinds)
            total = weights + cache_bytes(preset.config, CONTEXT) + ROOM
            types[name] = {
                "bytes": total,
                "fits": None if free is None else total <= free,
                "rate": None if bandwidth is None else bandwidth * 1e9 / weights,
            }
        rows.append({"name": preset.name, "parameters": preset.config.parameter_count(), "types": types})
    return rows


def fit(model: str, free: int | None, bandwidth: float | None) -> dict[str, Any]:
    """The memory that a model takes with its whole context, and the longest context that fits."""
    from gemkit.loading import find
    from gemkit.weights.files import open_checkpoint

    with open_checkpoint(find(model, offline=True)) as checkpoint:
        config, source = checkpoint.config, str(checkpoint.source)
        weights = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    longest = config.max_position_embeddings
    total = weights + cache_bytes(config, longest) + ROOM
    return {
        "source": source,
        "weights": weights,
        "ctx_size": longest,
        "cache": cache_bytes(config, longest),
        "total": total,
        "fits": None if free is None else total <= free,
        "longest": None if free is None else _longest(config, free - weights - ROOM),
        "rate": None if bandwidth is None else bandwidth * 1e9 / weights,
    }


def _longest(config: ModelConfig, room: int) -> int:
    """The longest context of which the cache fits in so many bytes; 0 if none does."""
    low, high = 0, config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cache_bytes(config, middle) <= room else (low, middle - 1)
    return low if room > 0 else 0
