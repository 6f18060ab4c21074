"""A model in memory: its configuration, its tensors under canonical names, its vocabulary. Any file format fills it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.arch.tensors import manifest
from gemkit.errors import GemkitError, listed
from gemkit.weights.quant import GGMLType, dequantise, nbytes, quantise

if TYPE_CHECKING:
    from gemkit.text.vocabulary import Vocabulary


class Tensor:
    """One parameter as stored.

    type: its block format. shape: [out, in] or [n]. add_one: the stored values are 1 + w, the parameter is w.
    data: its bytes, uint8, flat, possibly a view of a mapped file; or a function that makes them, called at each use.
    Raises GemkitError if bytes and shape disagree.
    """

    __slots__ = ("_data", "add_one", "shape", "type")

    def __init__(
        self,
        type: GGMLType,
        shape: tuple[int, ...],
        data: np.ndarray | Callable[[], np.ndarray],
        add_one: bool = False,
    ) -> None:
        self.type, self.shape, self.add_one = GGMLType(type), tuple(shape), add_one
        self._data: np.ndarray | Callable[[], np.ndarray] | None = data
        if isinstance(data, np.ndarray) and data.nbytes != self.nbytes:
            raise GemkitError(
                f"{data.nbytes} bytes are not a {self.type.name} tensor of shape {self.shape}: load it again"
            )

    @property
    def data(self) -> np.ndarray:
        if self._data is None:
            raise GemkitError("the checkpoint is closed: load it again")
        return self._data() if callable(self._data) else self._data

    @property
    def nbytes(self) -> int:
        """Bytes as stored; known after the checkpoint was closed too."""
        return nbytes(self.type, self.shape)

    def to_float32(self) -> np.ndarray:
        """Return the parameter, float32 [*shape], in its canonical meaning: of a norm stored as 1 + w, w."""
        values = dequantise(self.type, self.data, self.shape)
        return values - np.float32(1) if self.add_one else values

    def __repr__(self) -> str:
        return f"<tensor {self.type.name} {list(self.shape)}>"


class Checkpoint:
    """A model's weights and metadata; a context manager, whose `close` unmaps the file once tensors were copied.

    config; tensors: by canonical name, exactly those of `manifest(config)`.
    name: for display. chat_template: the file's own, or None. special_tokens: the control tokens that the file names
    for it, such as {"eos_token": "<end_of_turn>"}.
    instruction_tuned: it expects chat turns; None if unknown.
    source: the file, or None. metadata: further keys of the file (strings, integers, floats, booleans).

    `vocabulary` may be given as a function, called at the first use. Raises GemkitError if tensors do not fit config.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        *,
        vocabulary: Vocabulary | Callable[[], Vocabulary | None] | None = None,
        vocabulary_key: str | Callable[[], str | None] | None = None,
        chat_template: str | None = None,
        name: str = "",
        instruction_tuned: bool | None = None,
        source: Path | None = None,
        metadata: Mapping[str, object] = MappingProxyType({}),
        special_tokens: Mapping[str, str] = MappingProxyType({}),
        close: Callable[[], None] | None = None,
    ) -> None:
        self.config, self.tensors = config, dict(tensors)
        self.chat_template, self.name, self.instruction_tuned = chat_template, name, instruction_tuned
        self.source, self.metadata, self.special_tokens = source, metadata, special_tokens
        self._vocabulary, self._vocabulary_key, self._close = vocabulary, vocabulary_key, close
        check(config, {key: tensor.shape for key, tensor in self.tensors.items()}, source)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The tokenizer's pieces, read at the first use."""
        if callable(self._vocabulary):
            self._vocabulary = self._vocabulary()
        return self._vocabulary

    @property
    def vocabulary_key(self) -> str | None:
        """SHA-256 of the vocabulary as stored: equal keys, equal tokenizers. None if there is no file or vocabulary."""
        if callable(self._vocabulary_key):
            self._vocabulary_key = self._vocabulary_key()
        return self._vocabulary_key

    @classmethod
    def from_params(
        cls,
        config: ModelConfig,
        params: Mapping[str, np.ndarray],
        types: GGMLType | Mapping[str, GGMLType] | Callable[[str], GGMLType] = GGMLType.F32,
        vocabulary: Vocabulary | None = None,
        *,
        name: str = "",
        chat_template: str | None = None,
        instruction_tuned: bool | None = None,
    ) -> Checkpoint:
        """Make a checkpoint of float parameters by canonical name, each quantised to its type.

        types: one for all matrices (vectors stay float32), or by name (F32 if absent), or a function of the name.
        """

        def kind(key: str, value: np.ndarray) -> GGMLType:
            if isinstance(types, GGMLType):
                return types if value.ndim > 1 else GGMLType.F32
            return types.get(key, GGMLType.F32) if isinstance(types, Mapping) else types(key)

        tensors = {}
        for key, value in params.items():
            value = np.asarray(value, np.float32)
            tensors[key] = Tensor(kind(key, value), value.shape, quantise(kind(key, value), value))
        return cls(
            config,
            tensors,
            vocabulary=vocabulary,
            name=name,
            chat_template=chat_template,
            instruction_tuned=instruction_tuned,
        )

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Checkpoint:
        """Return the same model with other tensors, which may read from these: closing it closes both."""
        return Checkpoint(
            self.config,
            tensors,
            vocabulary=lambda: self.vocabulary,
            vocabulary_key=lambda: self.vocabulary_key,
            chat_template=self.chat_template,
            special_tokens=self.special_tokens,
            name=self.name,
            instruction_tuned=self.instruction_tuned,
            source=self.source,
            metadata=self.metadata,
            close=self.close,
        )

    def close(self) -> None:
        """Drop the tensors' bytes and close the file. Types, shapes and a vocabulary that was read remain."""
        for tensor in self.tensors.values():
            tensor._data = None
        if self._close is not None:
            self._close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<checkpoint {self.name!r}, {self.config.model_type}, {len(self.tensors)} tensors>"


def check(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    source: object = None,
    label: Callable[[str], str] = str,
) -> None:
    """Raise GemkitError that names tensors that are missing, too many or of the wrong shape, and counts the rest.

    shapes: by canonical name. label: turns a canonical name into the file's own.
    """
    if faults := mismatches({key: spec.shape for key, spec in manifest(config).items()}, shapes, label):
        where = f"{source}: " if source is not None else ""
        raise GemkitError(
            f"{where}the tensors do not fit the configuration: {'; '.join(faults)}; get a whole conversion"
        )


def mismatches(
    wanted: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], label: Callable[[str], str] = str
) -> list[str]:
    """Return sentences on the tensors that are missing, unknown or misshapen; none if all fit."""
    faults = []
    if missing := [label(key) for key in wanted if key not in shapes]:
        faults.append(f"missing {listed(missing)}")
    if extra := [label(key) for key in shapes if key not in wanted]:
        faults.append(f"unknown {listed(extra)}")
    if wrong := [
        f"{label(key)} is {list(shapes[key])} but must be {list(shape)}"
        for key, shape in wanted.items()
        if key in shapes and tuple(shapes[key]) != shape
    ]:
        faults.append(f"misshapen: {listed(wrong)}")
    return faults
