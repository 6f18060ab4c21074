"""The subject of a check: the content of a model's files that could be read, and the faults of the rest.

No value is validated. A reader fills in the content and records what it could not read; a rule ignores fields that
are missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from gemkit.arch.config import STOP_TOKEN_IDS, ModelConfig
from gemkit.arch.presets import PRESETS, Preset
from gemkit.arch.tensors import EMBEDDING, HEAD, TensorSpec, manifest
from gemkit.text.tokenizer import Tokenizer
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.quant import GGMLType, dequantise
from gemkit.weights.tuned import by_name

GGUF, HF, KERAS, GOOGLE = "gguf", "hf", "keras", "google"


_WHOLE = 1 << 20  # tensors up to this many elements are read completely
_SAMPLED_ROWS = 256


@dataclass(frozen=True, eq=False)
class TensorView:
    """A tensor as stored.

    name: in its file. key: its canonical name, None if it is not a Gemma text tensor. type: the file's name of
    it. form: the same as `GGMLType` if gemkit can read the values. data: its bytes, or a function that reads them;
    None if they are missing. add_one: the file should hold 1 + w.
    """

    name: str
    key: str | None
    type: str
    shape: tuple[int, ...]
    file: str
    form: GGMLType | None = None
    data: np.ndarray | Callable[[], np.ndarray] | None = None
    add_one: bool = False

    @property
    def where(self) -> str:
        return f"{self.file}: {self.name}"

    @property
    def is_readable(self) -> bool:
        return self.form is not None and self.data is not None and self.size > 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def raw(self, rows: slice | np.ndarray | None = None, table: np.ndarray | None = None) -> np.ndarray:
        """Return the bytes of rows (all but the last dimension flattened), uint8 [rows, bytes]. table: of all rows."""
        table = self.table() if table is None else table
        return table if rows is None else table[rows]

    def table(self) -> np.ndarray:
        """Return the bytes of all rows, uint8 [rows, bytes]."""
        data = self.data() if callable(self.data) else self.data
        assert data is not None
        return data.reshape(max(1, self.size // max(1, self.shape[-1] if self.shape else 1)), -1)

    def numbers(self, rows: slice | np.ndarray | None = None, table: np.ndarray | None = None) -> np.ndarray:
        """Return rows as float32 [rows, columns], any values. table: the bytes of all rows, if known."""
        assert self.form is not None
        raw = self.raw(rows, table)
        columns = self.shape[-1] if self.shape else 1
        with np.errstate(all="ignore"):
            return dequantise(self.form, np.ascontiguousarray(raw), (len(raw), columns))

    def chunks(self, deep: bool) -> Iterator[np.ndarray]:
        """Yield all rows, a few megabytes at a time; without `deep` a sample of a large tensor with its last rows."""
        columns = max(1, self.shape[-1] if self.shape else 1)
        rows, table = self.size // columns, self.table()
        if self.size <= _WHOLE:
            yield self.numbers(table=table)
        elif not deep:
            picked = np.unique(np.linspace(0, rows - 1, min(rows, _SAMPLED_ROWS)).astype(np.int64))
            for part in np.array_split(picked, max(1, len(picked) * columns // _WHOLE)):
                yield self.numbers(part, table)
        else:
            step = max(1, _WHOLE // columns)
            for start in range(0, rows, step):
                yield self.numbers(slice(start, start + step), table)


@dataclass(frozen=True)
class Scan:
    """Statistics of a tensor: elements that are not finite, and the largest absolute value of the others."""

    not_finite: int
    largest: float


@dataclass
class Tokens:
    """A tokenizer. ids: of all pieces; size: one more than the largest id. where: its file.

    control: pieces that the file marks as control tokens, and ordinary: pieces that it lists as something else; pieces
    of neither kind are left to the program. writes_bos: how many <bos> the file itself puts in front of a text, None if
    it leaves that to its settings.
    """

    where: str
    ids: Mapping[str, int]
    size: int
    control: frozenset[str] = frozenset()
    ordinary: frozenset[str] = frozenset()
    writes_bos: int | None = None

    @cached_property
    def pieces(self) -> dict[int, str]:
        return {number: piece for piece, number in self.ids.items()}


@dataclass
class Subject:
    """The content found at a path.

    kind: GGUF, HF, KERAS or GOOGLE. folder: None for a single file. files: the folder's, by relative name.
    checkpoint, tokenizer: the model as gemkit loads it, or refusal: why it does not. pointers: files that are Git LFS
    pointers.
    broken, truncated: (where, what) that could not be read. unlisted: tensors that no index names.
    raw: the configuration as in the file (of a GGUF file its key-values, without arrays); config_file: its
    location. outer, inner: the two levels of a multimodal config.json. config: the parsed configuration, else
    config_fault is the reason.
    tokens: the tokenizer that is used; neighbours: those next to it, which other programs use.
    said_eos, said_bos, said_pad: the ids in the files, by location. add_bos: the setting, where_bos its location.
    template: the one in use; other_templates: the others, by location.
    memory: results that rules share.
    """

    path: Path
    kind: str
    folder: Path | None = None
    files: list[str] = field(default_factory=list)
    name: str = ""
    deep: bool = False
    checkpoint: Checkpoint | None = None
    tokenizer: Tokenizer | None = None
    refusal: str | None = None
    pointers: list[str] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    truncated: list[tuple[str, str]] = field(default_factory=list)
    absent_shards: list[tuple[str, str]] = field(default_factory=list)
    unlisted: list[tuple[str, str]] = field(default_factory=list)
    config_file: str = ""
    raw: Mapping[str, object] = field(default_factory=dict)
    family: str | None = None
    config: ModelConfig | None = None
    config_fault: str | None = None
    tensors: list[TensorView] = field(default_factory=list)
    tensors_known: bool = True
    tokens: Tokens | None = None
    neighbours: list[Tokens] = field(default_factory=list)
    tokenizer_config: Mapping[str, object] | None = None
    said_eos: dict[str, list[object]] = field(default_factory=dict)
    said_bos: dict[str, object] = field(default_factory=dict)
    said_pad: dict[str, object] = field(default_factory=dict)
    outer: Mapping[str, object] = field(default_factory=dict)
    inner: Mapping[str, object] = field(default_factory=dict)
    add_bos: bool | None = None
    where_bos: str = ""
    template: str | None = None
    where_template: str = ""
    other_templates: dict[str, str] = field(default_factory=dict)
    memory: dict[str, object] = field(default_factory=dict)

    @cached_property
    def tuned(self) -> bool | None:
        """True if it expects chat turns: its name has "it", or it has a template. None if unknown."""
        # Stop ids do not tell: many tools, gemkit's own among them, list the end of the turn for every model.
        said = by_name(self.name)
        return True if said is None and self.template else said

    @cached_property
    def answers(self) -> bool:
        """True if it is tuned to answer; ShieldGemma is tuned, but only scores."""
        return bool(self.tuned) and "shieldgemma" not in self.name.lower()

    @cached_property
    def is_quantised(self) -> bool:
        """True if its tensors are in another project's packed format, according to the configuration."""
        return any(self.raw.get(key) for key in ("quantization_config", "quantization"))

    def token_id(self, piece: str) -> int | None:
        """Return the id of a token in the tokenizer's file, or else among those that its settings add."""
        found = self.tokens.ids.get(piece) if self.tokens is not None else None
        return self.tokenizer.find(piece) if found is None and self.tokenizer is not None else found

    @cached_property
    def end_of_turn(self) -> int | None:
        """Return its id, by the vocabulary if there is one, else by the family."""
        if self.tokens is not None and (found := self.tokens.ids.get("<end_of_turn>")) is not None:
            return found
        return STOP_TOKEN_IDS[self.family][1] if self.family in STOP_TOKEN_IDS else None

    def scanned(self, view: TensorView) -> Scan:
        """Return a tensor's statistics, computed once; empty if it cannot be read."""
        if view not in self._scans:
            self._scans[view] = _scan(view, self.deep) if view.is_readable else Scan(0, 0.0)
        return self._scans[view]

    @cached_property
    def _scans(self) -> dict[TensorView, Scan]:
        return {}

    @cached_property
    def by_key(self) -> dict[str, TensorView]:
        """Tensors by canonical name; the head of a tied pair is the embedding where it is alone."""
        found = {view.key: view for view in self.tensors if view.key}
        tied = self.config is not None and self.config.tie_word_embeddings
        if self.kind == HF and tied and HEAD in found and EMBEDDING not in found:
            found[EMBEDDING] = found.pop(HEAD)
        return found

    @cached_property
    def manifest(self) -> dict[str, TensorSpec]:
        return manifest(self.config) if self.config is not None and self.config.num_hidden_layers <= 1024 else {}

    @cached_property
    def preset(self) -> Preset | None:
        """A published model of exactly these sizes."""
        if self.config is None:
            return None
        return next((p for p in PRESETS.values() if sizes(p.config) == sizes(self.config)), None)


def _scan(view: TensorView, deep: bool) -> Scan:
    bad, largest = 0, 0.0
    for part in view.chunks(deep):
        finite = np.isfinite(part)
        if not finite.all():
            bad += int(part.size - np.count_nonzero(finite))
            part = np.where(finite, part, 0)
        largest = max(largest, float(np.abs(part).max(initial=0)))
    return Scan(bad, largest)


def sizes(config: ModelConfig) -> tuple:
    """Return the sizes that identify a published model."""
    return (
        config.model_type,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
