"""Small GGUF files, written by hand (field by field) or from a tiny model with random weights."""

import struct
from pathlib import Path

import numpy as np

from gemkit.arch.config import ModelConfig, layer_pattern
from gemkit.arch.tensors import manifest
from gemkit.text.vocabulary import Vocabulary
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.quant import GGMLType

ROWS = 272  # of the tiny models' embedding

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def string(text: str | bytes) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text


def pair(key: str | bytes, kind: int, value) -> bytes:
    return (
        string(key) + struct.pack("<I", kind) + (string(value) if kind == 8 else struct.pack("<" + CODES[kind], value))
    )


def array(key: str, kind: int, values) -> bytes:
    body = b"".join(map(string, values)) if kind == 8 else struct.pack(f"<{len(values)}{CODES[kind]}", *values)
    return string(key) + struct.pack("<IIQ", 9, kind, len(values)) + body


def info(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """shape in ggml's order."""
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(pairs=(), infos=(), data: bytes = b"", *, version=3, tensors=None, count=None, alignment=32) -> bytes:
    head = b"GGUF" + struct.pack(
        "<IQQ", version, len(infos) if tensors is None else tensors, len(pairs) if count is None else count
    )
    head += b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data


def tiny_config(model_type: str, **changes) -> ModelConfig:
    layers = changes.pop("num_hidden_layers", {"gemma": 2, "gemma2": 2, "gemma3_text": 7}[model_type])
    pattern = {
        "gemma": {},
        "gemma2": {"period": 2, "sliding_window": 8},
        "gemma3_text": {"period": 6, "sliding_window": 8, "local_rope_theta": 10_000.0},
    }[model_type]
    theta = 1_000_000.0 if model_type == "gemma3_text" else 10_000.0
    facts = {
        "model_type": model_type,
        "vocab_size": ROWS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": changes.get("head_dim", 16),
        "attn_logit_softcapping": 50.0 if model_type == "gemma2" else None,
        "final_logit_softcapping": 30.0 if model_type == "gemma2" else None,
        "qk_norm": model_type == "gemma3_text",
        "post_norms": model_type != "gemma",
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "stop_token_ids": (1, 106) if model_type == "gemma3_text" else (1, 107),
        "layers": layer_pattern(layers, rope_theta=theta, **pattern),
    }
    return ModelConfig(**facts | changes)


def tiny_params(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=spec.shape).astype(np.float32) for name, spec in manifest(config).items()}


def tiny_vocabulary(size: int = ROWS - 3) -> Vocabulary:
    """Control tokens, every byte, then ordinary pieces; by default three fewer than there are rows, as published."""
    pieces = [(b"<pad>", 3), (b"<eos>", 3), (b"<bos>", 3), (b"<unk>", 2)]
    pieces += [(b"<0x%02X>" % byte, 6) for byte in range(256)]
    pieces += [(b"p%d" % number, 1) for number in range(len(pieces), size)]
    kinds = np.array([kind for _, kind in pieces[:size]], np.int32)
    return Vocabulary([piece for piece, _ in pieces[:size]], np.arange(size, dtype=np.float32), kinds)


def tiny_checkpoint(model_type: str = "gemma3_text", types=GGMLType.Q8_0, **changes) -> Checkpoint:
    config = tiny_config(model_type, **changes)
    return Checkpoint.from_params(config, tiny_params(config), types, tiny_vocabulary(), name="Tiny")


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def add_pair(writer, key: str, value) -> None:
    """Adds one of gemkit's metadata pairs, by gguf-py's writer."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif not isinstance(value, str | int | float):
        writer.add_array(key, value.strings() if value.type == 8 else value.numbers().tolist())
    else:
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](key, value)
