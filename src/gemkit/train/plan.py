"""Plan of a run: memory and time before it begins, by formula. Measured against runs in docs/guides/tune.md.

Letters: D model width, F ffn width, N·H and K·H widths of queries and keys, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.arch.tensors import manifest
from gemkit.errors import GemkitError
from gemkit.weights.lora import LoraConfig

_PROGRAM = 350 << 20  # Python with a framework, the vocabulary and the samples
_CHUNK = 256 << 20  # logits of a chunk of rows, float32
_STATE = 16  # bytes of a trained parameter: itself, its gradient and two moments, float32
_BYTES = {"bfloat16": 2.0, "float32": 4.0}
_PACKED = {8: 1.0625, 4: 0.625}  # bytes an element of a matrix in few bits, scales included
_EFFICIENCY = 0.6  # of a training step, against a matrix product alone


@dataclass(frozen=True)
class Plan:
    """Memory and work of a run.

    parameters: of the model and the adapter. trained: those that take gradients. steps: of the optimiser.
    shape: the widest batch [B, T]. accumulated: batches of a step.
    memory: bytes by part. flops: floating-point operations of a step, evaluations not counted.
    """

    parameters: int
    trained: int
    steps: int
    shape: tuple[int, int]
    accumulated: int
    memory: Mapping[str, int]
    flops: float

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())

    def check(self, free: int | None) -> None:
        """Raise GemkitError if the run takes more memory than is free; None is unknown."""
        if free is not None and self.bytes > free:
            raise GemkitError(
                f"not enough memory: the run takes about {self.bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                "lower --batch-size or --max-seq-len, or train an adapter on fewer bits (gemkit lora --quantize int4)"
            )

    def text(self, free: int | None, rate: float | None) -> str:
        """Return the lines of a dry run. rate: operations a second, of `measured_rate`; None where it is unknown."""
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.memory.items())
        rows, width = self.shape
        accumulated = f", {self.accumulated} batches each" if self.accumulated > 1 else ""
        lines = [
            f"Parameters: {self.parameters / 1e6:,.1f} M, of which {self.trained / 1e6:,.2f} M are trained",
            f"Steps: {self.steps:,} with batches of up to {rows}×{width:,} tokens{accumulated}",
            f"Memory: about {self.bytes / 1e9:.2f} GB ({parts})"
            + ("" if free is None else f"; {free / 1e9:.2f} GB are free"),
        ]
        if rate is not None:
            seconds = self.steps * self.flops / (rate * _EFFICIENCY)
            lines.append(f"Time: about {_duration(seconds)}, at {rate / 1e9:,.0f} GFLOP/s of matrix products")
        return "\n".join(lines)


def plan(
    config: ModelConfig,
    lora: LoraConfig | None,
    steps: int,
    shape: tuple[int, int],
    accumulated: int,
    loss_share: float,
    dtype: str,
    bits: int | None = None,
    recompute: str = "cheap",
) -> Plan:
    """Return the plan of a run.

    lora: None trains all weights. shape: of the widest batch. loss_share: of its positions, those with loss.
    dtype: "bfloat16" or "float32". bits: of a frozen model, None for dtype. recompute: of the training loop.
    """
    specs = manifest(config)
    counts = {name: int(np.prod(spec.shape)) for name, spec in specs.items()}
    targets = {} if lora is None else lora.weights(config)
    added = sum(lora.rank * (rows + columns) + lora.dora * rows for rows, columns in targets.values()) if lora else 0
    element = _BYTES[dtype]
    if lora is None:
        weights, trained = 0.0, sum(counts.values())
    else:
        each = {8: _PACKED[8], 4: _PACKED[4], None: element}
        weights = sum(
            count * (each[bits and (8 if specs[name].letters[0] == "V" else bits)] if specs[name].quantise else 4)
            for name, count in counts.items()
        )
        trained = added
    head = config.vocab_size * config.hidden_size
    tokens = shape[0] * shape[1]
    logits = min(_CHUNK, 4 * config.vocab_size * max(1, round(tokens * loss_share)))
    copies = 2 + (element < 4) + (config.final_logit_softcapping is not None)
    # A frozen head of few bits is widened, in two steps; the gradient of a trained one comes besides the embedding's
    output = copies * logits + head * (8 if lora is None else 2 * element if bits else 0)
    memory = {
        "weights": round(weights),
        "trained weights and optimiser": _STATE * trained,
        "activations": round(tokens * _kept(config, lora, element, recompute)) + 4 * shape[0] * shape[1] ** 2,
        "output matrix": round(output),
        "program": _PROGRAM,
    }
    matrices = sum(count for name, count in counts.items() if specs[name].lora)
    passes = 6 if lora is None else 4
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * shape[1]
    flops = tokens * (passes * matrices + 6 * added + attention + passes * loss_share * head)
    return Plan(sum(counts.values()) + added, trained, steps, shape, accumulated, memory, accumulated * flops)


def _kept(config: ModelConfig, lora: LoraConfig | None, element: float, recompute: str) -> float:
    """Return the bytes that a token takes until the backward pass, and in the layer that is computed again there."""
    D, F = config.hidden_size, config.intermediate_size
    NH, KH = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    added = 0
    if lora is not None:
        layers = len(config.layers)
        added = len(lora.weights(config)) * lora.rank // layers
    products = 2 * NH + 2 * KH + 2 * D + 2 * F + added  # of q and attention, k and v, o and down, gate and up
    everything = (2 if lora is None else 3) * products + 10 * D + 3 * F + 3 * NH
    kept = {"none": everything, "cheap": D + products, "layers": D}[recompute]
    return element * (len(config.layers) * kept + (0 if recompute == "none" else 2 * everything))


def measured_rate(size: int = 1024) -> float:
    """Return the floating-point operations a second of matrix products in float32 on this machine's CPU, by NumPy."""
    a = np.ones((size, size), np.float32)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
