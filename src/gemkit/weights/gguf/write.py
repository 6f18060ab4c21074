"""Writes a `Checkpoint` as a GGUF file (version 3) that gemkit and llama.cpp read."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.arch.tensors import manifest
from gemkit.errors import GemkitError
from gemkit.weights import tuned
from gemkit.weights.checkpoint import Checkpoint, Tensor
from gemkit.weights.gguf.container import ALIGNMENT, ARRAY, BOOL, MAGIC, SCALARS, STRING, UINT32
from gemkit.weights.gguf.read import ARCHITECTURES, STOP_IDS, config_from_metadata, names, read_gguf, stop_ids
from gemkit.weights.gguf.vocabulary import fit_to_rows
from gemkit.weights.quant import GGMLType
from gemkit.weights.staged import Check, check_readable, staged_model

_FLOAT32, _INT32 = 6, 5
# general.file_type of files whose matrices are mostly of one type; llama.cpp only displays it
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
_FILE_TYPES |= {"Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "BF16": 32, "Q4_K_M": 15, "Q5_K_M": 17}
_GUESSED = 1024


def write_gguf(
    path: str | os.PathLike[str], checkpoint: Checkpoint, file_type: str | None = None, *, check: Check | None = None
) -> Path:
    """Write the file under a temporary name, read it back and rename it: there is a good file, the old one, or none.

    file_type: what the file calls itself, "Q4_0", "Q4_K_M", …; by default the type with the most bytes.
    check: called with the temporary path before the file gets its name; whatever it raises leaves no file.

    Raises GemkitError if GGUF cannot state the configuration or the file cannot be written or read.
    """
    path = Path(path)
    config = checkpoint.config
    tensors = [_stored(name, checkpoint.tensors[name], config.post_norms) for name in manifest(config)]
    header = _header(checkpoint, tensors, file_type)
    with staged_model(path) as temporary:
        with open(temporary, "xb") as file:
            file.write(header)
            for _, tensor in tensors:
                file.write(tensor.data.data)
                file.write(bytes(-tensor.nbytes % ALIGNMENT))
        check_readable(temporary, path, read_gguf, checkpoint, check)
    return path


def _stored(name: str, tensor: Tensor, post_norms: bool) -> tuple[str, Tensor]:
    """Return a tensor with its GGUF name, and a norm as 1 + w in float32."""
    row = names.from_canonical(name, post_norms)
    assert row is not None
    if row.add_one and not tensor.add_one:
        values = (1 + tensor.to_float32().astype(np.float64)).astype("<f4")
        tensor = Tensor(GGMLType.F32, tensor.shape, values.reshape(-1).view(np.uint8), add_one=True)
    return row.gguf, tensor


def _header(checkpoint: Checkpoint, tensors: list[tuple[str, Tensor]], file_type: str | None) -> bytes:
    """Return everything before the tensors' data, padded."""
    pairs = _model_pairs(checkpoint.config, tuned.end_in_template(checkpoint))
    _check_expressible(checkpoint.config, pairs, tensors)
    sizes: dict[str, int] = {}
    for _, tensor in tensors:
        sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.nbytes
    name = checkpoint.name or checkpoint.config.model_type
    pairs |= {
        "general.type": (STRING, "model"),
        "general.name": (STRING, name),
        "general.license": (STRING, "gemma"),
        "general.quantization_version": (UINT32, 2),
        "general.file_type": (UINT32, _FILE_TYPES.get(file_type or max(sizes, key=sizes.__getitem__), _GUESSED)),
    }
    if template := tuned.template_to_write(checkpoint):
        pairs["tokenizer.chat_template"] = STRING, template
    if tuned.needs_mark(checkpoint, name):
        pairs[tuned.GGUF_KEY] = BOOL, False
    parts = [_pair(key, *pair) for key, pair in pairs.items()]
    vocabulary = checkpoint.vocabulary
    if vocabulary is not None:
        vocabulary = fit_to_rows(vocabulary, checkpoint.config.vocab_size)
        parts += [
            _array("tokenizer.ggml.tokens", STRING, len(vocabulary), map(_string, vocabulary.pieces)),
            _array("tokenizer.ggml.scores", _FLOAT32, len(vocabulary), [vocabulary.scores.astype("<f4").tobytes()]),
            _array("tokenizer.ggml.token_type", _INT32, len(vocabulary), [vocabulary.types.astype("<i4").tobytes()]),
        ]
    infos, offset = [], 0
    for name, tensor in tensors:
        shape = tensor.shape[::-1]
        infos.append(_string(name.encode()) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        infos.append(struct.pack("<IQ", tensor.type, offset))
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    header = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(parts)) + b"".join(parts + infos)
    return header + bytes(-len(header) % ALIGNMENT)


