"""The GGUF container: a memory-mapped file of key-values and tensors, independent of models.

The file is not trusted: every count, length, offset, type and dimension is checked against the file's size before it
is used, and a fault raises GemkitError. Arrays are read on demand.
Format: ``docs/gguf.md`` of the ggml library, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

import numpy as np

from gemkit.weights.git_lfs import refuse_pointer
from gemkit.weights.mapped import MappedFile, shown
from gemkit.weights.quant import BLOCKS, OTHER_TYPES, GGMLType

MAGIC = b"GGUF"
ALIGNMENT = 32  # of tensors, unless general.alignment says otherwise

# Value types: number, struct code; NumPy takes the same codes
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY, BOOL, UINT32 = 8, 9, 7, 4

_HEAD = 64  # bytes by which other files are told
_OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg")  # ggml, ggmf, ggjt as little-endian integers

_MAX_NAME = 1 << 16
_MAX_DIMENSIONS = 4
# Minimum sizes: a key-value (length, one letter, type, one byte) and a tensor (one letter, one dimension).
_MIN_KEY_VALUE = 8 + 1 + 4 + 1
_MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """One tensor. shape: row-major, the reverse of ggml's order. data: uint8, flat, a view of the mapped file."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    data: np.ndarray


class GGUFArray:
    """An array value that is read when asked for. len() is its length; type its elements' GGUF value type."""

    def __init__(self, file: GGUFFile, type: int, count: int, start: int, starts: np.ndarray | None) -> None:
        self.type = type
        self._file, self._count, self._start, self._starts = file, count, start, starts

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"<array of {self._count} values of GGUF type {self.type}>"

    def numbers(self) -> np.ndarray:
        """Return a copy as a NumPy array [count]; raises GemkitError for strings."""
        if self.type == STRING:
            self._file._fail("an array of numbers holds strings")
        dtype = np.dtype("u1" if self.type == BOOL else SCALARS[self.type])
        values = np.frombuffer(self._file._buffer(), dtype, self._count, self._start)
        return values != 0 if self.type == BOOL else values.copy()

    def strings(self) -> list[bytes]:
        """Return the strings as they are in the file; raises GemkitError for an array of another type."""
        if self.type != STRING or self._starts is None:
            self._file._fail("an array of strings holds numbers")
        if not self._count:
            return []
        edges = self._starts.tolist()
        blob = self._file._buffer()[self._start : edges[-1]]
        base = self._start
        return [blob[a + 8 - base : b - base] for a, b in pairwise(edges)]


