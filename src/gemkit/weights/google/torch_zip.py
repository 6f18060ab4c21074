"""Reader of ``torch.save`` files, zips with a pickle and an entry per storage, without torch and without pickle.

A pickle is a program. A small interpreter runs the few instructions that tensors need: it builds strings, integers,
floats, tuples, lists and dictionaries, and calls only OrderedDict, the rebuilding of a tensor and of a parameter.
Anything else is refused by name; no module is imported and no code of the file is run.

The file is not trusted: entries, sizes, strides and offsets are checked before they are used, and a fault raises
GemkitError. Storages are views of the mapped file. Format: ``torch/serialization.py`` and ``torch/_utils.py``.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import numpy as np

from gemkit.errors import GemkitError
from gemkit.weights.hf.safetensors import shown
from gemkit.weights.mapped import MappedFile

# The element types: name as in safetensors, bytes
STORAGES = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
    "ShortStorage": ("I16", 2),
    "IntStorage": ("I32", 4),
    "LongStorage": ("I64", 8),
    "DoubleStorage": ("F64", 8),
    "ComplexFloatStorage": ("C64", 8),
}

_MAX_PICKLE = 16 << 20  # that of a model with a thousand tensors has 200 kB
_MAX_ENTRIES = 100_000
_MAX_DIMENSIONS = 8
_OLD_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True)
class TorchTensor:
    """One tensor. dtype: as in safetensors, e.g. "BF16". offset: its first element in the storage. strides: elements.

    storage: the name of its entry; elements: the size of that storage.
    """

    dtype: str
    itemsize: int
    storage: str
    elements: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True)
class _Global:
    """A supported global that the pickle refers to."""

    module: str
    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    itemsize: int
    key: str
    elements: int


class TorchFile(MappedFile):
    """An open file of ``torch.save``; a context manager. Only the pickle is read.

    value: the saved object, of dictionaries, lists, tuples, strings, integers, floats and `TorchTensor`.
    Raises GemkitError if the file is broken or contains other objects.
    """

    kind = ".ckpt"

    def data(self, tensor: TorchTensor, name: str) -> np.ndarray:
        """Return a tensor's bytes, uint8 [*shape, itemsize]: a view of the mapped file. name: for messages."""
        buffer = self._buffer()
        begin, size = self._entry(f"data/{tensor.storage}", name)
        if size != tensor.elements * tensor.itemsize:
            self._fail(f"the storage of {name} has {size} bytes, not {tensor.elements} numbers of {tensor.dtype}")
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
        if math.prod(tensor.shape) and last >= tensor.elements:
            self._fail(f"{name} reaches to element {last} of a storage that has {tensor.elements}")
        strides = (*(step * tensor.itemsize for step in tensor.strides), 1)
        return np.ndarray(
            (*tensor.shape, tensor.itemsize), np.uint8, buffer, begin + tensor.offset * tensor.itemsize, strides
        )

    # --- the zip -----------------------------------------------------------------------------------------------------

    def _look(self, file: BinaryIO) -> None:
        start = file.read(len(_OLD_MAGIC))
        if start == _OLD_MAGIC:
            self._fail("torch before 1.6 wrote it", "save it again with a newer torch")
        if start[:2] != b"PK":
            self._fail("it is no file of torch.save", "give the path of a .ckpt file")
        self._entries = self._open_zip(file)

    def _open_zip(self, file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
        """Return the entries by name below the archive's one folder."""
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
            self._fail(f"it is no whole zip archive ({str(error)[:100]!r})")
        if len(infos) > _MAX_ENTRIES:
            self._fail(f"it has {len(infos)} entries")
        entries: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            folder, _, name = info.filename.partition("/")
            if not folder or not name or ".." in info.filename.split("/") or "\\" in info.filename:
                self._fail(f"its entry {shown(info.filename)} is outside the archive's folder")
            if name in entries:
                self._fail(f"it has two entries {shown(name)}")
            entries[name] = info
        if "data.pkl" not in entries:
            self._fail("it has no data.pkl, as files of torch.save have", "give the path of a .ckpt file")
        return entries

    def _entry(self, name: str, wanted_by: str) -> tuple[int, int]:
        """Return an entry's offset and size in the file."""
        info = self._entries.get(name)
        if info is None:
            self._fail(f"{wanted_by} needs the entry {shown(name)}, which is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            self._fail(f"the entry {shown(name)} is compressed or encrypted", "save it again with torch.save")
        if info.header_offset < 0 or info.header_offset + _LOCAL_HEADER.size > self._size:
            self._fail(f"the entry {shown(name)} of {wanted_by} begins outside the file")
        head = _LOCAL_HEADER.unpack_from(self._map, info.header_offset)
        begin = info.header_offset + _LOCAL_HEADER.size + head[-2] + head[-1]
        if head[0] != b"PK\x03\x04" or begin + info.file_size > self._size:
            self._fail(f"the entry {shown(name)} of {wanted_by} has no header or reaches past the end of the file")
        return begin, info.file_size

    # --- the pickle --------------------------------------------------------------------------------------------------

    def _parse(self) -> None:
        if "byteorder" in self._entries:
            begin, size = self._entry("byteorder", "the file")
            if self._map[begin : begin + min(size, 16)].strip() != b"little":
                self._fail("its numbers are not little-endian", "save it again on a common machine")
        begin, size = self._entry("data.pkl", "the file")
        if size > _MAX_PICKLE:
            self._fail(f"its pickle has {size} bytes, far more than a model's needs")
        machine = _Machine(self._fail)
        try:
            self.value = machine.run(self._map[begin : begin + size])
        except GemkitError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
            self._fail(f"its pickle is broken ({' '.join(str(error).split())[:100]!a})")


class _Machine:
    """Runs a pickle's instructions as far as tensors need them."""

    def __init__(self, fail: Callable[..., NoReturn]) -> None:
        self._fail = fail
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> object:
        for code, argument, _ in pickletools.genops(data):
            if code.name == "STOP":
                (value,) = self._stack
                return value
            step = _STEPS.get(code.name)
            if step is None:
                self._refuse(f"the instruction {code.name}")
            step(self, argument)
        raise ValueError("it does not end")

    def _refuse(self, what: str) -> NoReturn:
        self._fail(f"its pickle asks for {what}, which no tensor needs", "it may be harmful: get safetensors instead")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise ValueError("nothing is on its stack")
        return self._stack.pop()

    def to_mark(self) -> list[Any]:
        at = self._marks.pop()
        values = self._stack[at:]
        del self._stack[at:]
        return values

    def mark(self, _: object) -> None:
        self._marks.append(len(self._stack))

    def put(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def memoize(self, _: object) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, number: int) -> None:
        self.push(self._memo[number])

    def small_tuple(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def append(self, values: list[Any]) -> None:
        target = self._top(list)
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):  # a tuple could be one that takes hours to hash
                raise ValueError(f"a key is a {type(key).__name__}")
            target[key] = value

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise ValueError(f"no {kind.__name__} is on its stack")
        return self._stack[-1]

    def name(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name is no text")
        if not (module == "torch" and name in STORAGES) and (module, name) not in _CALLS:
            self._refuse(shown(f"{module}.{name}"))
        self.push(_Global(module, name))

    def stack_name(self, _: object) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def storage(self, _: object) -> None:
        """Check the persistent id ("storage", type, key, device, elements)."""
        kind, storage, key, _device, elements = self.pop()
        if kind != "storage" or not isinstance(storage, _Global) or storage.name not in STORAGES:
            raise ValueError("a reference is to no storage")
        if not isinstance(key, str) or not key.isascii() or not key.isdigit() or len(key) > 9:
            raise ValueError(f"a storage is called {_plain(key)}")
        dtype, itemsize = STORAGES[storage.name]
        self.push(_Storage(dtype, itemsize, key, _count(elements)))

    def call(self, _: object) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no function")
        made = _CALLS.get((function.module, function.name))
        if made is None:
            raise ValueError("it calls a type of storage")
        self.push(made(*arguments))

    def build(self, _: object) -> None:
        """Ignore the attributes of a state dictionary, its _metadata."""
        self.pop()
        self._top(dict)


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"a size is {_plain(value)}")
    return value


def _plain(value: object) -> str:
    """Return a value for a message. A tuple may hold itself so often that its text would fill the memory."""
    return shown(value) if type(value) in (str, int, float) else f"a {type(value).__name__}"


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS:
        raise ValueError(f"a shape is a {type(value).__name__}, or too long")
    return tuple(_count(number) for number in value)


def _tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> TorchTensor:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor has no storage")
    shape, strides = _counts(shape), _counts(strides)
    if len(shape) != len(strides):
        raise ValueError("a tensor has more or fewer strides than axes")
    if math.prod(shape) > storage.elements:
        raise ValueError(f"a tensor of shape {shape} has more numbers than its storage")
    return TorchTensor(storage.dtype, storage.itemsize, storage.key, storage.elements, _count(offset), shape, strides)


def _parameter(tensor: object, *_: object) -> TorchTensor:
    if not isinstance(tensor, TorchTensor):
        raise ValueError("a parameter is no tensor")
    return tensor


def _ordered_dict(*arguments: object) -> dict[Any, Any]:
    if arguments and arguments != ([],):
        raise ValueError("an OrderedDict is made of something")
    return {}


_CALLS: dict[tuple[object, object], Callable[..., object]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): _ordered_dict,
}


def _skip(machine: _Machine, argument: object) -> None:
    pass


_STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": _skip,
    "FRAME": _skip,
    "MARK": _Machine.mark,
    "GLOBAL": lambda machine, text: machine.name(*text.split(" ", 1)),
    "STACK_GLOBAL": _Machine.stack_name,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.small_tuple(1),
    "TUPLE2": lambda machine, _: machine.small_tuple(2),
    "TUPLE3": lambda machine, _: machine.small_tuple(3),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.to_mark())),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.to_mark()),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), _Machine.push
    ),
}
