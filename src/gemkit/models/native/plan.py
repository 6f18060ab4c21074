"""The plan: a checkpoint's configuration as plain data and tensor indices, so that the C++ core knows no model.

Every per-layer decision (window, rotary base, which norms exist) is already made in `ModelConfig.layers`; here it only
becomes indices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.arch.tensors import manifest
from gemkit.engine.interface import page_groups
from gemkit.errors import GemkitError

GGML_F32 = 0

_NO_BYTES = np.zeros(0, np.uint8)

# The core's field for each of a layer's tensors; the name follows "model.layers.<i>." and ends in ".weight".
_MATRICES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
_NORMS = {"input_norm": "input_layernorm"}
_TWO_NORMS = {"pre_ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffn_norm": "pre_feedforward_layernorm",
    "post_ffn_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


class Weight(Protocol):
    """Tensor interface of the plan: block format, shape, bytes, and its values as float32."""

    type: int
    shape: tuple[int, ...]
    data: np.ndarray

    def to_float32(self) -> np.ndarray: ...


class AdapterPart(Protocol):
    """Part interface of the plan: A [rank, in], B [out, rank], scale and DoRA's magnitude [out] (float32) or None."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None


class Adapter(Protocol):
    """Adapter interface of the plan: its parts by weight name."""

    parts: Mapping[str, AdapterPart]


def build_plan(
    config: ModelConfig, weights: Mapping[str, Weight], adapters: Sequence[Adapter] = (), packed: bool = False
) -> dict[str, Any]:
    """Return the dictionary for ``_native.Model.create``. `weights` holds the manifest's tensors by canonical name.

    packed: the core gets the matrices as a packed image: their bytes are not read here.
    Raises GemkitError that names the first tensor that is missing or has another shape.
    """
    for name, spec in manifest(config).items():
        if name not in weights:
            raise GemkitError(f"the tensor {name} is missing: load the whole model")
        if tuple(weights[name].shape) != spec.shape:
            raise GemkitError(
                f"{name} has shape {list(weights[name].shape)}, not {list(spec.shape)}: load the right model"
            )
    tensors: list[tuple[int, int, int, np.ndarray]] = []
    index: dict[str, int] = {}

    def matrix(name: str) -> int:
        weight = weights[name]
        rows, cols = weight.shape
        data = _NO_BYTES if packed else np.ascontiguousarray(weight.data).reshape(-1).view(np.uint8)
        tensors.append((int(weight.type), rows, cols, data))
        index[name] = len(tensors) - 1
        return index[name]

    def low_rank(values: np.ndarray) -> int:
        values = np.ascontiguousarray(values, np.float32)
        tensors.append((GGML_F32, *values.shape, values.reshape(-1).view(np.uint8)))
        return len(tensors) - 1

    def part(number: int, name: str, of: AdapterPart) -> dict[str, Any]:
        magnitude = -1 if of.magnitude is None else low_rank(of.magnitude[None])
        pair = {"a": low_rank(of.a), "b": low_rank(of.b), "scale": float(of.scale)}
        return {"adapter": number, "target": index[name], "magnitude": magnitude} | pair

    def norm(name: str) -> int:
        # The core multiplies by 1 + w; adding in float64 keeps the stored multiplier of a GGUF file exact
        multiplier = (1.0 + weights[name].to_float32().astype(np.float64)).astype(np.float32)
        tensors.append((GGML_F32, 1, multiplier.size, np.ascontiguousarray(multiplier).view(np.uint8)))
        return len(tensors) - 1

    groups = page_groups(config)
    group_of = {i: g for g, group in enumerate(groups) for i in group.layers}
    ropes = sorted({(layer.rope_theta, layer.rope_factor) for layer in config.layers})
    norms = _NORMS | (_FOUR_NORMS if config.post_norms else _TWO_NORMS) | (_QK_NORMS if config.qk_norm else {})
    absent = dict.fromkeys([*_FOUR_NORMS, *_QK_NORMS], -1)
    layers = []
    for i, layer in enumerate(config.layers):
        prefix = f"model.layers.{i}."
        layers.append(
            absent
            | {field: norm(f"{prefix}{name}.weight") for field, name in norms.items()}
            | {field: matrix(f"{prefix}{name}.weight") for field, name in _MATRICES.items()}
            | {"group": group_of[i], "rope": ropes.index((layer.rope_theta, layer.rope_factor))}
        )
    embed = matrix("model.embed_tokens.weight")
    plan = {
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab": config.vocab_size,
        "context": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "embed_scale": math.sqrt(config.hidden_size),
        "query_scale": config.query_pre_attn_scalar**-0.5,
        "attention_softcap": config.attn_logit_softcapping or 0.0,
        "final_softcap": config.final_logit_softcapping or 0.0,
        "embed": embed,
        "head": embed if config.tie_word_embeddings else matrix("lm_head.weight"),
        "final_norm": norm("model.norm.weight"),
        "group_windows": [group.window or 0 for group in groups],
        "ropes": [{"base": base, "factor": factor} for base, factor in ropes],
        "layers": layers,
    }
    # Last, so that the packed layout of the model's own matrices does not depend on its adapters
    parts = [part(number, name, of) for number, adapter in enumerate(adapters) for name, of in adapter.parts.items()]
    return plan | {"adapters": parts, "tensors": tensors}
