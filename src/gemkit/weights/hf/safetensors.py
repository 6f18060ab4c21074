"""Reader of safetensors files, a header in JSON and the tensors' bytes, memory-mapped; independent of models.

The file is not trusted: every length, offset, type and dimension is checked before it is used, and a fault raises
GemkitError. As the format demands, tensors follow each other without gaps or overlaps from the header to the end of the
file. Format: "Format" in the README of github.com/huggingface/safetensors; sizes: ``safetensors/src/tensor.rs``.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gemkit.errors import GemkitError, listed
from gemkit.weights import folder as rules
from gemkit.weights.folder import INDEX, SINGLE
from gemkit.weights.git_lfs import HEAD, refuse_pointer
from gemkit.weights.json_file import parse_object, read_object
from gemkit.weights.mapped import MappedFile, shown
from gemkit.weights.quant import GGMLType

# Bits of one element
DTYPES = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

# Those that gemkit computes with
TYPES = {"F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}

_MAX_HEADER = 100_000_000
_MAX_DIMENSIONS = 64  # NumPy's


@dataclass(frozen=True)
class Entry:
    """One tensor. dtype: the format's name, a key of `DTYPES`. shape: row-major. Its bytes are file[begin:end]."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile(MappedFile):
    """An open safetensors file; a context manager. Only the header is read.

    tensors: by name, in the order of their bytes. metadata: the header's own strings, often {"format": "pt"}.
    Raises GemkitError if the file is broken.
    """

    kind = "safetensors"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, Entry] = {}
        super().__init__(path)

    def data(self, name: str) -> np.ndarray:
        """Return a tensor's bytes, uint8, flat: a view of the mapped file. KeyError if there is none of that name."""
        entry = self.tensors[name]
        return np.frombuffer(self._buffer(), np.uint8, entry.end - entry.begin, entry.begin)

    def __repr__(self) -> str:
        return f"<safetensors file {str(self.path)!r}, {len(self.tensors)} tensors>"

    # --- the parser ------------------------------------------------------------------------------------------------

    def _look(self, file: BinaryIO) -> None:
        if os.fstat(file.fileno()).st_size < 8:
            self._fail("it is too short to be a safetensors file")

    def _parse(self) -> None:
        size = self._size
        refuse_pointer(self.path, self._map[: len(HEAD)])
        (length,) = struct.unpack_from("<Q", self._map)
        start = 8 + length
        if self._map[8:9] != b"{":
            self._fail("it is not a safetensors file", "give the path of one")
        if length > _MAX_HEADER:
            self._fail(f"its header has {length} bytes, allowed are {_MAX_HEADER}")
        if start > size:
            self._fail(f"its header has {length} bytes and reaches past the end of the file, which has {size}")
        try:
            header = parse_object(self._map[8:start])
        except ValueError as error:
            self._fail(f"its header is no JSON object ({error})")
        self._metadata(header.pop("__metadata__", None))
        rows = sorted(
            ((name, self._entry(name, value, start)) for name, value in header.items()),
            key=lambda row: (row[1].begin, row[1].end),
        )
        end, before = start, "the header"
        for name, entry in rows:
            if entry.begin != end:
                relation = "overlap" if entry.begin < end else "have a gap between them"
                self._fail(f"{before} and the tensor {shown(name)} {relation}")
            end, before = entry.end, f"the tensor {shown(name)}"
            if end > size:
                self._fail(f"{before} ends at byte {end}, past the end of the file, which has {size} bytes")
        if end != size:
            self._fail(f"{size - end} bytes follow {before}, which should be the last")
        self.tensors = dict(rows)

    def _metadata(self, value: object) -> None:
        if value is None:
            return
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            self._fail("its __metadata__ is not an object of strings")
        self.metadata = value

    def _entry(self, name: str, value: object, start: int) -> Entry:
        label = f"the tensor {shown(name)}"
        if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
            self._fail(f"{label} lacks a dtype, shape or data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            self._fail(f"{label} has the unknown type {shown(dtype)}", "get a version in BF16, F16 or F32")
        if not _counts(shape) or len(shape) > _MAX_DIMENSIONS:
            self._fail(f"{label} has the shape {shown(shape)}, not a list of whole numbers")
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            self._fail(f"{label} has the data_offsets {shown(offsets)}, not where it begins and ends")
        bits = math.prod(shape) * DTYPES[dtype]
        if bits != 8 * (offsets[1] - offsets[0]):
            self._fail(f"{label} has {offsets[1] - offsets[0]} bytes, not those of {dtype} {shown(shape)}")
        return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


class ShardedFiles:
    """The weights of one model in one or more safetensors files; a context manager.

    tensors: by name, of all files. files: the open files. metadata: the first file's.
    """

    def __init__(self, files: tuple[SafetensorsFile, ...]) -> None:
        self.files = files
        self._file_of = {name: file for file in files for name in file.tensors}  # the last file counts
        self.tensors: Mapping[str, Entry] = {name: file.tensors[name] for name, file in self._file_of.items()}

    @property
    def metadata(self) -> dict[str, str]:
        return self.files[0].metadata

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._file_of[name].path

    def data(self, name: str) -> np.ndarray:
        """Return a tensor's bytes; see `SafetensorsFile.data`."""
        return self._file_of[name].data(name)

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> ShardedFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_weights(folder: str | os.PathLike[str], name: str | None = None) -> ShardedFiles:
    """Open a folder's weights: ``model.safetensors``, or the shards of its index, or its only safetensors file.

    name: the file or index to open instead, where ``config.json`` gives one. The shards of an index are read whole, as
    transformers does: which tensor it puts where does not matter, and of a tensor that two shards have the last counts.
    Raises GemkitError if there are no weights or a file is broken or missing.
    """
    folder = Path(folder)
    if name is not None:
        if not _is_inside(name):
            raise GemkitError(f"{folder}: config.json takes its weights from {shown(name)}, no file of it; mend that")
        return _open_shards(folder / name) if name.endswith(".json") else _one(folder / name)
    if os.path.lexists(folder / SINGLE):
        return _one(folder / SINGLE)
    if os.path.lexists(folder / INDEX):
        return _open_shards(folder / INDEX)
    try:
        files = rules.top_level(folder)
        inner = sorted(path.parent.name for path in folder.glob("*/" + rules.CONFIG))
    except OSError as error:
        raise GemkitError(f"{folder} cannot be read ({error.strerror or error}): check the path") from None
    names = rules.safetensors_of(files)
    if len(names) == 1 and not rules.is_shard(names[0]):
        return _one(folder / names[0])
    raise GemkitError(f"{folder} {_no_weights(files, names, inner)}")


def _no_weights(files: list[str], names: list[str], inner: list[str]) -> str:
    """Explain why a folder's weights cannot be opened. names: its safetensors; inner: subfolders that may be models."""
    if any(map(rules.is_shard, names)):
        return f"has shards of a model but no {INDEX}: get that file too"
    if names:
        return f"has {len(names)} safetensors files and none named {SINGLE} ({listed(names)}): leave one there"
    if any(map(rules.is_adapter_file, files)):
        return "holds an adapter, not a model: give the model's path, and this one as --adapter-path"
    if pickles := rules.pickles_of(files):
        return (
            f"has no safetensors, only pickled weights ({listed(pickles)}), which can run programs: get a "
            "version in safetensors, or save it again with transformers where you trust it (save_pretrained)"
        )
    if "zero_to_fp32.py" in files:
        return "holds the parts of a DeepSpeed run, not a model: run its zero_to_fp32.py, with --safe_serialization"
    if inner:
        return f"has no safetensors files, but there are models in it: give one, such as {listed(inner)}"
    return "has no safetensors files: check the path"


def _one(path: Path) -> ShardedFiles:
    return ShardedFiles((SafetensorsFile(path),))


def _open_shards(index: Path) -> ShardedFiles:
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise GemkitError(f"{index} has no weight_map; get the file again")
    for tensor, name in shards.items():
        if not isinstance(name, str) or not _is_inside(name) or not name.endswith(".safetensors"):
            raise GemkitError(
                f"{index} puts {shown(tensor)} into {shown(name)}, which is no name of a file next to it; get it again"
            )
    names = sorted(set(shards.values()))
    absent = [name for name in names if not (index.parent / name).exists()]
    if absent:
        count = f", {len(absent)} of {len(names)} shards," if len(absent) > 1 else ""
        raise GemkitError(
            f"{index.parent / absent[0]}{count} is missing, though {index.name} names it: get that file too"
        )
    files: list[SafetensorsFile] = []
    try:
        for name in names:
            files.append(SafetensorsFile(index.parent / name))
    except BaseException:
        for file in files:
            file.close()
        raise
    return ShardedFiles(tuple(files))


def _is_inside(name: str) -> bool:
    """Return whether a file's name, possibly in a subfolder, stays inside its folder on every system."""
    parts = name.split("/")
    return name.isprintable() and not re.search(r"[\\:]", name) and not any(p in ("", ".", "..") for p in parts)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)
