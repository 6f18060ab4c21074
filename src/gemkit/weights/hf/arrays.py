"""NumPy arrays by name in one safetensors file: `write_arrays` and `read_arrays`; the header for every writer."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemkit.errors import GemkitError
from gemkit.weights.hf.safetensors import SafetensorsFile

_TYPES = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
_NAMES = {np.dtype(text): name for name, text in _TYPES.items()}
_BLOCK = 1 << 22


def header(entries: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors header, padded to 8 bytes.

    entries: by name, in the order of their bytes: the format's type, the shape and the size in bytes.
    """
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape, size) in entries.items():
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> int:
    """Write arrays of booleans, integers or floats to a new file, and return the CRC-32 of its bytes.

    Wide elements come first, so that every array is aligned in the file. The data are on the disk, not in a buffer of
    the system, when it returns. Raises OSError.
    """
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    entries = {name: (_NAMES[arrays[name].dtype], arrays[name].shape, arrays[name].nbytes) for name in order}
    with open(path, "xb") as file:
        head = header(entries, metadata or {"format": "np"})
        file.write(head)
        checksum = zlib.crc32(head)
        for name in order:
            data = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
            for at in range(0, data.nbytes, _BLOCK):
                block = data[at : at + _BLOCK]
                file.write(block)
                checksum = zlib.crc32(block, checksum)
        file.flush()
        os.fsync(file.fileno())
    return checksum


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the arrays of a file by name, read-only views of the mapped file.

    Raises GemkitError if the file is broken, or has a type that NumPy lacks, such as BF16.
    """
    with SafetensorsFile(Path(path)) as file:
        for name, entry in file.tensors.items():
            if entry.dtype not in _TYPES:
                raise GemkitError(f"{path}: the tensor {name!a} is {entry.dtype}, which NumPy lacks: convert the file")
        return {
            name: file.data(name).view(_TYPES[entry.dtype]).reshape(entry.shape) for name, entry in file.tensors.items()
        }


def checksum(path: str | os.PathLike[str]) -> int:
    """Return the CRC-32 of a file's bytes. Raises OSError."""
    found = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            found = zlib.crc32(block, found)
    return found
