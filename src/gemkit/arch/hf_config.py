"""Hugging Face ``config.json`` <-> `ModelConfig`: the dictionary is read and written here and nowhere else.

Published files leave out whatever equals the default of their transformers class, so those defaults are part of the
format (source: transformers, ``configuration_gemma.py``, ``configuration_gemma2.py``, ``configuration_gemma3.py``).
Where keys contradict each other, or a class does not use one, the meaning is that of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemkit.arch.config import GOOGLE_VOCABULARY, SIZES, STOP_TOKEN_IDS, LayerSpec, ModelConfig, is_positive
from gemkit.errors import GemkitError

_SLIDING, _FULL = "sliding_attention", "full_attention"
_ARCHITECTURES = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}

_COMMON = {"rms_norm_eps": 1e-6, "bos_token_id": 2, "eos_token_id": 1, "tie_word_embeddings": True, "head_dim": 256}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers")
# Keys that are fields of `ModelConfig`
_SAME = (*SIZES, "rms_norm_eps", "tie_word_embeddings", "bos_token_id")
# Spellings of one function, to the last bits
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {
        **_COMMON,
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
        "rope_theta": 10_000.0,
    },
    "gemma2": {
        **_COMMON,
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "rope_theta": 10_000.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
}
_DEFAULTS["gemma3_text"] = _DEFAULTS["gemma2"] | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def from_hf(data: Mapping[str, Any]) -> ModelConfig:
    """Read the dictionary of a Hugging Face ``config.json``.

    Accepts model types gemma, gemma2, gemma3_text and gemma3 (its ``text_config``), with the rope fields of
    transformers 4 (``rope_theta``, ``rope_local_base_freq``, ``rope_scaling``) or 5 (``rope_parameters``), and the
    layer types as ``layer_types`` or ``sliding_window_pattern``. A key that would change the mathematics in a way
    gemkit does not have raises GemkitError; keys that do not describe the model (dtype, cache) are not read.
    """
    if not isinstance(data, Mapping):
        raise GemkitError(f"config.json holds a {type(data).__name__}; it must be an object with a model_type.")
    model_type = data.get("model_type")
    multimodal = model_type == "gemma3"
    if multimodal:
        text = data.get("text_config")
        if not isinstance(text, Mapping):
            raise GemkitError("config.json of a gemma3 model has no text_config; fetch the complete file.")
        # Token ids are written on either level, the outer one decides about tying.
        outer = {k: data[k] for k in ("bos_token_id", "eos_token_id") if k in data}
        data = {**outer, **text, "tie_word_embeddings": data.get("tie_word_embeddings")}
        model_type = "gemma3_text"
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise GemkitError(_other_model(model_type))
    for key in _SIZES:
        if key in data and data[key] is None:
            raise GemkitError(f"config.json has no {key}; fetch the complete file.")
    _refuse_other_mathematics(model_type, data)

    # A null means "the class default", except for the soft caps, where it means "none".
    given = {k: v for k, v in data.items() if v is not None or k.endswith("_softcapping")}
    f = {**_DEFAULTS[model_type], **given}
    first = model_type == "gemma"
    return ModelConfig(
        model_type=model_type,
        **{name: f[name] for name in _SAME},
        query_pre_attn_scalar=f["head_dim"] if first else f["query_pre_attn_scalar"],
        # Gemma 1 has no caps, Gemma 3 none on attention, and the multimodal class none at all, whatever the file has
        attn_logit_softcapping=f["attn_logit_softcapping"] if model_type == "gemma2" else None,
        final_logit_softcapping=None if first or multimodal else f["final_logit_softcapping"],
        qk_norm=model_type == "gemma3_text",
        post_norms=not first,
        stop_token_ids=_stop_ids(model_type, f["eos_token_id"], f["vocab_size"]),
        layers=_read_layers(model_type, f),
    )


def left_out(data: Mapping[str, Any]) -> list[str]:
    """Return the names of sizes that a file leaves to the defaults of its class."""
    text = data.get("text_config")
    return [key for key in _SIZES if key not in (text if isinstance(text, Mapping) else data)]


def _other_model(model_type: Any) -> str:
    known = ", ".join([*_DEFAULTS, "gemma3"])
    shown = repr(model_type)[:100]
    if isinstance(model_type, str) and "gemma" in model_type.lower():
        return f"config.json has model_type {shown}, another Gemma than the ones that gemkit runs: {known}."
    return f"config.json has model_type {shown}; gemkit reads {known}."


def _refuse_other_mathematics(model_type: str, data: Mapping[str, Any]) -> None:
    """Raise for switches that transformers honours and gemkit does not have."""
    if data.get("use_bidirectional_attention"):
        raise GemkitError(
            "config.json sets use_bidirectional_attention: this is an embedding model, such as EmbeddingGemma, "
            "which gemkit cannot run."
        )
    if data.get("attention_bias"):
        raise GemkitError("config.json sets attention_bias; no Gemma text model does, and gemkit cannot run it.")
    if data.get("partial_rotary_factor") not in (None, 1.0):
        raise GemkitError("config.json has partial_rotary_factor; Gemma models rotate the whole head.")
    # Gemma 1 files say "gelu" and mean the tanh form: transformers corrects them when it loads.
    keys = {"gemma": ("hidden_act", "hidden_activation")}.get(model_type, ("hidden_activation",))
    allowed = (*_TANH_GELU, "gelu") if model_type == "gemma" else _TANH_GELU
    for key in keys:
        if data.get(key) is not None and data[key] not in allowed:
            raise GemkitError(f"config.json has {key} {data[key]!r}; Gemma models use 'gelu_pytorch_tanh'.")


def _stop_ids(model_type: str, eos: Any, vocab_size: Any) -> tuple[int, ...]:
    """Return the file's end ids and the end of a turn: base models list <eos> alone, yet tuned ones are built on them.

    Ids outside the vocabulary cannot be chosen and are left out. In a vocabulary smaller than Google's, which is
    another, the ids of Google's turns may be words.
    """
    ids = [eos] if isinstance(eos, int) else eos
    if not isinstance(ids, (list, tuple)) or not all(type(i) is int for i in ids):
        raise GemkitError(f"config.json has eos_token_id {eos!r}; it must be a token id or a list of them.")
    rows = vocab_size if type(vocab_size) is int else 2**31
    usual = STOP_TOKEN_IDS[model_type] if rows >= GOOGLE_VOCABULARY else ()
    found = tuple(dict.fromkeys(i for i in [*ids, *usual] if 0 <= i < rows))
    return found or STOP_TOKEN_IDS[model_type]


def _read_layers(model_type: str, f: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    count = f["num_hidden_layers"]
    if not isinstance(count, int) or not 0 < count < 2**16:
        raise GemkitError(f"config.json has num_hidden_layers {count!r}; it must be a whole number from 1 to 65535.")
    rope = _read_rope(model_type, f)
    if model_type == "gemma":
        return (LayerSpec(None, *rope[_FULL]),) * count
    types = f.get("layer_types")
    if types is None:
        period = f["sliding_window_pattern"] if model_type == "gemma3_text" else 2
        if not isinstance(period, int) or period < 1:
            raise GemkitError(f"config.json has sliding_window_pattern {period!r}; it must be a whole number above 0.")
        types = [_SLIDING if (i + 1) % period else _FULL for i in range(count)]
    if not isinstance(types, (list, tuple)) or len(types) != count:
        raise GemkitError(f"config.json has layer_types that do not fit; list one type for each of the {count} layers.")
    unknown = [t for t in types if t not in (_SLIDING, _FULL)]
    if unknown:
        raise GemkitError(f"config.json has layer type {unknown[0]!r}; gemkit knows {_SLIDING} and {_FULL}.")
    return tuple(LayerSpec(f["sliding_window"] if t == _SLIDING else None, *rope[t]) for t in types)


def _read_rope(model_type: str, f: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return (theta, factor) per layer type, from rope_scaling, rope_parameters and the flat keys.

    Gemma 1 and 2 have one rope, in which rope_scaling overrides rope_parameters. Gemma 3 has two, of which
    rope_scaling changes the full layers'; rope_parameters that are not nested by layer type have no effect in it.
    """
    parameters, scaling = f.get("rope_parameters"), f.get("rope_scaling")
    given = parameters if isinstance(parameters, Mapping) else {}
    of_layers = [given.get(key) or {} for key in (_FULL, _SLIDING)]
    if not all(isinstance(part, Mapping) for part in (parameters or {}, scaling or {}, *of_layers)):
        raise GemkitError("config.json: rope_parameters and rope_scaling must be objects or null.")
    if model_type != "gemma3_text":
        if model_type == "gemma2" and not scaling and any(key in given for key in (_SLIDING, _FULL)):
            raise GemkitError(f"config.json: {model_type} has one rope for all layers; flatten rope_parameters.")
        one = _rope(scaling or given, f["rope_theta"])
        return {_SLIDING: one, _FULL: one}
    full, sliding = of_layers
    if parameters is None:
        full = {"rope_type": "default"}  # so that a "type", as older files have it, has no effect
    return {
        _FULL: _rope({**full, **(scaling or {})}, f["rope_theta"]),
        _SLIDING: _rope(sliding, f["rope_local_base_freq"]),
    }


