"""Memory needs: of the published sizes by type, and of one model with its context.

`plan`, which `gemkit show` prints, queries the core about a loaded model. The others need neither core nor model:
their figures come from the configuration alone; a test compares the two.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemkit.arch.config import ModelConfig
from gemkit.arch.presets import PRESETS
from gemkit.weights.quant import BLOCKS, GGMLType

if TYPE_CHECKING:
    from gemkit.api.model import Model

CONTEXT = 4096  # context of the table of models, in tokens
ROOM = 200 << 20  # Python, its libraries, the vocabulary and the activations
_PROGRAM = 100 << 20  # the first three, where the system does not say
_STEP = 512  # tokens in one step of a long prompt

# Type of the matrices, and of the embedding, which as the output matrix should not go below 8 bits.
TYPES = {
    "bf16": (GGMLType.BF16, GGMLType.BF16),
    "Q8_0": (GGMLType.Q8_0, GGMLType.Q8_0),
    "Q4": (GGMLType.Q4_K, GGMLType.Q8_0),
}


def plan(model: Model, loading: int) -> dict[str, Any]:
    """Return bytes for one sequence as long as the context, in the parts that a process holds at once.

    loading: the peak of this process so far. The first load of a model also reads its file.
    program: Python, its libraries and the vocabulary, as they are now. cache: a sliding layer keeps only the pages that
    its window touches. Backends other than the native one report only their weights and caches.
    """
    runner, allocator, ctx_size = model.engine.runner, model.engine.allocator, model.ctx_size
    cache = []
    for number, group in enumerate(runner.groups):
        pages = allocator.peak(number, ctx_size, runner.max_tokens_per_step)
        cache.append(
            {
                "window": group.window,
                "layers": len(group.layers),
                "pages": pages,
                "page_size": runner.page_size,
                "bytes": pages * runner.page_bytes(number),
            }
        )
    info, activations = runner.info, runner.activation_bytes(ctx_size)
    known = activations is not None
    parts = {
        "program": _program(info.private_weight_bytes) if known else 0,
        "weights": info.weight_bytes,
        "screen": info.screen_bytes,
        "activations": activations or 0,
    }
    running = sum(parts.values()) + sum(group["bytes"] for group in cache)
    loading = loading if known else 0
    return parts | {
        "ctx_size": ctx_size,
        "cache": cache,
        "running": running,
        "loading": loading,
        "total": max(running, loading),
    }


def _program(weights: int) -> int:
    """Return this process's memory without its weights: these bytes, and the mapped part of packed files."""
    try:
        smaps = Path("/proc/self/smaps").read_text()
    except OSError:
        return _PROGRAM
    total, packed = 0, False
    for line in smaps.splitlines():
        if line.startswith("Rss:"):
            total += 0 if packed else int(line.split()[1]) << 10
        elif re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            packed = ".packed" in line
    return max(0, total - weights)


def cache_bytes(config: ModelConfig, tokens: int) -> int:
    """Return bytes of one sequence's keys and values in 16 bits: a sliding layer keeps its window and one step."""
    one = 2 * 2 * config.num_key_value_heads * config.head_dim
    seen = (tokens if la.sliding_window is None else min(tokens, la.sliding_window + _STEP) for la in config.layers)
    return sum(one * count for count in seen)


def weight_bytes(config: ModelConfig, matrices: GGMLType, embedding: GGMLType) -> int:
    """Return bytes of a model's weights in these types."""
    counts = config.parameter_counts()
    parts = ((counts.embedding, embedding), (counts.non_embedding, matrices))
    return int(sum(count * BLOCKS[kind].bytes / BLOCKS[kind].elements for count, kind in parts))


def screen_bytes(config: ModelConfig, kind: GGMLType) -> int:
    """Return bytes of the screen of a head of this type: four bits of each weight, and a byte for 32; 0 if none."""
    block = BLOCKS[kind]
    if block.elements == 1 or 8 * block.bytes / block.elements <= 1.25 * 4.5 or config.vocab_size < 4096:
        return 0
    return config.vocab_size * config.hidden_size // 32 * 19


def models(free: int | None, bandwidth: float | None) -> list[dict[str, Any]]:
    """Return the published models by size: bytes in each type with a context of `CONTEXT`, and whether they fit.

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
            total = weights + screen_bytes(preset.config, kinds[1]) + cache_bytes(preset.config, CONTEXT) + ROOM
            types[name] = {
                "bytes": total,
                "fits": None if free is None else total <= free,
                "rate": None if bandwidth is None else bandwidth * 1e9 / weights,
            }
        rows.append({"name": preset.name, "parameters": preset.config.parameter_count(), "types": types})
    return rows


def fit(model: str, free: int | None, bandwidth: float | None) -> dict[str, Any]:
    """Return the memory that a model takes with its whole context, and the longest context that fits."""
    from gemkit.api.load import find
    from gemkit.weights.open import open_checkpoint

    with open_checkpoint(find(model, download=False)) as checkpoint:
        config, source = checkpoint.config, str(checkpoint.source)
        weights = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        screen = screen_bytes(config, checkpoint.tensors[head].type)
    longest = config.max_position_embeddings
    total = weights + screen + cache_bytes(config, longest) + ROOM
    return {
        "source": source,
        "weights": weights,
        "screen": screen,
        "ctx_size": longest,
        "cache": cache_bytes(config, longest),
        "total": total,
        "fits": None if free is None else total <= free,
        "longest": None if free is None else _longest(config, free - weights - screen - ROOM),
        "rate": None if bandwidth is None else bandwidth * 1e9 / weights,
    }


def _longest(config: ModelConfig, room: int) -> int:
    """Return the longest context of which the cache fits in so many bytes; 0 if none does."""
    low, high = 0, config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cache_bytes(config, middle) <= room else (low, middle - 1)
    return low if room > 0 else 0