class GGUFFile(MappedFile):
    """An open GGUF file; a context manager. Raises GemkitError if it is broken or not one that gemkit reads.

    metadata: the key-values; an array is a `GGUFArray`, anything else a str, int, float or bool.
    tensors: by name, in the file's order; their data ends with `close`.
    part: accept one of the files of a split model, too; see `gguf_parts`.
    """

    kind = "GGUF"

    def __init__(self, path: str | os.PathLike[str], part: bool = False) -> None:
        self._part = part
        self.metadata: dict[str, object] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        super().__init__(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str], part: bool = False) -> GGUFFile:
        """Map the file and read its header; tensor data and arrays stay where they are."""
        return cls(path, part)

    def close(self) -> None:
        """Close the file. Views of its tensors that are still referenced keep the mapping alive."""
        self.tensors = {}
        super().close()

    def raw(self, key: str) -> bytes:
        """Return a key-value's bytes as stored: key, type and value. KeyError if there is none."""
        start, end = self._spans[key]
        return self._buffer()[start:end]

    def digest(self, keys: Sequence[str]) -> str:
        """Return the SHA-256 (hexadecimal) of the stored bytes of these key-values, in this order."""
        digest = hashlib.sha256()
        for key in keys:
            digest.update(self.raw(key))
        return digest.hexdigest()

    # --- the parser ------------------------------------------------------------------------------------------------

    def _look(self, file: BinaryIO) -> None:
        head = file.read(_HEAD)
        if head[:4] != MAGIC:
            refuse_pointer(self.path, head)
            self._fail(*_stranger(head))
        if os.fstat(file.fileno()).st_size < 24:
            self._fail("it is too short to be a GGUF file")

    def _take(self, count: int, what: str) -> int:
        """Move `count` bytes on and return where they start."""
        start = self._at
        if count > self._size - start:
            self._fail(f"{what} at byte {start} reaches past the end of the file, which has {self._size} bytes")
        self._at = start + count
        return start

    def _u32(self, what: str) -> int:
        return _U32.unpack_from(self._map, self._take(4, what))[0]

    def _u64(self, what: str) -> int:
        return _U64.unpack_from(self._map, self._take(8, what))[0]

    def _text(self, what: str, limit: int | None = None) -> str:
        length = self._u64(f"the length of {what}")
        if limit is not None and not 0 < length <= limit:
            self._fail(f"{what} has {length} bytes, allowed are 1 to {limit}")
        start = self._take(length, what)
        try:
            return self._map[start : start + length].decode()
        except UnicodeDecodeError:
            self._fail(f"{what} at byte {start} is not UTF-8")

    def _count(self, what: str, least: int) -> int:
        """Read a count of items that take at least `least` bytes each."""
        count = self._u64(f"the number of {what}")
        if count > (self._size - self._at) // least:
            self._fail(f"it announces {count} {what}, more than its {self._size} bytes can hold")
        return count

    def _parse(self) -> None:
        self._at = 4
        version = self._u32("the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind, remedy = f"GGUF version {version}", "get a newer conversion"
            if swapped in (2, 3):
                kind, remedy = "big-endian GGUF", "get the little-endian file, or run gguf-convert-endian FILE little"
            self._fail(f"it is {kind}", f"gemkit reads little-endian versions 2 and 3: {remedy}")
        tensor_count = self._u64("the number of tensors")
        key_values = self._count("key-values", _MIN_KEY_VALUE)
        for _ in range(key_values):
            self._key_value()
        if (splits := self.metadata.get("split.count", 0)) not in (0, 1) and not self._part:
            self._fail(f"it is one of {splits} parts of a split model", "join them with llama-gguf-split --merge")
        if tensor_count > (self._size - self._at) // _MIN_TENSOR:
            self._fail(f"it announces {tensor_count} tensors, more than its {self._size} bytes can hold")
        self._tensors(tensor_count, self._alignment())

    def _key_value(self) -> None:
        start = self._at
        key = self._text("a key", _MAX_NAME)
        if key in self.metadata:
            self._fail(f"the key {shown(key)} appears twice")
        value_type = self._u32(f"the type of {shown(key)}")
        if value_type == STRING:
            value: object = self._text(f"the value of {shown(key)}")
        elif value_type == ARRAY:
            value = self._array(key)
        elif value_type in SCALARS:
            code = SCALARS[value_type]
            at = self._take(struct.calcsize(code), f"the value of {shown(key)}")
            if value_type == BOOL and self._map[at] > 1:
                self._fail(f"the value of {shown(key)} is neither true nor false")
            (value,) = struct.unpack_from(code, self._map, at)
        else:
            self._fail(f"the value of {shown(key)} has the unknown type {value_type}")
        self.metadata[key] = value
        self._spans[key] = start, self._at

    def _array(self, key: str) -> GGUFArray:
        item_type = self._u32(f"the type of {shown(key)}")
        if item_type == ARRAY:
            self._fail(f"the value of {shown(key)} is an array of arrays", "gemkit reads flat ones: convert it again")
        if item_type == STRING:
            count = self._count(f"strings in {shown(key)}", 8)
            start = self._at
            return GGUFArray(self, item_type, count, start, self._walk(key, count))
        if item_type not in SCALARS:
            self._fail(f"the array {shown(key)} has elements of the unknown type {item_type}")
        size = struct.calcsize(SCALARS[item_type])
        count = self._count(f"numbers in {shown(key)}", size)
        return GGUFArray(self, item_type, count, self._take(count * size, shown(key)), None)

    def _walk(self, key: str, count: int) -> np.ndarray:
        """Move past `count` strings; return int64 [count + 1], where each starts and where the last one ends."""
        starts = self._guess(count)
        if starts is None:
            starts = np.empty(count + 1, np.int64)
            read, buffer, at, last = _U64.unpack_from, self._map, self._at, self._size - 8
            for i in range(count):
                if at > last:
                    self._fail(f"string {i} of {shown(key)} reaches past the end of the file")
                starts[i] = at
                at += 8 + read(buffer, at)[0]
            if at > self._size:
                self._fail(f"string {count - 1} of {shown(key)} reaches past the end of the file")
            starts[count] = at
        self._at = int(starts[-1])
        return starts

    def _guess(self, count: int) -> np.ndarray | None:
        """Do as `_walk` without a loop, for strings below 256 bytes without runs of zeros; None for others.

        A length is then one byte and seven zeros, and seven zeros are found nowhere else: all lengths are found at
        once, and the chain is checked: each string must end where the next length begins.
        """
        if count < 64:
            return None
        room = np.frombuffer(self._map, np.uint8, min(self._size - self._at, 40 * count), self._at)
        zero = room == 0
        two = zero[:-1] & zero[1:]
        four = two[:-2] & two[2:]
        found = np.flatnonzero(four[1:-3] & four[4:])[:count]
        if len(found) < count or found[0] != 0:
            return None
        ends = found + 8 + room[found]
        if not np.array_equal(found[1:], ends[:-1]) or ends[-1] > len(room):
            return None
        return np.append(found, ends[-1]).astype(np.int64) + self._at

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            self._fail(f"general.alignment is {shown(alignment)}, not a power of two from 8 to 65536")
        return alignment

    def _tensors(self, count: int, alignment: int) -> None:
        rows: list[tuple[int, int, str, GGMLType, tuple[int, ...]]] = []
        names = set()
        for _ in range(count):
            name = self._text("a tensor's name", _MAX_NAME)
            if name in names:
                self._fail(f"the tensor {shown(name)} appears twice")
            names.add(name)
            rows.append(self._tensor(name, alignment))
        base = -(-self._at // alignment) * alignment
        end, before = 0, ""
        for offset, size, name, _, _ in sorted(rows):
            if offset < end:
                self._fail(f"the tensors {shown(before)} and {shown(name)} overlap")
            end, before = offset + size, name
        if rows and base + end > self._size:
            self._fail(
                f"the tensor {shown(before)} reaches past the end of the file, of which {self._size:,} of at least "
                f"{base + end:,} bytes are present",
                "it was not copied or downloaded whole: get it again",
            )
        for offset, size, name, kind, shape in rows:
            data = np.frombuffer(self._map, np.uint8, size, base + offset)
            self.tensors[name] = GGUFTensor(name, kind, shape, data)

    def _tensor(self, name: str, alignment: int) -> tuple[int, int, str, GGMLType, tuple[int, ...]]:
        dimensions = self._u32(f"the dimensions of {shown(name)}")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            self._fail(f"the tensor {shown(name)} has {dimensions} dimensions, allowed are 1 to {_MAX_DIMENSIONS}")
        shape = tuple(self._u64(f"the shape of {shown(name)}") for _ in range(dimensions))[::-1]
        number = self._u32(f"the type of {shown(name)}")
        offset = self._u64(f"the offset of {shown(name)}")
        if number in OTHER_TYPES:
            types = ", ".join(kind.name for kind in GGMLType)
            self._fail(
                f"the tensor {shown(name)} is {OTHER_TYPES[number]}", f"gemkit reads {types}: quantise it as one"
            )
        if number not in GGMLType._value2member_map_:
            self._fail(f"the tensor {shown(name)} has the unknown type {number}")
        kind = GGMLType(number)
        block = BLOCKS[kind]
        if 0 in shape:
            self._fail(f"the tensor {shown(name)} has an empty dimension: {shape}")
        if shape[-1] % block.elements:
            self._fail(f"the rows of {shown(name)}, {shape[-1]} long, are not whole {kind.name} blocks")
        size = math.prod(shape) // block.elements * block.bytes
        if offset % alignment:
            self._fail(f"the tensor {shown(name)} is not aligned to {alignment} bytes")
        return offset, size, name, kind, shape


def _stranger(head: bytes) -> tuple[str, str]:
    """Return the kind of a file that begins with these bytes and is not GGUF, and the remedy."""
    if not head:
        return "it is empty", "the download or copy did not finish: get the file again"
    if not head.strip(b"\0"):
        return "it begins with zeros, not as a GGUF file does", "the download did not finish: get the file again"
    if head.lstrip()[:1] == b"<":
        return (
            "it is a web page, not a model",
            "open its address in a browser to see what is asked for, and get the file",
        )
    if head[:4] in _OLD_MAGICS:
        return "it is in a format older than GGUF", "get a newer conversion"
    if head[:4] == b"PK\3\4":
        return "it is a zip archive, not a GGUF file", "unpack it, or give it its own file name extension"
    if head[8:9] == b"{":
        return "it is a safetensors file, not GGUF", "name it .safetensors and put it next to its config.json"
    return "it is not a GGUF file", "give the path of one, or convert the model to GGUF"
