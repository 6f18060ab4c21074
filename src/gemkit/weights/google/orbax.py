"""Flax/Orbax checkpoints in the layout of Google's releases, read and written with the library orbax-checkpoint.

`read_orbax` opens a folder without reading an array: each is read with a tensor's bytes. Memory then
holds one array of the file, during the read its compressed bytes too, and its tensors; an array of several
tensors (keys and values, gate and up) is kept until the next one is read. Names and shapes are in `flax_names`, the
configuration and tokenizer in `official`, the writer in `orbax_write`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.errors import GemkitError, listed
from gemkit.weights.checkpoint import Checkpoint, Tensor, mismatches
from gemkit.weights.google import flax_names
from gemkit.weights.google.flax_names import Row
from gemkit.weights.google.official import Sizes, find_config, make_checkpoint
from gemkit.weights.hf.safetensors import shown
from gemkit.weights.json_file import read_object
from gemkit.weights.quant import GGMLType

TYPES = {"float32": GGMLType.F32, "bfloat16": GGMLType.BF16, "float16": GGMLType.F16}

_MANIFEST = "manifest.ocdbt"
_METADATA = "_METADATA"
_MARKS = (_METADATA, _MANIFEST)  # of the folder that holds the arrays
_OLD_MARK = "checkpoint"  # the only one of the first releases without a database
_MAX_LAYERS = 1000
_LATE_SECONDS = 0.1


def find_orbax(path: str | os.PathLike[str]) -> Path | None:
    """Return the folder with the arrays: `path`, or the only one in it, as in the releases' archives, or None."""
    path = Path(path)
    if _is_orbax(path):
        return path
    try:
        inner = [child for child in path.iterdir() if child.is_dir() and _is_orbax(child)]
    except OSError:
        return None
    return inner[0] if len(inner) == 1 else None


def _is_orbax(folder: Path) -> bool:
    if any((folder / mark).is_file() for mark in _MARKS):
        return True
    return (folder / _OLD_MARK).is_file() and not any(folder.glob("*.safetensors"))


def orbax_library() -> Any:
    """Import orbax.checkpoint. Raises GemkitError with the remedy if it is not installed."""
    try:
        import orbax.checkpoint
    except ImportError:
        from gemkit.extras import install

        raise GemkitError(f"Flax/Orbax checkpoints need the library orbax-checkpoint: {install('orbax')}") from None
    return orbax.checkpoint


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the library from writing to the terminal: its progress, and what its threads say after a failure."""
    log = logging.getLogger("absl")
    level, hook = log.level, sys.unraisablehook

    def unless_late(unraisable: Any) -> None:
        # Concurrent reads return to an event loop that the failed read has closed.
        if not (isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value)):
            hook(unraisable)

    log.setLevel(logging.ERROR)
    sys.unraisablehook = unless_late
    try:
        yield
    except Exception:
        time.sleep(_LATE_SECONDS)
        raise
    finally:
        log.setLevel(level)
        sys.unraisablehook = hook


# --- reading ---------------------------------------------------------------------------------------------------------


def read_orbax(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a released or nested checkpoint of Gemma 1, 2 or 3; tensors are read when asked for.

    metadata: in "ignored" what of the file is not part of the text model.
    Raises GemkitError if the folder is broken, is no Gemma model or does not hold exactly the model's arrays.
    """
    folder = find_orbax(path)
    if folder is None:
        raise GemkitError(f"{path} holds no Orbax checkpoint, or several: give the folder with its _METADATA")
    store = _Store(folder)
    config = find_config(folder, _sizes(store), folder, flax_names.PADDED_ROWS)
    table, rows = _table(config, store)
    shapes = {name: store.shapes[name] for name in store.text}
    _check(config, table, rows, shapes, store)
    rows_parts = [(name, row, part) for row in table.values() for part, name in enumerate(row.parts)]
    tensors = {name: _tensor(store, row, part, config) for name, row, part in rows_parts}
    ignored = [f"{count} arrays of {part}: images are not read" for part, count in store.images.items()]
    if rows != config.vocab_size:
        ignored.append(f"{rows - config.vocab_size} rows behind the vocabulary")
    metadata = {"ignored": ", ".join(ignored)} if ignored else {}
    # It names the files of the arrays, which have random names; without it, nothing small tells one from another.
    manifest = folder / _MANIFEST
    source = manifest if manifest.is_file() else None
    return make_checkpoint(folder, folder, config, tensors, source=source, metadata=metadata, close=store.close)


