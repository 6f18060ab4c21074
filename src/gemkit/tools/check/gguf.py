"""Reads a GGUF file for the rules, as much of it as there is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemkit.errors import GemkitError
from gemkit.text.special import is_control_piece
from gemkit.text.vocabulary import PieceType
from gemkit.tools.check.finding import fault_of
from gemkit.tools.check.subject import GGUF, Subject, TensorView, Tokens
from gemkit.weights.gguf.container import ALIGNMENT, STRING, GGUFArray, GGUFFile, shown
from gemkit.weights.gguf.read import ARCHITECTURES, config_from_metadata, names
from gemkit.weights.quant import BLOCKS, OTHER_TYPES, Block, GGMLType

# Sizes of the types that gemkit does not read, by their value in ggml, to see whether such a tensor is complete.
_OTHER_BLOCKS = {9: (32, 40), 10: (256, 84), 11: (256, 110), 15: (256, 292), 16: (256, 66), 17: (256, 74)}
_OTHER_BLOCKS |= {18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136)}
_OTHER_BLOCKS |= {24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 34: (256, 54)}
_OTHER_BLOCKS |= {35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18)}

_READ = frozenset(int(kind) for kind in GGMLType)
_MAX_TENSORS = 100_000
_MAX_PIECES = 2_000_000


class _Lenient(GGUFFile):
    """A GGUF file of which a part may be missing: a fault is written down, and what came before it is kept."""

    def __init__(self, path: Path) -> None:
        self.faults: list[str] = []
        self.cut: list[str] = []
        self.views: list[tuple[str, str, tuple[int, ...], GGMLType | None, np.ndarray | None]] = []
        super().__init__(path)

    def _parse(self) -> None:
        try:
            super()._parse()
            for tensor in self.tensors.values():
                self.views.append((tensor.name, tensor.type.name, tensor.shape, tensor.type, tensor.data))
        except GemkitError as error:
            self._salvage(str(error))

    def _salvage(self, fault: str) -> None:
        """Read again from the start, up to the first byte that cannot be read."""
        self.metadata, self.tensors, self._spans, self._at = {}, {}, {}, 4
        try:
            if self._map[:4] != b"GGUF" or self._u32("the version") not in (2, 3):
                self.faults.append(fault)
                return
            tensors, pairs = self._u64("the number of tensors"), self._u64("the number of key-values")
            for _ in range(min(pairs, _MAX_TENSORS)):
                self._key_value()
            rows = self._infos(min(tensors, _MAX_TENSORS))
        except GemkitError as error:
            self.faults.append(str(error))
            return
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16:
            self.faults.append(fault)
            return
        self._views(rows, -(-self._at // alignment) * alignment)
        # Explanations of the fault: a truncated file, or types that other programs read.
        types = {number for _, _, number, _ in rows}
        others = types & set(OTHER_TYPES)
        if not self.cut and not (others and types <= others | _READ):
            self.faults.append(fault)

    def _infos(self, count: int) -> list[tuple[str, tuple[int, ...], int, int]]:
        rows = []
        for _ in range(count):
            name = self._text("a tensor's name", 1 << 16)
            dimensions = self._u32("a tensor's dimensions")
            if not 1 <= dimensions <= 4:
                self._fail(f"the tensor {shown(name)} has {dimensions} dimensions")
            shape = tuple(self._u64("a tensor's shape") for _ in range(dimensions))[::-1]
            rows.append((name, shape, self._u32("a tensor's type"), self._u64("a tensor's offset")))
        return rows

    def _views(self, rows: list[tuple[str, tuple[int, ...], int, int]], base: int) -> None:
        """Return complete tensors, and add the names of the others to `cut`."""
        for name, shape, number, offset in rows:
            form = GGMLType(number) if number in _READ else None
            block = BLOCKS[form] if form is not None else Block(*_OTHER_BLOCKS.get(number, (1, 1)))
            size = math.prod(shape) // block.elements * block.bytes
            whole = base + offset + size <= self._size
            if not whole:
                self.cut.append(f"{name} ends at byte {base + offset + size:,} of {self._size:,}")
            data = None
            if whole and form is not None and shape[-1] % block.elements == 0:
                data = np.frombuffer(self._map, np.uint8, size, base + offset)
            kind = form.name if form is not None else OTHER_TYPES.get(number, f"type {number}")
            self.views.append((name, kind, shape, form, data))


def read(path: Path, subject: Subject) -> None:
    """Fill in a subject from a GGUF file."""
    subject.kind, subject.config_file = GGUF, path.name
    try:
        file = _Lenient(path)
    except GemkitError as error:
        subject.broken.append((path.name, fault_of(path, error)))
        return
    if file.faults:
        subject.broken += [(path.name, fault_of(path, fault)) for fault in file.faults]
        return
    subject.truncated += [(path.name, fault) for fault in file.cut]
    pairs = file.metadata
    subject.raw = {key: value for key, value in pairs.items() if not isinstance(value, GGUFArray)}
    architecture = pairs.get("general.architecture")
    subject.family = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    _fill_tensors(subject, file)
    _fill_config(subject, pairs, {view.name: view.shape for view in subject.tensors})
    subject.name = _name(pairs, path)
    _fill_tokens(subject, pairs)
    template = pairs.get("tokenizer.chat_template")
    if isinstance(template, str) and template.strip():
        subject.template, subject.where_template = template, f"{path.name}: tokenizer.chat_template"


def _name(pairs: dict[str, object], path: Path) -> str:
    parts = [pairs.get(f"general.{key}") for key in ("name", "finetune", "basename")]
    said = " ".join(part for part in parts if isinstance(part, str))
    return said or path.stem


def _fill_tensors(subject: Subject, file: _Lenient) -> None:
    post_norms = subject.family != "gemma"
    for name, kind, shape, form, data in file.views:
        row = names.from_gguf(name, post_norms)
        add_one = bool(row and row.add_one)
        key = row.canonical if row else None
        subject.tensors.append(TensorView(name, key, kind, shape, file.path.name, form, data, add_one))


def _fill_config(subject: Subject, pairs: dict[str, object], shapes: dict[str, tuple[int, ...]]) -> None:
    if not any(key.endswith((".rope.freq_base", ".rope.global.freq_base")) for key in pairs):
        # gemkit takes the published base, llama.cpp this one
        pairs = pairs | {f"{pairs.get('general.architecture')}.rope.freq_base": 10_000.0}
    try:
        subject.config = config_from_metadata(pairs, shapes)
    except (GemkitError, OverflowError, ValueError) as error:
        subject.config_fault = str(error)


def _fill_tokens(subject: Subject, pairs: dict[str, object]) -> None:
    where = subject.config_file
    for key in ("eos_token_id", "eot_token_id"):
        if (value := pairs.get(f"tokenizer.ggml.{key}")) is not None:
            subject.said_eos[f"{where}: tokenizer.ggml.{key}"] = [value]
    if (value := pairs.get("tokenizer.ggml.bos_token_id")) is not None:
        subject.said_bos[f"{where}: tokenizer.ggml.bos_token_id"] = value
    subject.where_bos = f"{where}: tokenizer.ggml.add_bos_token"
    said = pairs.get("tokenizer.ggml.add_bos_token")
    subject.add_bos = said if isinstance(said, bool) else None
    subject.tokens = tokens_of(pairs, where)


def tokens_of(pairs: Mapping[str, object], where: str) -> Tokens | None:
    """Return the pieces that a file's key-values hold; where: its name."""
    arrays = [pairs.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type")]
    tokens, types = arrays
    if not isinstance(tokens, GGUFArray) or tokens.type != STRING or len(tokens) > _MAX_PIECES:
        return None
    pieces = [piece.decode("utf-8", "replace") for piece in tokens.strings()]
    control, ordinary = set(), set()
    if isinstance(types, GGUFArray) and types.type != STRING and len(types) == len(pieces):
        for number, kind in enumerate(types.numbers().tolist()):
            if kind == PieceType.CONTROL:
                control.add(pieces[number])
            elif re.match(r"[<\[]", pieces[number]) and is_control_piece(pieces[number].encode()):
                ordinary.add(pieces[number])
    ids = dict(zip(reversed(pieces), range(len(pieces) - 1, -1, -1)))
    return Tokens(f"{where}: tokenizer.ggml.tokens", ids, len(pieces), frozenset(control), frozenset(ordinary))
