"""A model's weights in a narrower type, as a GGUF file, and what that costs: `quantize`, `measure`."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from gemkit.arch.tensors import EMBEDDING, HEAD, manifest
from gemkit.errors import GemkitError, GemkitWarning, UsageError
from gemkit.host import default_threads, system_memory
from gemkit.tools.convert import Comparison, verify
from gemkit.tools.sample import TEXT
from gemkit.weights.checkpoint import Checkpoint, Tensor
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.open import open_checkpoint
from gemkit.weights.quant import BLOCKS, GGMLType, dequantise, nbytes
from gemkit.weights.quant_search import search
from gemkit.weights.staged import Check

Progress = Callable[[int, int], None]

# The types by the names that llama.cpp's users know, wide ones first.
TYPES = {
    "f32": GGMLType.F32,
    "bf16": GGMLType.BF16,
    "f16": GGMLType.F16,
    "q8_0": GGMLType.Q8_0,
    "q6_k": GGMLType.Q6_K,
    "q5_k": GGMLType.Q5_K,
    "q5_1": GGMLType.Q5_1,
    "q5_0": GGMLType.Q5_0,
    "q4_k": GGMLType.Q4_K,
    "q4_1": GGMLType.Q4_1,
    "q4_0": GGMLType.Q4_0,
}
# Mixes: the type of most matrices; values and the way down from the feed-forward get the second one in some layers.
MIXES = {"q5_k_m": (GGMLType.Q5_K, GGMLType.Q6_K), "q4_k_m": (GGMLType.Q4_K, GGMLType.Q6_K)}
_WIDER_IN_MIXES = ("self_attn.v_proj.weight", "mlp.down_proj.weight")
NAMES = (*TYPES, *MIXES)

# Substitutes for a type when its blocks do not divide a row: of 256 elements, then of 32.
_FALLBACK = {GGMLType.Q4_K: GGMLType.Q5_0, GGMLType.Q5_K: GGMLType.Q5_1, GGMLType.Q6_K: GGMLType.Q8_0}
_LAST_FALLBACK = GGMLType.F16

# The embedding, which is the output matrix too, and an output matrix of its own.

MOST_TOKENS = 4096  # of the text that the damage is measured on
FEW_TOKENS = 1000  # with fewer, a change of perplexity says little
MUCH = 0.05  # rise of perplexity from which on it is called so

_CHUNK = 1 << 18  # elements that a thread converts at a time: about 10 MB of temporaries


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`.

    bytes: size of the file. parameters: of the model. types: how many tensors have which type.
    errors: by tensor, sqrt(Σ(new - old)² / Σold²), the largest first; rounded tensors only.
    """

    path: Path
    bytes: int
    parameters: int
    types: dict[str, int]
    errors: dict[str, float]


@dataclass(frozen=True)
class Damage:
    """Source and result on one text. bytes: the weights of each. activations: "int8" where memory is short."""

    bytes: tuple[int, int]
    parameters: int
    compared: Comparison
    activations: str

    @property
    def rise(self) -> float:
        """The relative rise of the perplexity."""
        before, after = self.compared.perplexity
        return after / before - 1


def plan(checkpoint: Checkpoint, name: str, embedding: str | None = None) -> dict[str, GGMLType]:
    """Return the type of each tensor, by canonical name. Arguments and errors as of `quantize`."""
    main, wider = MIXES.get(name.lower(), (TYPES.get(name.lower()),) * 2)
    if main is None:
        raise UsageError(f"the type is {name!r}; choose from {', '.join(NAMES)}")
    if embedding is None:
        head = main if _bits(main) >= 8 else GGMLType.Q8_0
    elif embedding.lower() in TYPES:
        head = TYPES[embedding.lower()]
    else:
        raise UsageError(f"the embedding's type is {embedding!r}; choose from {', '.join(TYPES)}")
    layers = checkpoint.config.num_hidden_layers
    types = {}
    for key, spec in manifest(checkpoint.config).items():
        kind = main
        if not spec.quantise:
            kind = GGMLType.F32
        elif key in (EMBEDDING, HEAD):
            kind = head
        elif key.endswith(_WIDER_IN_MIXES) and _is_wider(int(key.split(".")[2]), layers):
            kind = wider
        types[key] = _fitting(kind, spec.shape[-1])
    return types


