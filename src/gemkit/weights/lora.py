"""Low-rank adapters in memory: `LoraConfig`, `LoraPart`, `LoraAdapter`. Their files: `gemkit.weights.peft`.

An adapter adds scale · B·A to a matrix W [out, in]: A is [r, in], B is [out, r], scale is alpha / r, or alpha / √r with
rslora (arXiv 2312.03732). With a magnitude m [out] (DoRA, arXiv 2402.09353) row i of the sum is scaled to length m[i].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.arch.tensors import manifest
from gemkit.errors import GemkitError, UsageError, brief, whole_number
from gemkit.weights.hf.safetensors import shown

MAX_RANK = 2**16 - 1


@dataclass(frozen=True, eq=False)
class LoraPart:
    """The addition to one matrix: a [r, in], b [out, r], scale, and for DoRA magnitude [out]; float32 arrays."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class LoraConfig:
    """Settings of a new adapter.

    rank, alpha: scale is alpha / rank. dropout: share of the inputs of A that training drops, from 0 to below 1.
    targets: names of the projections that it changes, such as ("q_proj", "v_proj"); () means all seven of each layer.
    rslora: scale is alpha / √rank. dora: with magnitudes.
    Raises UsageError for a value out of range.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        rank = whole_number(self.rank)
        if rank is None or not 1 <= rank <= MAX_RANK:
            raise UsageError(f"the rank is {brief(self.rank)}: give a whole number from 1 to {MAX_RANK}")
        if not 0 < abs(self.alpha) < 1e30:
            raise UsageError(f"alpha is {brief(self.alpha)}: give a number other than 0")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"the dropout is {brief(self.dropout)}: give a number from 0 to below 1")

    @property
    def scale(self) -> float:
        return self.alpha / divisor(self.rank, self.rslora)

    def weights(self, model: ModelConfig) -> dict[str, tuple[int, int]]:
        """Return the names and shapes of the matrices that it changes; raises UsageError for an unknown target."""
        found = {name: spec.shape for name, spec in manifest(model).items() if spec.lora}
        known = dict.fromkeys(map(projection, found))
        if unknown := [target for target in self.targets if target not in known]:
            raise UsageError(
                f"the target {brief(unknown[0])} is no projection of a layer: choose from {', '.join(known)}"
            )
        return {name: shape for name, shape in found.items() if not self.targets or projection(name) in self.targets}


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """An adapter that was read: what `gemkit.models.native` adds to the matrices.

    name: the folder's, for people. source: its folder.
    config: the settings that it was trained with; some parts may have another rank and scale.
    parts: by canonical weight name ("model.layers.0.self_attn.q_proj.weight").
    ignored: the names of its modules for images, which text never reaches.
    chat_template: of the turns that it was trained on, None if its folder has none.
    """

    name: str
    config: LoraConfig
    parts: Mapping[str, LoraPart]
    source: Path
    ignored: tuple[str, ...] = ()
    chat_template: str | None = None

    @property
    def rank(self) -> int:
        """The largest rank of a part."""
        return max(part.rank for part in self.parts.values())


def divisor(rank: int, rslora: bool) -> float:
    """Return alpha / scale."""
    return math.sqrt(rank) if rslora else rank


def projection(name: str) -> str:
    """Return the module of a weight's name. Example: "model.layers.0.self_attn.q_proj.weight" gives "q_proj"."""
    return name.removesuffix(".weight").rpartition(".")[2]


def check_fits(adapter: LoraAdapter, config: ModelConfig) -> None:
    """Raise GemkitError unless every part belongs to a matrix of the model that adapters attach to, of its shape."""
    specs = manifest(config)
    for name, part in adapter.parts.items():
        spec = specs.get(name)
        if spec is None or not spec.lora:
            raise GemkitError(
                f"{adapter.source}: the adapter changes {shown(name)}, which this model does not have: "
                "load it with the model it was trained on"
            )
        if (len(part.b), part.a.shape[1]) != spec.shape:
            raise GemkitError(
                f"{adapter.source}: the adapter's {name} is for a matrix of {[len(part.b), part.a.shape[1]]}, this "
                f"model has {list(spec.shape)}: load it with the model it was trained on"
            )


def row_lengths(matrix: np.ndarray) -> np.ndarray:
    """Return the Euclidean length of each row, float32 [rows], summed in float64."""
    return np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64)).astype(np.float32)


def merge(weight: np.ndarray, parts: Sequence[LoraPart], rows: slice) -> np.ndarray:
    """Return some rows of a matrix, float32 [n, in], with the parts of one or several adapters in them, in turn.

    weight: these rows as they were. As in peft, every magnitude counts for the model's own rows plus its own addition.
    Raises GemkitError if DoRA would scale a row of zeros.
    """
    merged = weight
    for part in parts:
        addition = np.float32(part.scale) * (part.b[rows] @ part.a)
        merged = merged + addition
        if part.magnitude is not None:
            lengths = row_lengths(weight + addition)
            if not lengths.all():
                raise GemkitError("the adapter scales a row of zeros: load it with the model it was trained on")
            merged *= (part.magnitude[rows] / lengths)[:, None]
    return merged
