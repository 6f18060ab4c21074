"""GGUF files of Gemma models: `read_gguf`. The container itself is in `gguf_file`.

Where a file leaves a fact out, the value is the one that llama.cpp assumes (``src/llama-model.cpp``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from gemkit.arch.config import STOP_TOKEN_IDS, LayerSpec, ModelConfig, layer_pattern
from gemkit.errors import GemkitError
from gemkit.text.vocabulary import Vocabulary
from gemkit.weights import names
from gemkit.weights.checkpoint import Checkpoint, Tensor, check
from gemkit.weights.gguf_file import STRING, GGUFArray, GGUFFile, GGUFTensor, shown
from gemkit.weights.quant import GGMLType
from gemkit.weights.tuned import instruction_tuned

__all__ = ["ARCHITECTURES", "GGMLType", "GGUFFile", "GGUFTensor", "config_from_metadata", "read_gguf"]

# general.architecture: model_type
ARCHITECTURES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
# llama.cpp knows the two 27B models by their number of layers; they alone scale queries by hidden size / heads.
_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_BOS = 2

_REQUIRED = object()

T = TypeVar("T", int, float, str)


def read_gguf(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a Gemma 1, 2 or 3 model. Tensors are views of the mapped file; the vocabulary is read when asked for.

    Raises GemkitError if the file is broken, is no Gemma model, or does not hold exactly the model's tensors.
    """
    file = GGUFFile.open(path)
    try:
        return _checkpoint(file)
    except GemkitError as error:
        file.close()
        text = str(error)
        if text.startswith(str(file.path)):
            raise
        raise GemkitError(f"{file.path}: {text}") from None
    except BaseException:
        file.close()
        raise


def _checkpoint(file: GGUFFile) -> Checkpoint:
    facts = file.metadata
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    config = config_from_metadata(facts, shapes)
    tensors: dict[str, Tensor] = {}
    labels: dict[str, str] = {}
    for name, tensor in file.tensors.items():
        if name in names.IGNORED:
            continue
        row = names.from_gguf(name, config.post_norms)
        key = row.canonical if row else name
        labels[key] = name
        tensors[key] = Tensor(tensor.type, tensor.shape, tensor.data, bool(row and row.add_one))

    def label(key: str) -> str:
        row = names.from_canonical(key, config.post_norms)
        return labels.get(key) or (row.gguf if row else key)

    check(config, {key: tensor.shape for key, tensor in tensors.items()}, label=lambda key: _plain(label(key)))
    tokens = facts.get("tokenizer.ggml.tokens")
    if tokens is not None:
        _check_vocabulary(facts, config)
    template = _get(facts, "tokenizer.chat_template", str, None)
    said = [_get(facts, f"general.{key}", str, "") for key in ("name", "finetune")]
    return Checkpoint(
        config,
        tensors,
        vocabulary=None if tokens is None else lambda: _vocabulary(file),
        vocabulary_key=None if tokens is None else lambda: _vocabulary_key(file),
        chat_template=template,
        name=_get(facts, "general.name", str, "") or file.path.stem,
        instruction_tuned=instruction_tuned(None, template, *said),
        source=file.path,
        metadata={key: value for key, value in facts.items() if not isinstance(value, GGUFArray)},
        close=file.close,
    )


