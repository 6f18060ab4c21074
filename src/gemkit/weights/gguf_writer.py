"""Writes GGUF version 3 files that llama.cpp reads: complete metadata, aligned tensors, in one atomic step."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.errors import GemkitError
from gemkit.text.vocabulary import Vocabulary
from gemkit.weights.checkpoint import ARCHITECTURES, Checkpoint
from gemkit.weights.names import gguf_rows
from gemkit.weights.quant import GGMLType, quantise

_ALIGNMENT = 32


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _value(value: object) -> bytes:
    """A typed metadata value: bool, int (uint32), float (float32), str, or an array."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, np.ndarray):
        kind = {"f": 6, "i": 5, "u": 4}[value.dtype.kind]
        return struct.pack("<IIQ", 9, kind, len(value)) + value.astype({6: "<f4", 5: "<i4", 4: "<u4"}[kind]).tobytes()
    assert isinstance(value, list)
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))


def gguf_metadata(config: ModelConfig, name: str, vocabulary: Vocabulary | None = None) -> dict[str, object]:
    """The key-values that describe a model and its vocabulary, as llama.cpp names them."""
    arch = {v: k for k, v in ARCHITECTURES.items()}[config.model_type]
    windows = {layer.sliding_window for layer in config.layers} - {None}
    full = [layer for layer in config.layers if layer.sliding_window is None] or config.layers
    values: dict[str, object] = {
        "general.architecture": arch,
        "general.name": name,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(full[0].rope_theta),
    }
    if windows:
        values[f"{arch}.attention.sliding_window"] = windows.pop()
    if full[0].rope_factor != 1:
        values[f"{arch}.rope.scaling.type"] = "linear"
        values[f"{arch}.rope.scaling.factor"] = float(full[0].rope_factor)
    if config.attn_logit_softcapping:
        values[f"{arch}.attn_logit_softcapping"] = float(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        values[f"{arch}.final_logit_softcapping"] = float(config.final_logit_softcapping)
    if vocabulary:
        values |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": list(vocabulary.pieces),
            "tokenizer.ggml.scores": vocabulary.scores.astype(np.float32),
            "tokenizer.ggml.token_type": vocabulary.types.astype(np.int32),
            "tokenizer.ggml.bos_token_id": config.bos_token_id,
            "tokenizer.ggml.eos_token_id": config.stop_token_ids[0],
            "tokenizer.ggml.unknown_token_id": 3,
            "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_eos_token": False,
            "tokenizer.ggml.add_space_prefix": False,
        }
    return values


def write_gguf(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    name: str = "gemma",
    vocabulary: Vocabulary | None = None,
    extra: Mapping[str, object] | None = None,
) -> None:
    """Writes a checkpoint; its tensors keep their encoding, norms become 1 + w in float32.

    The file appears under its name when it is complete. Raises GemkitError if it cannot be written.
    """
    path = Path(path)
    metadata = gguf_metadata(checkpoint.config, name, vocabulary) | dict(extra or {})
    tensors = []
    for row in gguf_rows(checkpoint.config):
        tensor = checkpoint.tensors[row.canonical]
        kind, data = tensor.type, tensor.data
        if row.add_one and not tensor.add_one:
            kind, data = GGMLType.F32, quantise(GGMLType.F32, tensor.to_float32() + np.float32(1))
        tensors.append((row.gguf, tensor.shape, kind, data.reshape(-1).view(np.uint8)))
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    head += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    offset = 0
    for tensor_name, shape, kind, data in tensors:
        head += _string(tensor_name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", kind, offset)
        offset += -(-data.nbytes // _ALIGNMENT) * _ALIGNMENT
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(head + bytes(-len(head) % _ALIGNMENT))
            for *_, data in tensors:
                file.write(data.data)
                file.write(bytes(-data.nbytes % _ALIGNMENT))
        os.replace(temporary, path)
    except OSError as error:
        raise GemkitError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
