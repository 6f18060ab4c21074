"""Conversion of a model between formats, and its verification: `convert`, `verify`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemkit.arch.tensors import manifest
from gemkit.engine.interface import build_batch, check_finite
from gemkit.errors import GemkitError, UsageError
from gemkit.models.native import NativeRunner
from gemkit.text.tokenizer import Tokenizer
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.dtype import convert as in_dtype
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.google.orbax_write import write_orbax
from gemkit.weights.hf.write import write_hf
from gemkit.weights.open import open_checkpoint
from gemkit.weights.staged import Check

FORMATS = ("hf", "gguf", "orbax")
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")

_SLICE = 64  # tokens whose logits are held at a time: 67 MB for each model

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
    check: Check | None = None,
) -> Path:
    """Write the model at `source` (a path) to `target` and return its path.

    The result is read back before it gets its name, so that `target` is a model that loads, or does not exist.

    to: "hf", a folder with safetensors, "gguf", a file, or "orbax", a folder as Google's Flax releases (its extra).
    dtype: of the matrices; "auto" keeps what is stored, and for "hf" and "orbax", which have no quantised types, takes
    float32 in their place, without loss. "int8" (Q8_0) is for "gguf", "float16" not for "orbax".
    check: called with the path of the result before it gets its name; whatever it raises leaves nothing.
    Raises UsageError for a bad combination, GemkitError if the target exists or cannot be written.
    """
    check_request(to, dtype)
    if os.path.lexists(target):
        raise GemkitError(f"{target} exists: give another name, or delete it first")
    with open_checkpoint(source) as stored:
        checkpoint = in_dtype(stored, dtype)
        if to == "hf":
            return write_hf(target, checkpoint, progress=progress, check=check)
        if to == "orbax":
            return write_orbax(target, checkpoint, progress=progress, check=check)
        return write_gguf(target, checkpoint, check=check)


def check_request(to: str, dtype: str) -> None:
    """Raise UsageError for a format or type that there is not, or a combination that cannot be written."""
    if to not in FORMATS:
        raise UsageError(f"the format is {to!r}; choose from {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; choose from {', '.join(DTYPES)}")
    if to == "hf" and dtype == "int8":
        raise UsageError("a Hugging Face folder has no int8 blocks: choose a float dtype, or --to gguf")
    if to == "orbax" and dtype in ("int8", "float16"):
        raise UsageError("Flax checkpoints are float32 or bfloat16: choose one of them, or --to gguf")


@dataclass(frozen=True)
class Comparison:
    """Differences of two models.

    tokens: compared. logits: max|Δ| / max|logit|. kl: mean divergence from the first's distribution, nats a token.
    agreement: share of positions with the same most probable token. perplexity: of the text, by each model.
    tensor: the first tensor that differs, in the order of the model, and by how much (max|Δ| / max|value|); None if all
    are equal. same_ids: whether both tokenizers cut the text alike.
    """

    tokens: int
    logits: float
    kl: float
    agreement: float
    perplexity: tuple[float, float]
    tensor: tuple[str, float] | None
    same_ids: bool


def verify(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    text: str = SAMPLE,
    *,
    most: int = 512,
    activations: str = "float32",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Load both models and compare tensors, ids and logits on at most `most` tokens of a text.

    activations: as in `gemkit.load`; with "float32" both models take 4 bytes a parameter, and nothing is rounded.
    progress: called with the tokens done and their total. Raises GemkitError if there are no tokens to compare.
    """
    with open_checkpoint(first) as one, open_checkpoint(second) as other:
        if one.config.layers != other.config.layers or one.config.vocab_size != other.config.vocab_size:
            raise GemkitError(f"{first} and {second} are models of different shapes: nothing to compare")
        most = min(most, one.config.max_position_embeddings)
        ids = [Tokenizer.from_vocabulary(c.vocabulary).encode(text)[:most] for c in (one, other) if c.vocabulary]
        if not ids:
            raise GemkitError(f"neither {first} nor {second} has a tokenizer: nothing to compare on")
        tokens = np.array(ids[0], np.int32)
        if len(tokens) < 2:
            raise GemkitError("the text is empty: give one of some sentences to compare on")
        models = [_Scored(checkpoint, len(tokens), activations) for checkpoint in (one, other)]
        sums = _Sums()
        for start in range(0, len(tokens), _SLICE):
            part = tokens[start : start + _SLICE]
            sums.add(*(model.logits(part, start) for model in models), tokens[start + 1 : start + _SLICE + 1])
            progress(start + len(part), len(tokens))
        del models
        difference = _first_difference(one, other)
    return Comparison(
        tokens=len(tokens),
        logits=sums.difference / max(sums.largest, 1e-30),
        kl=sums.kl / len(tokens),
        agreement=sums.same / len(tokens),
        perplexity=(sums.perplexity(0), sums.perplexity(1)),
        tensor=difference,
        same_ids=all(row == ids[0] for row in ids),
    )


class _Sums:
    """Sums over the slices of a text."""

    def __init__(self) -> None:
        self.difference = self.largest = self.kl = 0.0
        self.same = self.targets = 0
        self.nll = [0.0, 0.0]

    def add(self, one: np.ndarray, other: np.ndarray, targets: np.ndarray) -> None:
        """Add a slice: logits [T, V] of both models, which are overwritten, and the ids that follow [T or T - 1]."""
        self.targets += len(targets)
        for t, rows in enumerate(zip(one, other)):  # row by row: one fits into the processor's cache, a slice does not
            self.largest = max(self.largest, float(rows[0].max()), -float(rows[0].min()))
            difference = rows[0] - rows[1]
            self.difference = max(self.difference, float(difference.max()), -float(difference.min()))
            self.same += int(rows[0].argmax() == rows[1].argmax())
            for i, row in enumerate(rows):
                row -= row.max()
                row -= np.float32(np.log(np.exp(row).sum(dtype=np.float64)))
                if t < len(targets):
                    self.nll[i] -= float(row[targets[t]])
            np.subtract(*rows, out=difference)
            self.kl += float(np.exp(rows[0]) @ difference)

    def perplexity(self, model: int) -> float:
        return math.exp(min(self.nll[model] / self.targets, 700))


def _first_difference(one: Checkpoint, other: Checkpoint) -> tuple[str, float] | None:
    for name in manifest(one.config):
        tensors = one.tensors[name], other.tensors[name]
        a, b = (tensor.to_float32() for tensor in tensors)
        if any(tensor.add_one for tensor in tensors):  # GGUF holds the norms' factor 1 + w, in float32
            a, b = a + np.float32(1), b + np.float32(1)
        if not np.array_equal(a, b):
            return name, float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-30))
    return None


class _Scored:
    """A model on the native core, fed a text slice by slice."""

    def __init__(self, checkpoint: Checkpoint, tokens: int, activations: str) -> None:
        self._runner = NativeRunner(checkpoint.config, checkpoint.tensors, activations=activations)
        pages = -(-tokens // self._runner.page_size)
        self._runner.reserve([pages] * len(self._runner.groups))
        self._pages = np.arange(pages, dtype=np.int32)[None]

    def logits(self, tokens: np.ndarray, start: int) -> np.ndarray:
        """Return logits float32 [T, V] of the tokens that begin at position `start`, after those of the calls before.

        Raises GemkitError if any is not finite.
        """
        batch = build_batch([tokens], [start], (self._pages,) * len(self._runner.groups))
        logits = self._runner.logits(batch)
        check_finite(logits)
        return logits