def _bits(kind: GGMLType) -> float:
    return 8 * BLOCKS[kind].bytes / BLOCKS[kind].elements


def _is_wider(layer: int, layers: int) -> bool:
    """Return whether a mix widens a layer: the first and last eighth, and every third between, as in llama.cpp."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fitting(kind: GGMLType, columns: int) -> GGMLType:
    """Return the type itself, or what llama.cpp takes for rows that are not whole blocks."""
    if columns % BLOCKS[kind].elements:
        kind = _FALLBACK.get(kind, _LAST_FALLBACK)
    return _LAST_FALLBACK if columns % BLOCKS[kind].elements else kind


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str,
    embedding: str | None = None,
    *,
    threads: int | None = None,
    progress: Progress = lambda done, total: None,
    check: Check | None = None,
) -> Quantized:
    """Write the model at `source` (a path) to the GGUF file `target`, its matrices in `type`.

    The file is read back before it gets its name, so that `target` is a model that loads, or does not exist.

    type: a name of `NAMES`, in small or capital letters. embedding: of the embedding, a name of `TYPES`; by default
    `type`, but not below 8 bits. Norms stay float32, and a tensor that has its type already is copied.
    threads: by default the physical cores. progress: called with the elements done and their total.
    check: called with the path of the result before it gets its name; whatever it raises leaves no file.
    Raises UsageError for an unknown type, GemkitError if the target exists or the disk is too small for it. Warns
    (GemkitWarning) of an embedding below 8 bits and of a source that was quantised before.
    """
    target = Path(target)
    if os.path.lexists(target):
        raise GemkitError(f"{target} exists: give another name, or delete it first")
    with open_checkpoint(source) as stored:
        types = plan(stored, type, embedding)
        _warn(stored, types)
        _check_space(target, stored, types)
        changed = [tensor for name, tensor in stored.tensors.items() if tensor.type != types[name]]
        work = _Work(threads or default_threads(), progress, changed)
        tensors = dict(stored.tensors)
        for name, old in stored.tensors.items():
            if old.type != types[name]:
                read = partial(_quantised, name, types[name], old, work)
                tensors[name] = Tensor(types[name], old.shape, read, old.add_one)
        try:
            write_gguf(target, stored.with_tensors(tensors), type.upper(), check=check)
        finally:
            work.close()
        parameters = stored.config.parameter_count()
    return Quantized(
        path=target,
        bytes=target.stat().st_size,
        parameters=parameters,
        types=dict(Counter(kind.name for kind in types.values())),
        errors=dict(sorted(work.errors.items(), key=lambda pair: -pair[1])),
    )


def measure(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    text: str = TEXT,
    progress: Progress = lambda done, total: None,
) -> Damage:
    """Compare both models on at most `MOST_TOKENS` tokens of a text; progress gets tokens. Errors as of `verify`."""
    with open_checkpoint(source) as one, open_checkpoint(target) as other:
        sizes = tuple(sum(tensor.nbytes for tensor in c.tensors.values()) for c in (one, other))
        parameters = one.config.parameter_count()
    available = system_memory()[1]
    # Both models in float32, and as much again as one of them for the rest
    activations = "float32" if available is None or 12 * parameters < available else "int8"
    found = verify(source, target, text, most=MOST_TOKENS, activations=activations, progress=progress)
    return Damage((sizes[0], sizes[1]), parameters, found, activations)


def check_measurable(source: str | os.PathLike[str]) -> None:
    """Raise GemkitError if `measure` would fail, since the source has no tokenizer."""
    with open_checkpoint(source) as stored:
        if stored.vocabulary_key is None:
            raise GemkitError(f"{source} has no tokenizer to measure the damage with: give --no-measure")


def is_memory_shortage(error: BaseException) -> bool:
    """Return whether an error of `measure` is about this machine's memory and not about the models."""
    return isinstance(error, MemoryError) or "not enough memory" in str(error)  # the core's words, which are text