def _model_pairs(config: ModelConfig, end: int | None = None) -> dict[str, tuple[int, object]]:
    """Return the configuration as key: (value type, value). end: the stop id to state first."""
    architecture = {model_type: name for name, model_type in ARCHITECTURES.items()}[config.model_type]
    full = next((layer for layer in config.layers if layer.sliding_window is None), config.layers[-1])
    slider = next((layer for layer in config.layers if layer.sliding_window is not None), None)
    keys: dict[str, tuple[int, object]] = {
        "context_length": (UINT32, config.max_position_embeddings),
        "embedding_length": (UINT32, config.hidden_size),
        "block_count": (UINT32, config.num_hidden_layers),
        "feed_forward_length": (UINT32, config.intermediate_size),
        "attention.head_count": (UINT32, config.num_attention_heads),
        "attention.head_count_kv": (UINT32, config.num_key_value_heads),
        "attention.key_length": (UINT32, config.head_dim),
        "attention.value_length": (UINT32, config.head_dim),
        "attention.layer_norm_rms_epsilon": (_FLOAT32, config.rms_norm_eps),
        "rope.freq_base": (_FLOAT32, full.rope_theta),
    }
    if full.rope_factor != 1:
        keys |= {"rope.scaling.type": (STRING, "linear"), "rope.scaling.factor": (_FLOAT32, full.rope_factor)}
    if architecture == "gemma2":
        keys["attn_logit_softcapping"] = _FLOAT32, config.attn_logit_softcapping or 0.0
    if architecture == "gemma2" or config.final_logit_softcapping:
        keys["final_logit_softcapping"] = _FLOAT32, config.final_logit_softcapping or 0.0
    if slider is not None:
        keys["attention.sliding_window"] = UINT32, slider.sliding_window
        if architecture == "gemma3":
            keys["rope.freq_base_swa"] = _FLOAT32, slider.rope_theta
        kinds = [layer.sliding_window is not None for layer in config.layers]
        period = kinds.index(False) + 1 if False in kinds else len(kinds) + 1
        if period != (6 if architecture == "gemma3" else 2):
            keys["attention.sliding_window_pattern"] = UINT32, period
    stops = list(config.stop_token_ids if end is None else dict.fromkeys([end, *config.stop_token_ids]))
    pairs: dict[str, tuple[int, object]] = {"general.architecture": (STRING, architecture)}
    pairs |= {f"{architecture}.{key}": pair for key, pair in keys.items()}
    pairs |= {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.pre": (STRING, "default"),
        "tokenizer.ggml.bos_token_id": (UINT32, config.bos_token_id),
        "tokenizer.ggml.eos_token_id": (UINT32, stops[0]),
        "tokenizer.ggml.add_bos_token": (BOOL, True),
        "tokenizer.ggml.add_eos_token": (BOOL, False),
        "tokenizer.ggml.add_space_prefix": (BOOL, False),
    }
    for key, token in (("padding", 0), ("unknown", 3)):
        if token < config.vocab_size:
            pairs[f"tokenizer.ggml.{key}_token_id"] = UINT32, token
    for key, token in zip(("eot", "eom"), stops[1:]):
        pairs[f"tokenizer.ggml.{key}_token_id"] = UINT32, token
    facts_back = {key: value for key, (_, value) in pairs.items()}
    if stop_ids(facts_back, config.model_type, config.vocab_size) != config.stop_token_ids:
        pairs[STOP_IDS] = ARRAY, list(config.stop_token_ids)
    return pairs


def _check_expressible(
    config: ModelConfig, pairs: dict[str, tuple[int, object]], tensors: list[tuple[str, Tensor]]
) -> None:
    """Raise GemkitError unless reading the key-values gives the same configuration."""
    shapes = {name: tensor.shape for name, tensor in tensors}
    back = config_from_metadata({key: value for key, (_, value) in pairs.items()}, shapes)
    wrong = [field.name for field in fields(ModelConfig) if getattr(back, field.name) != getattr(config, field.name)]
    if wrong:
        raise GemkitError(
            f"a GGUF file of a {config.model_type} model cannot state this {', '.join(wrong)}: use another format"
        )


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _pair(key: str, kind: int, value: object) -> bytes:
    if kind == ARRAY:
        return _array(key, UINT32, len(value), [struct.pack(f"<{len(value)}I", *value)])
    head = _string(key.encode()) + struct.pack("<I", kind)
    return head + (_string(str(value).encode()) if kind == STRING else struct.pack(SCALARS[kind], value))


def _array(key: str, kind: int, count: int, parts: Iterable[bytes]) -> bytes:
    return _string(key.encode()) + struct.pack("<IIQ", ARRAY, kind, count) + b"".join(parts)