def config_from_metadata(facts: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """The configuration that a GGUF file's key-values state.

    shapes: of the tensors by GGUF name; the rows of token_embd.weight are the vocabulary. Raises GemkitError.
    """
    architecture = _get(facts, "general.architecture", str)
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise GemkitError(f"its architecture is {shown(architecture)}; gemkit reads {known}: get a Gemma model")

    def integer(key: str, default: object = _REQUIRED) -> int:
        value = _get(facts, f"{architecture}.{key}", int, default)
        if not 0 < value < 2**31:
            raise GemkitError(f"{architecture}.{key} is {value}, not from 1 to 2^31 - 1; get another conversion")
        return value

    def number(key: str, default: object = _REQUIRED) -> float:
        return _get(facts, f"{architecture}.{key}", float, default)

    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise GemkitError("the matrix token_embd.weight is missing; get a whole conversion")
    layers = integer("block_count")
    if layers > len(shapes):
        raise GemkitError(f"it announces {layers} layers but has {len(shapes)} tensors; get a whole conversion")
    hidden, heads = integer("embedding_length"), integer("attention.head_count")
    head_dim = integer("attention.key_length", hidden // heads)
    if (value_dim := integer("attention.value_length", head_dim)) != head_dim:
        raise GemkitError(
            f"keys are {head_dim} wide and values {value_dim}; gemkit needs them equal: get a Gemma model"
        )
    gemma2, gemma3 = architecture == "gemma2", architecture == "gemma3"
    big = layers == _27B_LAYERS.get(architecture)
    return ModelConfig(
        model_type=ARCHITECTURES[architecture],
        vocab_size=embedding[0],
        hidden_size=hidden,
        intermediate_size=integer("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=integer("context_length"),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        query_pre_attn_scalar=hidden // heads if big else head_dim,
        attn_logit_softcapping=(number("attn_logit_softcapping", 50.0) or None) if gemma2 else None,
        final_logit_softcapping=number("final_logit_softcapping", 30.0 if gemma2 else 0.0) or None,
        qk_norm=gemma3,
        post_norms=gemma2 or gemma3,
        tie_word_embeddings="output.weight" not in shapes,
        bos_token_id=_get(facts, "tokenizer.ggml.bos_token_id", int, _BOS),
        stop_token_ids=_stop_ids(facts, ARCHITECTURES[architecture], embedding[0]),
        layers=_layers(facts, architecture, layers, integer, number),
    )


def _layers(
    facts: Mapping[str, object],
    architecture: str,
    count: int,
    integer: Callable[..., int],
    number: Callable[..., float],
) -> tuple[LayerSpec, ...]:
    """One record per layer; every sixth (Gemma 3) or second (Gemma 2) layer is full unless the file says otherwise."""
    theta = number("rope.freq_base", 10_000.0)
    factor = _rope_factor(facts, architecture)
    if architecture == "gemma":
        return layer_pattern(count, rope_theta=theta, rope_factor=factor)
    # Gemma 3's local layers have a base of their own and are never scaled
    local = number("rope.freq_base_swa", 10_000.0) if architecture == "gemma3" else None
    key = f"{architecture}.attention.sliding_window"
    if architecture == "gemma3" and facts.get(key, 0) == 0:
        return layer_pattern(count, rope_theta=theta, rope_factor=factor)
    window = integer("attention.sliding_window", 4096)
    pattern = facts.get(f"{key}_pattern")
    if not isinstance(pattern, GGUFArray):
        period = integer("attention.sliding_window_pattern", 6 if architecture == "gemma3" else 2)
        return layer_pattern(
            count, rope_theta=theta, rope_factor=factor, period=period, sliding_window=window, local_rope_theta=local
        )
    slides = pattern.numbers()
    if len(slides) != count:
        raise GemkitError(f"{key}_pattern has {len(slides)} entries for {count} layers; get another conversion")
    full, slider = layer_pattern(
        2, rope_theta=theta, rope_factor=factor, period=2, sliding_window=window, local_rope_theta=local
    )[::-1]
    return tuple(slider if slide else full for slide in slides)


def _rope_factor(facts: Mapping[str, object], architecture: str) -> float:
    kind = _get(facts, f"{architecture}.rope.scaling.type", str, "linear")
    if kind not in ("linear", "none"):
        raise GemkitError(f"its positions are scaled by {shown(kind)}; gemkit knows linear: get another conversion")
    old = _get(facts, f"{architecture}.rope.scale_linear", float, 0.0)
    factor = _get(facts, f"{architecture}.rope.scaling.factor", float, old)
    return (factor or 1.0) if kind == "linear" else 1.0


def _stop_ids(facts: Mapping[str, object], model_type: str, rows: int) -> tuple[int, ...]:
    """Gemma's two, and those that the file names besides."""
    ids = [token for token in STOP_TOKEN_IDS[model_type] if token < rows]
    for key in ("eos_token_id", "eot_token_id"):
        token = _get(facts, f"tokenizer.ggml.{key}", int, None)
        if token is not None and token not in ids:
            ids.append(token)
    if not ids:
        raise GemkitError(f"its vocabulary of {rows} has no stop token; get another conversion")
    return tuple(ids)


def _get(facts: Mapping[str, object], key: str, kind: type[T], default: object = _REQUIRED) -> T:
    """A key-value of that type. If it is missing: `default`, or GemkitError without one."""
    value = facts.get(key)
    if value is None:
        if default is _REQUIRED:
            raise GemkitError(f"the key {key} is missing; get a whole conversion")
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise GemkitError(f"the key {key} is {shown(value)}, not of type {kind.__name__}; get another conversion")
    # Stored as float32, 1e-6 comes back as 9.999999974752427e-07; the shortest decimal is what was meant
    with np.errstate(over="ignore"):
        return float(str(np.float32(value))) if kind is float else value


def _plain(name: str) -> str:
    return name if name.isascii() and name.isprintable() and len(name) <= 200 else shown(name)


# --- vocabulary ------------------------------------------------------------------------------------------------------

_VOCABULARY_KEYS = re.compile(r"tokenizer\.ggml\.(model|tokens|scores|token_type|\w+_token_id)")


def _check_vocabulary(facts: Mapping[str, object], config: ModelConfig) -> None:
    """The arrays are there, of the right kinds, one entry for each row of the embedding."""
    model = _get(facts, "tokenizer.ggml.model", str, "llama")
    if model != "llama":
        raise GemkitError(f"its tokenizer is {shown(model)}, not sentencepiece (llama); get another conversion")
    for key in ("tokens", "scores", "token_type"):
        array = facts.get(f"tokenizer.ggml.{key}")
        if not isinstance(array, GGUFArray) or (array.type == STRING) != (key == "tokens"):
            raise GemkitError(
                f"tokenizer.ggml.{key} is missing or not a list of the right type; get another conversion"
            )
        if len(array) != config.vocab_size:
            raise GemkitError(
                f"tokenizer.ggml.{key} has {len(array)} entries and token_embd.weight {config.vocab_size} rows; "
                "get another conversion"
            )


def _vocabulary(file: GGUFFile) -> Vocabulary:
    tokens, scores, types = (file.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    with np.errstate(all="ignore"):
        return Vocabulary(tokens.strings(), scores.numbers().astype(np.float32), types.numbers().astype(np.int32))


def _vocabulary_key(file: GGUFFile) -> str:
    return file.digest(sorted(key for key in file.metadata if _VOCABULARY_KEYS.fullmatch(key)))
