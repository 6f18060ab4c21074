"""Reads a KerasHub preset for the rules: the configuration, the tokenizer, and whether the weights' file is whole.

The weights themselves are in HDF5, which gemkit does not read. Source of the names: ``keras_hub/src/models/gemma`` and
``gemma3``, ``keras_hub/src/utils/preset_utils.py``; of the file's end: "Superblock" in the HDF5 specification.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

from gemkit.arch.presets import PRESETS
from gemkit.tools.check.folder import fill_config, from_sentencepiece, name_of, read_json
from gemkit.tools.check.subject import KERAS, Subject

VOCABULARY = "assets/tokenizer/vocabulary.spm"
SINGLE, SHARDS = "model.weights.h5", "model.weights.json"
FILES = ("metadata.json", "tokenizer.json", "task.json", "preprocessor.json")  # read by from_preset as well
_SIGNATURE = b"\x89HDF\r\n\x1a\n"

# config.json of Hugging Face: of the backbone
_NAMES = {
    "vocab_size": "vocabulary_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_size": "hidden_dim",
    "intermediate_size": "intermediate_dim",
    "head_dim": "head_dim",
    "rms_norm_eps": "layer_norm_epsilon",
}


def is_preset(raw: Mapping[str, object]) -> bool:
    """Return whether a config.json is a KerasHub Gemma's."""
    return any(_backbone(raw.get(key)) for key in ("class_name", "registered_name"))


def _backbone(name: object) -> bool:
    return isinstance(name, str) and name.rpartition(">")[2] in ("GemmaBackbone", "Gemma3Backbone")


def read(subject: Subject, raw: Mapping[str, object]) -> None:
    """Fill in a subject from a preset's folder."""
    subject.kind, subject.config_file = KERAS, "config.json"
    inner = raw.get("config")
    config = inner if isinstance(inner, Mapping) else {}
    subject.raw = config
    third = "Gemma3Backbone" in f"{raw.get('class_name')} {raw.get('registered_name')}"
    post = config.get("use_post_ffw_norm") is True
    subject.family = "gemma3_text" if third else "gemma2" if post else "gemma"
    fill_config(subject, _as_hf(config, subject.family))
    subject.name = f"{config.get('name') or ''} {name_of(subject.folder)}".strip()
    subject.tensors_known = False
    if VOCABULARY in subject.files:
        subject.tokens = from_sentencepiece(subject, VOCABULARY)
    records = {name: read_json(subject, name) for name in FILES}
    task = _layer_config(records["task.json"]) or {}
    nested = task.get("preprocessor")
    said = (_layer_config(records["preprocessor.json"]) or _layer_config(nested) or {}).get("add_start_token")
    subject.where_bos = "preprocessor.json: add_start_token"
    subject.add_bos = said if isinstance(said, bool) else None
    _look_at_weights(subject)


def _layer_config(data: object) -> Mapping[str, object] | None:
    inner = data.get("config") if isinstance(data, Mapping) else None
    return inner if isinstance(inner, Mapping) else None


def _as_hf(config: Mapping[str, object], family: str) -> dict[str, object]:
    """Return the configuration under Hugging Face's names."""
    out: dict[str, object] = {"model_type": family}
    out |= {name: config[key] for name, key in _NAMES.items() if key in config}
    # Gemma 1 and 2 count gate and up projection together
    width = out.get("intermediate_size")
    if family != "gemma3_text" and isinstance(width, int):
        out["intermediate_size"] = width // 2
    hidden, heads = config.get("hidden_dim"), config.get("num_query_heads")
    normalised = config.get("query_head_dim_normalize", True)
    if not normalised and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        out["query_pre_attn_scalar"] = hidden // heads
    else:
        out["query_pre_attn_scalar"] = config.get("head_dim")
    if family != "gemma":
        out["attn_logit_softcapping"] = config.get("attention_logit_soft_cap")
        out["final_logit_softcapping"] = config.get("final_logit_soft_cap")
        slides = config.get("use_sliding_window_attention", False)
        out["sliding_window"] = config.get("sliding_window_size")
        layers = config.get("num_layers")
        if not slides and isinstance(layers, int) and 0 < layers < 1000:
            out["layer_types"] = ["full_attention"] * layers
    factor = config.get("global_rope_scaling_factor")
    if family == "gemma3_text" and factor not in (None, 1, 1.0):
        out["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    # A preset does not state the context; it is that of the published model of these widths.
    same = [p.config for p in PRESETS.values() if p.config.model_type == family and p.config.hidden_size == hidden]
    if same:
        out["max_position_embeddings"] = same[0].max_position_embeddings
    return out


def _look_at_weights(subject: Subject) -> None:
    """Check that the HDF5 files exist and have the size that their header states."""
    names = [name for name in subject.files if name.endswith(".h5")]
    index = read_json(subject, SHARDS) if SHARDS in subject.files else None
    weight_map = (index or {}).get("weight_map")
    for value in weight_map.values() if isinstance(weight_map, Mapping) else []:
        for shard in value if isinstance(value, list) else [value]:
            if isinstance(shard, str) and shard not in names:
                subject.absent_shards.append((SHARDS, f"it names {shard}, which is missing"))
    for name in names:
        path = subject.folder / name
        size, end = path.stat().st_size, _end_of(path)
        if end is None:
            subject.broken.append((name, "it is no HDF5 file"))
        elif size < end:
            subject.truncated.append((name, f"it has {size:,} bytes and its header promises {end:,}"))


def _end_of(path: Path) -> int | None:
    """Return the length that an HDF5 file's superblock states; None if it has none."""
    try:
        with open(path, "rb") as file:
            head = file.read(96)
    except OSError:
        return None
    if len(head) < 48 or not head.startswith(_SIGNATURE):
        return None
    version = head[8]
    if version in (0, 1) and head[13] == 8:
        at = 24 + 16 if version == 0 else 28 + 16
    elif version in (2, 3) and head[9] == 8:
        at = 12 + 16
    else:
        return 0
    return struct.unpack_from("<Q", head, at)[0]
