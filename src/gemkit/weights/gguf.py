"""Reads GGUF files, version 2 and 3, over mmap.

The format is llama.cpp's (ggml/docs/gguf.md): header, key-values, tensor infos, padding, tensor data. A file is
untrusted: every count, length, offset, type and shape is checked against the file's size before it is used, and nothing
is allocated by a number that the file merely claims.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemkit.errors import GemkitError
from gemkit.weights.quant import BLOCKS, GGML_NAMES, GGMLType

MAGIC = b"GGUF"
_ALIGNMENT = 32
_MAX_KEY = 65535
_MAX_ENTRIES = 1 << 20  # key-values or tensors; the largest Gemma has about a thousand

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
# value type → struct format of one element
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFArray:
    """An array value that is read only when asked for: `GGUFFile.numbers` or `GGUFFile.strings`."""

    element: int
    count: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor; `shape` is row-major ([rows, cols], the reverse of ggml's order), `data` a uint8 view of the file."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    data: np.ndarray


class GGUFFile:
    """An open GGUF file; a context manager.

    metadata: str → bool, int, float, str or `GGUFArray`. tensors: name → `GGUFTensor`, in the order of the file.
    Raises GemkitError with one line that says what is wrong with the file and what to do.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size == 0:
                    raise GemkitError(f"{self.path} is empty: download it again")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise GemkitError(f"cannot read {self.path}: {error.strerror or error}") from None
        self._size = len(self._map)
        self._at = 0
        self._key_value_spans: dict[str, tuple[int, int]] = {}
        self.metadata: dict[str, object] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the file as soon as no tensor's data is in use any more."""
        self.tensors = {}
        try:
            self._map.close()
        except BufferError:
            pass  # somebody still holds a view; the map goes when the last one does

    # -- values on demand

    def numbers(self, key: str) -> np.ndarray:
        """An array of numbers as a NumPy array of its own type."""
        array = self._array(key)
        if array.element not in _SCALARS or array.element == 7:
            raise self._error(f"{key} should be an array of numbers")
        dtype = np.dtype(_SCALARS[array.element])
        return np.frombuffer(self._map, dtype, array.count, array.offset).copy()

    def strings(self, key: str) -> list[bytes]:
        """An array of strings as raw bytes."""
        array = self._array(key)
        if array.element != _STRING:
            raise self._error(f"{key} should be an array of strings")
        data = self._map[array.offset : array.offset + array.nbytes]
        result, at, length = [], 0, _U64.unpack_from
        for _ in range(array.count):
            end = at + 8 + length(data, at)[0]
            result.append(data[at + 8 : end])
            at = end
        return result

    def digest(self, keys: Iterator[str]) -> str:
        """SHA-256 over the raw bytes of the named key-values, in their order in the file."""
        wanted = set(keys)
        sha = hashlib.sha256()
        for key, (start, end) in self._key_value_spans.items():
            if key in wanted:
                sha.update(self._map[start:end])
        return sha.hexdigest()

    def _array(self, key: str) -> GGUFArray:
        value = self.metadata.get(key)
        if not isinstance(value, GGUFArray):
            raise self._error(f"{key} is missing or is not an array")
        return value

    # -- reading

    def _error(self, what: str) -> GemkitError:
        return GemkitError(f"{self.path} is not a usable GGUF file: {what}; download it again or convert the model anew")

    def _need(self, count: int, what: str) -> int:
        """Advances by `count` bytes that must exist and returns where they begin."""
        start = self._at
        if count > self._size - start:
            raise self._error(f"it is cut short in {what} ({self._size} bytes, {start + count} needed)")
        self._at = start + count
        return start

    def _u32(self, what: str) -> int:
        return _U32.unpack_from(self._map, self._need(4, what))[0]

    def _u64(self, what: str) -> int:
        return _U64.unpack_from(self._map, self._need(8, what))[0]

    def _text(self, what: str, limit: int | None = None) -> str:
        length = self._u64(what)
        if limit is not None and length > limit:
            raise self._error(f"{what} is {length} bytes long")
        start = self._need(length, what)
        try:
            return self._map[start : start + length].decode()
        except UnicodeDecodeError:
            raise self._error(f"{what} is not UTF-8") from None

    def _read(self) -> None:
        if self._size < 24 or self._map[:4] != MAGIC:
            raise GemkitError(f"{self.path} is not a GGUF file: give the path of a .gguf file")
        self._at = 4
        version = self._u32("the header")
        if version not in (2, 3):
            if version in (1 << 25, 3 << 24, 2 << 24):
                raise GemkitError(f"{self.path} is a big-endian GGUF file, which gemkit does not read: get the usual one")
            raise GemkitError(f"{self.path} has GGUF version {version}; gemkit reads 2 and 3: get a newer conversion")
        tensor_count, pair_count = self._u64("the header"), self._u64("the header")
        if tensor_count > _MAX_ENTRIES or pair_count > _MAX_ENTRIES:
            raise self._error(f"it claims {tensor_count} tensors and {pair_count} metadata entries")
        for _ in range(pair_count):
            start = self._at
            key = self._text("a metadata key", _MAX_KEY)
            if key in self.metadata:
                raise self._error(f"metadata {key!r} stands twice")
            self.metadata[key] = self._value(self._u32(key), key)
            self._key_value_spans[key] = (start, self._at)
        if self.metadata.get("split.count", 0) not in (0, 1):
            raise GemkitError(f"{self.path} is one part of a split model: join the parts with gguf-split --merge")
        self._read_tensors(tensor_count)

    def _value(self, kind: int, key: str) -> object:
        if kind in _SCALARS:
            scalar = struct.Struct(_SCALARS[kind])
            return scalar.unpack_from(self._map, self._need(scalar.size, key))[0]
        if kind == _STRING:
            return self._text(f"the value of {key!r}")
        if kind != _ARRAY:
            raise self._error(f"{key!r} has the unknown value type {kind}")
        element, count = self._u32(key), self._u64(key)
        start = self._at
        if element in _SCALARS:
            self._need(count * struct.calcsize(_SCALARS[element]), key)
        elif element == _STRING:
            if count * 8 > self._size - start:
                raise self._error(f"{key!r} claims {count} strings")
            length, at = _U64.unpack_from, start
            try:
                for _ in range(count):
                    at += 8 + length(self._map, at)[0]
            except struct.error:
                at = self._size + 1
            self._need(at - start, key)
        else:
            raise self._error(f"{key!r} is an array of the unsupported type {element}")
        return GGUFArray(element, count, start, self._at - start)

    def _read_tensors(self, count: int) -> None:
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or not 8 <= alignment <= 1 << 20 or alignment % 8:
            raise self._error(f"general.alignment is {alignment!r}")
        infos = []
        seen = set()
        for _ in range(count):
            name = self._text("a tensor name", _MAX_KEY)
            if name in seen:
                raise self._error(f"tensor {name!r} stands twice")
            seen.add(name)
            axes = self._u32(name)
            if not 1 <= axes <= 4:
                raise self._error(f"tensor {name!r} has {axes} dimensions")
            shape = tuple(self._u64(name) for _ in range(axes))[::-1]
            infos.append((name, shape, self._u32(name), self._u64(name)))
        base = -(-self._at // alignment) * alignment
        spans = []
        for name, shape, number, offset in infos:
            kind = self._type(name, number)
            nbytes = self._nbytes(name, shape, kind)
            start = base + offset
            if offset % alignment:
                raise self._error(f"tensor {name!r} is not aligned to {alignment} bytes")
            if start + nbytes > self._size:
                raise self._error(f"it is cut short in tensor {name!r} ({self._size} bytes, {start + nbytes} needed)")
            spans.append((start, start + nbytes, name))
            data = np.frombuffer(self._map, np.uint8, nbytes, start)
            self.tensors[name] = GGUFTensor(name, kind, shape, data)
        spans.sort()
        for (_, end, name), (start, _, other) in zip(spans, spans[1:], strict=False):
            if start < end:
                raise self._error(f"tensors {name!r} and {other!r} overlap")

    def _type(self, name: str, number: int) -> GGMLType:
        try:
            return GGMLType(number)
        except ValueError:
            known = ", ".join(kind.name for kind in GGMLType)
            found = GGML_NAMES.get(number, f"number {number}")
            raise GemkitError(
                f"{self.path}: tensor {name!r} has the type {found}, which gemkit does not read ({known}): "
                "get the model in one of these"
            ) from None

    def _nbytes(self, name: str, shape: tuple[int, ...], kind: GGMLType) -> int:
        block = BLOCKS[kind]
        elements = 1
        for extent in shape:
            if extent == 0:
                raise self._error(f"tensor {name!r} has the shape {list(shape)}")
            elements *= extent
            if elements > 8 * self._size:  # no format stores an element in less than a bit
                raise self._error(f"tensor {name!r} of shape {list(shape)} is larger than the file")
        if shape[-1] % block.elements:
            raise self._error(f"rows of tensor {name!r} ({shape[-1]}) are not whole {kind.name} blocks of {block.elements}")
        return elements // block.elements * block.bytes