def _warn(checkpoint: Checkpoint, types: dict[str, GGMLType]) -> None:
    heads = sorted({types[name].name for name in (EMBEDDING, HEAD) if name in types and _bits(types[name]) < 8})
    if heads:
        warnings.warn(
            f"the embedding, which is also the output matrix, becomes {heads[0]}: below 8 bits answers get worse or "
            "repeat themselves; leave --embedding-type out to keep it in Q8_0",
            GemkitWarning,
            stacklevel=3,
        )
    old = Counter(
        tensor.type.name
        for name, tensor in checkpoint.tensors.items()
        if BLOCKS[tensor.type].elements > 1 and tensor.type != types[name]
    )
    if old:
        warnings.warn(
            f"the source is quantised already ({', '.join(sorted(old))}): what that lost stays lost; start from the "
            "original weights if you have them",
            GemkitWarning,
            stacklevel=3,
        )


def _check_space(target: Path, checkpoint: Checkpoint, types: dict[str, GGMLType]) -> None:
    """Raise GemkitError if the disk is too small for the file."""
    vocabulary = checkpoint.vocabulary
    needed = sum(nbytes(types[name], tensor.shape) + 128 for name, tensor in checkpoint.tensors.items()) + (1 << 16)
    if vocabulary is not None:
        needed += sum(map(len, vocabulary.pieces)) + 16 * len(vocabulary.pieces)
        needed += 32 * max(0, checkpoint.config.vocab_size - len(vocabulary.pieces))  # rows without a piece
    folder = target.absolute().parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise GemkitError(f"{folder} cannot be written to ({error.strerror}): make it, or name another") from None
    if free < needed:
        raise GemkitError(
            f"{target} needs {needed:,} bytes and its disk has {free:,} free: free some, or name a file elsewhere"
        )


class _Work:
    """The threads, the progress and the errors of a run."""

    def __init__(self, threads: int, progress: Progress, tensors: list[Tensor]) -> None:
        self.pool = ThreadPoolExecutor(threads)
        self.errors: dict[str, float] = {}
        self._progress, self._done = progress, 0
        self._total = sum(math.prod(tensor.shape) for tensor in tensors)

    def advance(self, numbers: int) -> None:
        self._done += numbers
        self._progress(self._done, self._total)

    def close(self) -> None:
        """Wait for running tasks and cancel queued ones."""
        self.pool.shutdown(cancel_futures=True)


def _quantised(name: str, kind: GGMLType, original: Tensor, work: _Work) -> np.ndarray:
    """Return a tensor's bytes in another type, uint8, flat."""
    columns = original.shape[-1]
    old = original.data.reshape(-1, nbytes(original.type, (columns,)))
    out = np.empty((len(old), nbytes(kind, (columns,))), np.uint8)
    step = max(1, _CHUNK // columns)

    def convert(at: int) -> tuple[int, float, float]:
        """Convert a range of rows; return the elements, squared error and squared sum."""
        rows = old[at : at + step]
        shape = len(rows), columns
        values = dequantise(original.type, rows, shape)
        if kind == GGMLType.F16 and np.abs(values).max() >= 65520:
            raise GemkitError("a number is too large for f16: choose bf16 or f32")
        new = search(kind, values).reshape(len(rows), -1)
        out[at : at + step] = new
        difference = (dequantise(kind, new, shape) - values).reshape(-1)
        values = values.reshape(-1)
        return values.size, float(difference @ difference), float(values @ values)

    error = total = 0.0
    try:
        for numbers, lost, had in work.pool.map(convert, range(0, len(old), step)):
            error, total = error + lost, total + had
            work.advance(numbers)
    except GemkitError as fault:
        raise GemkitError(f"{name}: {fault}") from None
    if error > 0:
        work.errors[name] = math.sqrt(error / total)
    return out.reshape(-1)