def _rope(parameters: Mapping[str, Any], theta: float) -> tuple[float, float]:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear"):
        raise GemkitError(f"config.json has rope type {kind!r}; gemkit knows 'default' and 'linear'.")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise GemkitError("config.json has partial_rotary_factor; Gemma models rotate the whole head.")
    if kind == "linear" and "factor" not in parameters:
        raise GemkitError("config.json has a linear rope without a factor; add it.")
    theta = parameters.get("rope_theta", theta)
    factor = parameters["factor"] if kind == "linear" else 1.0
    for name, value in (("rope_theta", theta), ("factor", factor)):
        if not is_positive(value):
            raise GemkitError(f"config.json has rope {name} {value!r}; it must be a finite number above 0.")
    return float(theta), float(factor)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Write the dictionary of a ``config.json`` that transformers 4 and 5 read as the same model.

    Rope is written in the words of both. Raises GemkitError if the model type's Hugging Face class cannot express it.
    """
    kind = config.model_type
    third = kind == "gemma3_text"

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise GemkitError(f"A {kind} config.json cannot express {what}; choose another model_type.")

    need(config.post_norms == (kind != "gemma"), f"post_norms={config.post_norms}")
    need(config.qk_norm == third, f"qk_norm={config.qk_norm}")
    if kind == "gemma":
        need(config.query_pre_attn_scalar == config.head_dim, "query_pre_attn_scalar other than head_dim")
        need(config.final_logit_softcapping is None, "final_logit_softcapping")
    if kind != "gemma2":
        need(config.attn_logit_softcapping is None, "attn_logit_softcapping")
    windows = {layer.sliding_window for layer in config.layers} - {None}
    need(len(windows) <= 1, "windows of several sizes")
    need(kind != "gemma" or not windows, "sliding layers")
    ropes = {
        name: {(s.rope_theta, s.rope_factor) for s in config.layers if (s.sliding_window is not None) == sliding}
        for name, sliding in ((_SLIDING, True), (_FULL, False))
    }
    if not third:
        ropes = {_FULL: ropes[_SLIDING] | ropes[_FULL]}
    need(all(len(values) <= 1 for values in ropes.values()), "this many different ropes")
    rope = {name: next(iter(values)) for name, values in ropes.items() if values}

    def parameters(theta: float, factor: float) -> dict[str, Any]:
        if factor == 1.0:
            return {"rope_type": "default", "rope_theta": theta}
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}

    out: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        **{name: getattr(config, name) for name in _SAME},
        "hidden_act" if kind == "gemma" else "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "eos_token_id": list(config.stop_token_ids),
        "pad_token_id": 0,
    }
    if _FULL in rope:
        theta, factor = rope[_FULL]
        out["rope_theta"] = theta
        out["rope_scaling"] = None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if third:
        out["rope_parameters"] = {name: parameters(*value) for name, value in rope.items()}
        if _SLIDING in rope:
            out["rope_local_base_freq"] = rope[_SLIDING][0]
    else:
        out["rope_parameters"] = parameters(*rope[_FULL])
    if kind != "gemma":
        scalar = config.query_pre_attn_scalar
        out["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
        out["attn_logit_softcapping"] = config.attn_logit_softcapping
        out["final_logit_softcapping"] = config.final_logit_softcapping
        # transformers builds a sliding mask even where no layer slides, so the window is never null.
        out["sliding_window"] = next(iter(windows), config.max_position_embeddings)
        out["layer_types"] = [_FULL if s.sliding_window is None else _SLIDING for s in config.layers]
    return out
