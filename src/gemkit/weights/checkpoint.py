"""A model as it stands in a file: configuration, tensors by canonical name, vocabulary. Nothing is copied or converted."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gemkit.arch.config import STOP_TOKEN_IDS, ModelConfig, layer_pattern
from gemkit.arch.tensors import manifest
from gemkit.errors import GemkitError
from gemkit.text.vocabulary import Vocabulary
from gemkit.weights.gguf import GGUFFile
from gemkit.weights.names import IGNORED, gguf_rows
from gemkit.weights.quant import GGMLType, dequantise, quantise

ARCHITECTURES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}

_VOCABULARY_KEYS = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")


@dataclass(frozen=True)
class Tensor:
    """One tensor in its file's encoding. data: uint8, whole blocks. add_one: it holds 1 + the canonical values."""

    type: GGMLType
    shape: tuple[int, ...]
    data: np.ndarray
    add_one: bool = False

    def to_float32(self) -> np.ndarray:
        """The canonical values, float32 of `shape`."""
        values = dequantise(self.type, self.data, self.shape)
        return values - np.float32(1) if self.add_one else values


@dataclass
class Checkpoint:
    """What `read_gguf` returns; close it, or leave its with block, once the tensors have been copied.

    vocabulary_key: a checksum of the vocabulary, which `read_vocabulary` parses when called; both None without one.
    instruction_tuned: None if the file does not say.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    name: str = ""
    instruction_tuned: bool | None = None
    chat_template: str | None = None
    vocabulary_key: str | None = None
    read_vocabulary: Callable[[], Vocabulary] | None = None
    source: Path | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    _file: GGUFFile | None = None

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Parsed anew at each call: some 260,000 pieces."""
        return self.read_vocabulary() if self.read_vocabulary else None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file; the tensors cannot be read any more."""
        self.tensors = {}
        if self._file:
            self._file.close()

    @classmethod
    def from_params(
        cls,
        config: ModelConfig,
        params: Mapping[str, np.ndarray],
        types: GGMLType | Callable[[str], GGMLType] = GGMLType.F32,
        vocabulary: Vocabulary | None = None,
    ) -> Checkpoint:
        """A checkpoint in memory. params: canonical name → float array; vectors stay F32, matrices get `types`."""
        tensors = {}
        for name, values in params.items():
            kind = GGMLType.F32 if values.ndim == 1 else types(name) if callable(types) else types
            tensors[name] = Tensor(kind, tuple(values.shape), quantise(kind, values))
        check_tensors(config, {name: tensor.shape for name, tensor in tensors.items()}, "the parameters")
        return cls(config, tensors, read_vocabulary=(lambda: vocabulary) if vocabulary else None)


def check_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises GemkitError naming every missing, extra and misshapen tensor."""
    wanted = manifest(config)
    problems = []
    if missing := [name for name in wanted if name not in shapes]:
        problems.append(f"missing {_some(missing)}")
    if extra := [name for name in shapes if name not in wanted]:
        problems.append(f"not part of the model: {_some(extra)}")
    for name, spec in wanted.items():
        if name in shapes and tuple(shapes[name]) != spec.shape:
            problems.append(f"{name} has shape {list(shapes[name])}, not {list(spec.shape)}")
    if problems:
        raise GemkitError(f"{where} do not fit the configuration: {'; '.join(problems[:6])}: get the model again")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def read_gguf(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a GGUF file of a Gemma 1, 2 or 3 text model; the tensors are views of the mapped file.

    Raises GemkitError for a broken file, another architecture, or tensors that do not fit the configuration.
    """
    file = GGUFFile(path)
    try:
        return _read(file)
    except BaseException:
        file.close()
        raise


def _read(file: GGUFFile) -> Checkpoint:
    facts = _Facts(file)
    config = facts.config()
    rows = {row.gguf: row for row in gguf_rows(config)}
    tensors, unknown = {}, []
    for name, tensor in file.tensors.items():
        if name in rows:
            row = rows[name]
            tensors[row.canonical] = Tensor(tensor.type, tensor.shape, tensor.data, row.add_one)
        elif name not in IGNORED:
            unknown.append(name)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_tensors(config, shapes | dict.fromkeys(unknown, ()), f"the tensors of {file.path}")
    for name, tensor in tensors.items():
        if len(tensor.shape) == 1 and tensor.type != GGMLType.F32:
            raise GemkitError(f"{file.path}: {name} has the type {tensor.type.name}, a norm must be F32: convert it anew")
    name = file.metadata.get("general.name")
    template = file.metadata.get("tokenizer.chat_template")
    checkpoint = Checkpoint(
        config,
        tensors,
        name=name if isinstance(name, str) else file.path.stem,
        chat_template=template if isinstance(template, str) else None,
        source=file.path,
        metadata=file.metadata,
        _file=file,
    )
    checkpoint.instruction_tuned = _instruction_tuned(checkpoint)
    if "tokenizer.ggml.tokens" in file.metadata:
        checkpoint.vocabulary_key = file.digest(iter(_VOCABULARY_KEYS))
        checkpoint.read_vocabulary = lambda: _vocabulary(file, config)
    return checkpoint


def _instruction_tuned(checkpoint: Checkpoint) -> bool | None:
    if checkpoint.chat_template is not None:
        return True
    words = f"{checkpoint.name} {checkpoint.metadata.get('general.finetune', '')}".lower().replace("-", " ").split()
    if {"it", "instruct", "chat"} & set(words):
        return True
    # Converters copy the template of every tuned model; a file with a vocabulary and no template is a pretrained one.
    return False if "tokenizer.ggml.tokens" in checkpoint.metadata else None


def _vocabulary(file: GGUFFile, config: ModelConfig) -> Vocabulary:
    pieces = file.strings("tokenizer.ggml.tokens")
    scores = file.numbers("tokenizer.ggml.scores").astype(np.float32)
    types = file.numbers("tokenizer.ggml.token_type").astype(np.int32)
    if not len(pieces) == len(scores) == len(types):
        raise GemkitError(f"{file.path} has {len(pieces)} pieces, {len(scores)} scores, {len(types)} types: convert it anew")
    if len(pieces) > config.vocab_size:
        raise GemkitError(
            f"{file.path} has {len(pieces)} pieces for {config.vocab_size} embedding rows: convert the model anew"
        )
    return Vocabulary(pieces, scores, types)


class _Facts:
    """The configuration that the metadata describes; keys that are missing mean what llama.cpp takes them to mean."""

    def __init__(self, file: GGUFFile):
        self.file = file
        name = file.metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            raise GemkitError(
                f"{file.path} holds the architecture {name!r}; gemkit runs {', '.join(ARCHITECTURES)}: get a Gemma model"
            )
        self.arch = str(name)

    def _get(self, key: str, kind: type, default: object = None) -> object:
        full = f"{self.arch}.{key}"
        value = self.file.metadata.get(full, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            problem = "is missing" if value is None else f"is {value!r}"
            raise GemkitError(f"{self.file.path}: the metadata {full!r} {problem}: convert the model anew")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, int, default)
        if not 0 < value <= 1 << 31:
            raise GemkitError(f"{self.file.path}: the metadata '{self.arch}.{key}' is {value}: convert the model anew")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self._get(key, float, default)
        if not (math.isfinite(value) and value > 0):
            raise GemkitError(f"{self.file.path}: the metadata '{self.arch}.{key}' is {value}: convert the model anew")
        return float(f"{value:.7g}")  # a float32 in the file: 9.9999999747e-07 was written as 1e-06

    def config(self) -> ModelConfig:
        model_type = ARCHITECTURES[self.arch]
        layers, width = self.integer("block_count"), self.integer("embedding_length")
        if layers > 1024:
            raise GemkitError(f"{self.file.path} claims {layers} layers: convert the model anew")
        heads = self.integer("attention.head_count")
        head_dim = self.integer("attention.key_length", width // heads if width % heads == 0 else None)
        if self.integer("attention.value_length", head_dim) != head_dim:
            raise GemkitError(f"{self.file.path}: keys and values differ in width, which no Gemma has: convert it anew")
        embedding = self.file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise GemkitError(f"{self.file.path} has no embedding 'token_embd.weight': get the model again")
        later = self.arch != "gemma"
        return ModelConfig(
            model_type=model_type,
            vocab_size=embedding.shape[0],
            hidden_size=width,
            intermediate_size=self.integer("feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=self.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=self.integer("context_length"),
            rms_norm_eps=self.real("attention.layer_norm_rms_epsilon"),
            query_pre_attn_scalar=self._query_scalar(layers, width, heads, head_dim),
            attn_logit_softcapping=self.real("attn_logit_softcapping", 50.0) if self.arch == "gemma2" else None,
            final_logit_softcapping=self._final_softcap(),
            qk_norm=self.arch == "gemma3",
            post_norms=later,
            tie_word_embeddings="output.weight" not in self.file.tensors,
            bos_token_id=2,
            stop_token_ids=STOP_TOKEN_IDS[model_type],
            layers=self._layers(layers),
        )

    def _final_softcap(self) -> float | None:
        if self.arch == "gemma2":
            return self.real("final_logit_softcapping", 30.0)
        return self.real("final_logit_softcapping") if f"{self.arch}.final_logit_softcapping" in self.file.metadata else None

    def _query_scalar(self, layers: int, width: int, heads: int, head_dim: int) -> float:
        """The two 27B models scale queries by width / heads; the files do not say so, their layer counts do."""
        if (self.arch, layers) in (("gemma2", 46), ("gemma3", 62)):
            return width / heads
        return float(head_dim)

    def _layers(self, count: int) -> tuple:
        theta = self.real("rope.freq_base", 10000.0)
        factor = 1.0
        if self.file.metadata.get(f"{self.arch}.rope.scaling.type") == "linear":
            factor = self.real("rope.scaling.factor", 1.0)
        if self.arch == "gemma":
            return layer_pattern(count, rope_theta=theta, rope_factor=factor)
        if self.arch == "gemma2":
            window = self.integer("attention.sliding_window", 4096)
            return layer_pattern(count, rope_theta=theta, rope_factor=factor, period=2, sliding_window=window)
        window = self.integer("attention.sliding_window")
        local = self.real("rope.freq_base_swa", 10000.0)
        return layer_pattern(
            count, rope_theta=theta, rope_factor=factor, period=6, sliding_window=window, local_rope_theta=local
        )
