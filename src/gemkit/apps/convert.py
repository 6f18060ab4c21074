"""A model from one format to another, and the proof that nothing changed: `convert`, `verify`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemkit.arch.tensors import manifest
from gemkit.engine.runner import Batch
from gemkit.engine.sampling import Sampling
from gemkit.errors import GemkitError, UsageError
from gemkit.models.native import NativeRunner
from gemkit.text.tokenizer import Tokenizer
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.dtype import convert as in_dtype
from gemkit.weights.files import open_checkpoint
from gemkit.weights.gguf_writer import write_gguf
from gemkit.weights.hf_writer import write_hf

FORMATS = ("hf", "gguf")
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")

# Text for `verify` where the user gives none; any ordinary prose will do.
SAMPLE = (
    "The harbour was quiet that morning. Two fishermen mended a net in the lee of the sea wall, talking about the "
    "weather and the price of diesel, while a dog slept on the warm stones beside them. At half past eight the first "
    "ferry of the day came round the headland with eleven passengers on board, three of them schoolchildren.\n\n"
    "def area(width: float, height: float) -> float:\n    return width * height\n"
)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    dtype: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes the model at `source` (a path) to `target` and returns its path.

    to: "hf", a folder with safetensors, or "gguf", a file. dtype: of the matrices; "auto" keeps what is stored, and for
    "hf", which has no quantised types, takes float32 in their place, without loss. "int8" (Q8_0) is for "gguf".
    Raises UsageError for a bad combination, GemkitError if the target exists or cannot be written.
    """
    if to not in FORMATS:
        raise UsageError(f"the format is {to!r}; choose from {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; choose from {', '.join(DTYPES)}")
    if to == "hf" and dtype == "int8":
        raise UsageError("a Hugging Face folder has no int8 blocks: choose a float dtype, or --to gguf")
    if os.path.lexists(target):
        raise GemkitError(f"{target} exists: give another name, or delete it first")
    with open_checkpoint(source) as stored:
        checkpoint = in_dtype(stored, dtype)
        if to == "hf":
            return write_hf(target, checkpoint, progress=progress)
        return write_gguf(target, checkpoint)


@dataclass(frozen=True)
class Comparison:
    """How two models differ.

    tokens: compared. logits: max|Δ| / max|logit|. kl: mean divergence from the first's distribution, nats a token.
    agreement: share of positions with the same likeliest token. tensor: the first tensor that differs, in the order of
    the model, and by how much (max|Δ| / max|value|); None if all are equal.
    same_ids: whether both tokenizers cut the text alike.
    """

    tokens: int
    logits: float
    kl: float
    agreement: float
    tensor: tuple[str, float] | None
    same_ids: bool


def verify(first: str | os.PathLike[str], second: str | os.PathLike[str], text: str = SAMPLE) -> Comparison:
    """Loads both models and compares tensors, ids and logits (float32) on a text of at most 512 tokens."""
    with open_checkpoint(first) as one, open_checkpoint(second) as other:
        if one.config.layers != other.config.layers or one.config.vocab_size != other.config.vocab_size:
            raise GemkitError(f"{first} and {second} are models of different shapes: nothing to compare")
        most = min(512, one.config.max_position_embeddings)
        ids = [Tokenizer.from_vocabulary(c.vocabulary).encode(text)[:most] for c in (one, other) if c.vocabulary]
        if not ids:
            raise GemkitError(f"neither {first} nor {second} has a tokenizer: nothing to compare on")
        tokens = np.array(ids[0], np.int32)
        logits = [_logits(checkpoint, tokens) for checkpoint in (one, other)]
        difference = _first_difference(one, other)
    p, q = (values - np.logaddexp.reduce(values, axis=1, keepdims=True) for values in map(np.float64, logits))
    return Comparison(
        tokens=len(tokens),
        logits=float(np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max()),
        kl=float((np.exp(p) * (p - q)).sum(1).mean()),
        agreement=float((p.argmax(1) == q.argmax(1)).mean()),
        tensor=difference,
        same_ids=all(row == ids[0] for row in ids),
    )


def _first_difference(one: Checkpoint, other: Checkpoint) -> tuple[str, float] | None:
    for name in manifest(one.config):
        a, b = one.tensors[name].to_float32(), other.tensors[name].to_float32()
        if not np.array_equal(a, b):
            return name, float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-30))
    return None


def _logits(checkpoint: Checkpoint, tokens: np.ndarray) -> np.ndarray:
    """float32 [T, V] of the native core with float32 activations."""
    runner = NativeRunner(checkpoint.config, checkpoint.tensors, activations="float32")
    pages = -(-len(tokens) // runner.page_size)
    runner.reserve([pages] * len(runner.groups))
    batch = Batch(
        tokens=tokens,
        starts=np.array([0, len(tokens)], np.int32),
        positions=np.zeros(1, np.int32),
        pages=tuple(np.arange(pages, dtype=np.int32)[None] for _ in runner.groups),
        sample=np.zeros(1, bool),
        sampling=(Sampling(),),
        counters=np.zeros(1, np.int64),
        history=(np.zeros(0, np.int32),),
        prompt_lengths=np.zeros(1, np.int32),
    )
    return runner.logits(batch)
