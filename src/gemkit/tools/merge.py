"""Adapters merged into a model's weights: `merge`, into a folder of floats; `merged_gguf`, for a quantised file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from gemkit.errors import GemkitError, UsageError, listed
from gemkit.weights import lora
from gemkit.weights.checkpoint import Checkpoint, Tensor
from gemkit.weights.dtype import Converted
from gemkit.weights.dtype import convert as in_dtype
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.hf.write import write_hf
from gemkit.weights.lora import LoraAdapter, LoraPart
from gemkit.weights.open import open_checkpoint
from gemkit.weights.quant import BLOCKS, GGMLType, dequantise, nbytes
from gemkit.weights.staged import Check

DTYPES = ("auto", "float32", "bfloat16", "float16")

_CHUNK = 1 << 20  # elements that are merged at a time


def merge(
    source: str | os.PathLike[str],
    adapters: Sequence[LoraAdapter],
    target: str | os.PathLike[str],
    dtype: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
    check: Check | None = None,
) -> Path:
    """Write the model at `source` (a path) with adapters in its weights to the Hugging Face folder `target`.

    The folder is read back before it gets its name. Sums are float32, rounded once; the embedding stays as it is.

    adapters: from `gemkit.weights.peft.read.read_peft`, merged in turn. dtype: of the matrices; "auto" keeps what is
    stored. progress: called with the bytes written and in all. check: called with the path of the result before it gets
    its name; whatever it raises leaves nothing.
    Raises UsageError for an unknown dtype, GemkitError if an adapter is for another model, if "auto" would merge into
    quantised blocks, or if the target exists or cannot be written.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; choose from {', '.join(DTYPES)}")
    with open_checkpoint(source) as stored:
        if dtype == "auto":
            _refuse_blocks(source, stored, adapters)
            checkpoint = in_stored_types(stored, adapters)
        else:
            checkpoint = in_dtype(merged(stored, adapters), dtype)
        return write_hf(target, checkpoint, progress=progress, check=check)


@contextlib.contextmanager
def merged_gguf(
    source: str | os.PathLike[str], adapters: Sequence[LoraAdapter], near: str | os.PathLike[str]
) -> Iterator[Path]:
    """Give a temporary GGUF file of the merged model, from which `gemkit.tools.quantize` makes a narrower one.

    Merged matrices keep a float type, and are float32 where the source has blocks; all others keep their bytes.
    near: the file is in the folder of this path. Arguments and errors otherwise as of `merge`.
    """
    near = Path(near)
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{near.name}.", dir=near.absolute().parent)
    except OSError as error:
        raise GemkitError(f"{near} cannot be written ({error.strerror or error}): check its folder") from None
    with folder as name:
        path = Path(name) / near.name
        try:
            with open_checkpoint(source) as stored:
                write_gguf(path, in_stored_types(stored, adapters))
        except GemkitError as error:
            raise GemkitError(str(error).replace(str(path), str(near))) from None
        yield path


def merged(checkpoint: Checkpoint, adapters: Sequence[LoraAdapter]) -> Checkpoint:
    """Return the checkpoint with the matrices that adapters change merged, in float32, when their bytes are read.

    Closing it closes both. Raises GemkitError if an adapter does not fit.
    """
    changes: dict[str, list[LoraPart]] = {}
    for adapter in adapters:
        lora.check_fits(adapter, checkpoint.config)
        for name, part in adapter.parts.items():
            changes.setdefault(name, []).append(part)
    tensors = dict(checkpoint.tensors)
    for name, parts in changes.items():
        original = tensors[name]
        tensors[name] = Tensor(GGMLType.F32, original.shape, partial(_merged, name, original, parts))
    return checkpoint.with_tensors(tensors)


def in_stored_types(checkpoint: Checkpoint, adapters: Sequence[LoraAdapter]) -> Checkpoint:
    """Return `merged` with the float types of the source, float32 for blocks."""
    tensors = dict(merged(checkpoint, adapters).tensors)
    for name, original in checkpoint.tensors.items():
        if tensors[name] is not original and original.type in (GGMLType.F16, GGMLType.BF16):
            tensors[name] = Converted(name, original.type, tensors[name])
    return checkpoint.with_tensors(tensors)


def _merged(name: str, original: Tensor, parts: Sequence[LoraPart]) -> np.ndarray:
    """Return the bytes of the merged matrix, float32, flat. Raises GemkitError for values that are not finite."""
    rows, columns = original.shape
    stored = original.data.reshape(rows, nbytes(original.type, (columns,)))
    out = np.empty(original.shape, np.float32)
    step = max(1, _CHUNK // columns)
    for at in range(0, rows, step):
        some = slice(at, min(at + step, rows))
        values = dequantise(original.type, stored[some], (some.stop - at, columns))
        try:
            out[some] = lora.merge(values, parts, some)
        except GemkitError as error:
            raise GemkitError(f"{name}: {error}") from None
    if not np.isfinite(out).all():
        raise GemkitError(f"{name}: merging gives values that are not finite: give another adapter")
    return out.reshape(-1).view(np.uint8)


def _refuse_blocks(source: object, checkpoint: Checkpoint, adapters: Sequence[LoraAdapter]) -> None:
    """Raise GemkitError if an adapter changes quantised matrices."""
    changed = {name for adapter in adapters for name in adapter.parts} & checkpoint.tensors.keys()
    types = {checkpoint.tensors[name].type for name in changed}
    if blocks := sorted(kind.name for kind in types if BLOCKS[kind].elements > 1):
        raise GemkitError(
            f"{source} is quantised ({listed(blocks)}), and merging into blocks rounds them again: give the original "
            "weights, or --dtype bfloat16 for a folder of floats, or --requantize TYPE for a GGUF file"
        )
