"""Weights in another type than stored: `convert`. A tensor is converted when its bytes are read, piece by piece.

    dtype      matrices   bytes a parameter
    auto       as stored
    float32    F32        4
    bfloat16   BF16       2
    float16    F16        2, values up to 65,504
    int8       Q8_0       1.06, blocks of 32 elements with one scale

Norms become F32, without loss. From a quantised GGUF, `float32` is exact, `bfloat16` and `int8` round what was rounded
before: they change the size and speed, never for the better in quality.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np

from gemkit.arch.tensors import EMBEDDING, HEAD
from gemkit.errors import GemkitError, UsageError
from gemkit.weights.checkpoint import Checkpoint, Tensor
from gemkit.weights.quant import BLOCKS, GGMLType, dequantise, nbytes, quantise

TYPES = {
    "float32": GGMLType.F32,
    "bfloat16": GGMLType.BF16,
    "float16": GGMLType.F16,
    "int8": GGMLType.Q8_0,
}
DTYPES = ("auto", *TYPES)

_CHUNK_ELEMENTS = 1 << 18


class Converted(Tensor):
    """A tensor that is converted from `original` at each use of `data`, in pieces of whole rows.

    Besides the result, memory holds about ten pieces of 1 MB. add_one: as in the original, and the values too.
    """

    __slots__ = ("original",)

    def __init__(self, name: str, type: GGMLType, original: Tensor) -> None:
        try:
            nbytes(type, original.shape)
        except GemkitError as error:
            raise GemkitError(f"{name}: {error}") from None
        super().__init__(type, original.shape, partial(_converted, name, type, original), original.add_one)
        self.original = original


def _converted(name: str, type: GGMLType, original: Tensor) -> np.ndarray:
    """Return the converted bytes, uint8, flat. Raises GemkitError for a number that does not fit."""
    columns = original.shape[-1]
    source = original.data.reshape(-1, nbytes(original.type, (columns,)))
    out = np.empty((len(source), nbytes(type, (columns,))), np.uint8)
    step = max(1, _CHUNK_ELEMENTS // columns)
    for at in range(0, len(source), step):
        rows = source[at : at + step]
        try:
            values = dequantise(original.type, rows, (len(rows), columns))
            if type == GGMLType.F16 and np.abs(values).max() >= 65520:
                raise GemkitError("a number is too large for float16: choose bfloat16 or float32")
            out[at : at + step] = quantise(type, values).reshape(len(rows), -1)
        except GemkitError as error:
            raise GemkitError(f"{name}: {error}") from None
    return out.reshape(-1)


def convert(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """Return the checkpoint with its weights in a type of the table above; `auto` returns it as it is.

    The new checkpoint reads from the old one, and closing it closes both. Raises UsageError for an unknown dtype,
    GemkitError where a row of a matrix is not a whole number of blocks.
    """
    if dtype == "auto":
        return checkpoint
    if dtype not in TYPES:
        raise UsageError(f"dtype is {dtype!r}; choose from {', '.join(DTYPES)}")
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        kind = TYPES[dtype] if len(tensor.shape) > 1 else GGMLType.F32
        tensors[name] = tensor if tensor.type == kind else Converted(name, kind, tensor)
    return checkpoint.with_tensors(tensors)


def narrow_head(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with a float embedding and output matrix in int8, where its other matrices are quantised.

    Google's 4-bit files keep the embedding in 16 bits. It is also the output matrix, so most of the bytes that a token
    reads are its; in 8 bits it is read twice as fast and can have a screen. Others are returned as they are.
    """
    floats = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
    stored = checkpoint.tensors
    heads = [name for name in (EMBEDDING, HEAD) if name in stored and stored[name].type in floats]
    others = [t for name, t in stored.items() if len(t.shape) > 1 and name not in (EMBEDDING, HEAD)]
    if not heads or any(t.type in floats for t in others) or any(stored[n].shape[-1] % 32 for n in heads):
        return checkpoint
    changed = {name: Converted(name, GGMLType.Q8_0, stored[name]) for name in heads}
    return checkpoint.with_tensors({**stored, **changed})


def describe(checkpoint: Checkpoint) -> str:
    """Describe the weights' types in a sentence. Example: "weights: int8 (Q8_0) from BF16, 1.06 bytes a parameter"."""
    matrices = [tensor for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1]
    names = {type: name for name, type in TYPES.items()}
    types = _by_size(matrices)
    converted = [tensor.original for tensor in matrices if isinstance(tensor, Converted)]
    what = f"{names[types[0]]} ({types[0].name})" if types[0] in names else types[0].name
    if len(types) > 1:
        what = ", ".join(type.name for type in types)
    origin = f"from {', '.join(type.name for type in _by_size(converted))}" if converted else "as stored"
    size = sum(tensor.nbytes for tensor in checkpoint.tensors.values()) / checkpoint.config.parameter_count()
    return f"weights: {what} {origin}, {size:.2f} bytes a parameter"


def _by_size(tensors: Iterable[Tensor]) -> list[GGMLType]:
    """Return the types, the one with the most elements first."""
    counts: dict[GGMLType, int] = {}
    for tensor in tensors:
        numbers = tensor.nbytes // BLOCKS[tensor.type].bytes * BLOCKS[tensor.type].elements
        counts[tensor.type] = counts.get(tensor.type, 0) + numbers
    return sorted(counts, key=lambda type: -counts[type])