class _Store:
    """The arrays of a checkpoint by plain name. shapes and types: as in the file; text: those of the text model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._orbax = orbax_library()
        if (folder / _METADATA).is_file():
            read_object(folder / _METADATA)  # refuses what would exhaust the library's parser
        try:
            with quiet():
                self._reader = self._orbax.Checkpointer(self._orbax.PyTreeCheckpointHandler())
                tree = self._reader.metadata(folder.absolute()).item_metadata
                tree = getattr(tree, "tree", tree)
                if not isinstance(tree, Mapping):  # the library gives up without an error
                    raise ValueError("its arrays cannot be listed")
                leaves = dict(_leaves(tree))
        except Exception as error:  # it raises what its parts raise
            raise GemkitError(f"{folder}: {_line(error)}; the checkpoint is damaged: get it again") from None
        self.paths: dict[str, tuple[str, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self.images: dict[str, int] = {}
        of_training = any(path[0] == "params" for path in leaves)
        for path, leaf in leaves.items():
            if of_training and path[0] != "params":  # the optimiser's state, the step
                continue
            name = flax_names.plain("/".join(path))
            if part := flax_names.image_part(name):
                self.images[part] = self.images.get(part, 0) + 1
                continue
            if name in self.paths:
                raise GemkitError(
                    f"{folder}: {shown('/'.join(path))} and {shown('/'.join(self.paths[name]))} are one array; "
                    "get the checkpoint again"
                )
            shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
            if not isinstance(shape, tuple):
                raise GemkitError(f"{folder}: {shown(name)} is no array; get the checkpoint again")
            self.paths[name], self.shapes[name], self.types[name] = path, shape, str(dtype)
        self.text = list(self.paths)
        self._lock = threading.Lock()
        self._last: tuple[str, np.ndarray] | None = None

    def array(self, name: str, keep: bool) -> np.ndarray:
        """Return one array of the file. keep: another tensor of it will be wanted next."""
        with self._lock:
            if self._last is not None and self._last[0] == name:
                return self._last[1]
            self._last = None
            array = self._read(name)
            if keep:
                self._last = (name, array)
            return array

    def _read(self, name: str) -> np.ndarray:
        orbax, path = self._orbax, self.paths[name]
        item: Any = 0
        how: Any = orbax.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(path):
            item, how = {key: item}, {key: how}
        try:
            with quiet():
                found = self._reader.restore(
                    self.folder.absolute(),
                    args=orbax.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True),
                )
            for key in path:
                found = found[key]
        except Exception as error:
            raise GemkitError(
                f"{self.folder}: {name} cannot be read ({_line(error)}); the checkpoint is damaged: get it again"
            ) from None
        if not isinstance(found, np.ndarray) or found.shape != self.shapes[name]:
            raise GemkitError(f"{self.folder}: {name} is not the array that was announced; get the checkpoint again")
        return found

    def close(self) -> None:
        self._last = None
        self._reader.close()


def _tensor(store: _Store, row: Row, part: int, config: ModelConfig) -> Tensor:
    """Return a canonical tensor, which is read from the folder at each use of its data."""
    sizes = flax_names.sizes(config)
    shape = tuple(int(np.prod([sizes[x] for x in group])) for group in row.canonical.split())

    def read() -> np.ndarray:
        taken = row.take(store.array(row.flax, keep=len(row.parts) > 1), part)[: shape[0]]
        return np.ascontiguousarray(taken).reshape(-1).view(np.uint8)

    return Tensor(TYPES[store.types[row.flax]], shape, read)


def _leaves(tree: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    if len(path) > 20:
        raise ValueError("its tree is nested too deeply")
    for key, value in tree.items():
        yield from _leaves(value, (*path, str(key)))


def _sizes(store: _Store) -> Sizes:
    """Read the sizes from the shapes. Raises GemkitError that names the first array that is missing for it."""
    layers = {layer for name in store.text if (layer := flax_names.layer_of(name)) is not None}
    if not layers:
        first = ", ".join(shown(name) for name in store.text[:3]) or "nothing"
        raise GemkitError(f"{store.folder}: it holds {first} and no layer_0: it is no text model of Gemma 1, 2 or 3")
    count = max(layers) + 1
    if count > _MAX_LAYERS:
        raise GemkitError(f"{store.folder}: it names a layer {max(layers)}; get the checkpoint again")

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = store.shapes.get(name)
        if found is None or len(found) != dimensions:
            fault = "is missing" if found is None else f"has the shape {list(found)}, not {dimensions} axes"
            raise GemkitError(f"{store.folder}: {name} {fault}; get a whole checkpoint")
        return found

    N, H, D = shape("layer_0/attn/attn_vec_einsum/w", 3)
    joined = "layer_0/attn/qkv_einsum/w" in store.shapes
    K = N if joined else shape("layer_0/attn/kv_einsum/w", 4)[1]
    return Sizes(
        rows=shape("embedder/input_embedding", 2)[0],
        hidden_size=D,
        intermediate_size=shape("layer_0/mlp/linear", 2)[0],
        layers=count,
        queries=N * H,
        keys=K * H,
        qk_norm="layer_0/attn/_query_norm/scale" in store.shapes,
        post_norms="layer_0/post_attention_norm/scale" in store.shapes,
    )


def _table(config: ModelConfig, store: _Store) -> tuple[dict[str, Row], int]:
    """Return the rows of this file, by what it has, and the rows of its embedding."""
    joined = "layer_0/attn/qkv_einsum/w" in store.shapes
    D, F = config.hidden_size, config.intermediate_size
    gating = store.shapes.get("layer_0/mlp/gating_einsum")
    transposed = flax_names.is_transposed(config) if D == F else gating == (2, F, D)
    rows = store.shapes["embedder/input_embedding"][0]
    if rows != flax_names.PADDED_ROWS.get(config.vocab_size):
        rows = config.vocab_size
    return flax_names.rows(config, joined=joined, transposed=transposed), rows


def _check(
    config: ModelConfig, table: Mapping[str, Row], rows: int, shapes: Mapping[str, tuple[int, ...]], store: _Store
) -> None:
    """Raise GemkitError that names the first arrays that are missing, too many, misshapen or of another type."""
    sizes = flax_names.sizes(config) | {"V": rows}
    wanted = {name: row.shape(sizes) for name, row in table.items()}
    faults = mismatches(wanted, shapes, lambda name: name if name in wanted else shown(name))
    types = {name: store.types[name] for name in wanted if name in shapes}
    if other := [f"{name} is {shown(kind)}" for name, kind in types.items() if kind not in TYPES]:
        faults.append(f"{listed(other)}; gemkit reads {', '.join(TYPES)}")
    if faults:
        raise GemkitError(
            f"{store.folder}: the arrays do not fit the configuration: {'; '.join(faults)}; get a whole checkpoint"
        )


def _line(error: BaseException) -> str:
    """Return an error of a library on one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else f"{text[:180]}..."
