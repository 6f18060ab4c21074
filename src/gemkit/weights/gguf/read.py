"""Reader of Gemma models in GGUF: `read_gguf`. The file format is in `container`, the tokenizer in `vocabulary`.

Where a file lacks a key, the value is the one that llama.cpp assumes (``src/llama-model.cpp``). Ollama's own
files of Gemma 3 have some keys under other names and leave others out: those are taken from the published models.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from gemkit.arch.config import GOOGLE_VOCABULARY, STOP_TOKEN_IDS, LayerSpec, ModelConfig, layer_pattern
from gemkit.errors import GemkitError, GemkitWarning
from gemkit.weights import tuned
from gemkit.weights.checkpoint import Checkpoint, Tensor, check
from gemkit.weights.gguf import names
from gemkit.weights.gguf.container import GGUFArray, GGUFFile, GGUFTensor, shown
from gemkit.weights.gguf.parts import GGUFParts, open_parts
from gemkit.weights.gguf.vocabulary import check_vocabulary, read_vocabulary, vocabulary_key
from gemkit.weights.mapped import plain
from gemkit.weights.quant import GGMLType

__all__ = ["ARCHITECTURES", "GGMLType", "GGUFFile", "GGUFTensor", "config_from_metadata", "read_gguf"]

# general.architecture: model_type
ARCHITECTURES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
# llama.cpp knows the two 27B models by their number of layers; they alone scale queries by hidden size / heads.
_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_BOS = 2
_GEMMA3_EPS = 1e-6
# A key of gemkit's own: llama.cpp's hold three stop ids at most
STOP_IDS = "gemkit.stop_token_ids"
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_STOP_LISTS = ("tokenizer.ggml.eos_token_ids",)  # Ollama's
# general.type of files that belong to a model and are none
_COMPANIONS = {
    "mmproj": "the image part (mmproj) of a model: give the language model's file, which is next to it",
    "adapter": "a LoRA adapter: gemkit reads adapters as PEFT folders (--adapter-path)",
    "imatrix": "an importance matrix for quantising: give the model's file",
}

_REQUIRED = object()

T = TypeVar("T", int, float, str)


def read_gguf(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Gemma 1, 2 or 3 model. Tensors are views of the mapped file; the vocabulary is read when asked for.

    path: of the file, or of any part of a split model. metadata: the file's key-values, and in "ignored" which parts
    for images were not read. Warns (GemkitWarning) of special ids outside the vocabulary, which are passed over.
    Raises GemkitError if the file is broken, is no Gemma model, or does not hold exactly the model's tensors.
    """
    file = open_parts(path)
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


def _checkpoint(file: GGUFParts) -> Checkpoint:
    pairs = file.metadata
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}

    def warn(text: str) -> None:
        warnings.warn(f"{file.path}: {text}", GemkitWarning, stacklevel=4)

    config = config_from_metadata(pairs, shapes, warn)
    tensors: dict[str, Tensor] = {}
    labels: dict[str, str] = {}
    images: dict[str, int] = {}
    for name, tensor in file.tensors.items():
        if name in names.IGNORED:
            continue
        if part := names.gguf_image_part(name):
            images[part] = images.get(part, 0) + 1
            continue
        row = names.from_gguf(name, config.post_norms)
        key = row.canonical if row else name
        labels[key] = name
        tensors[key] = Tensor(tensor.type, tensor.shape, tensor.data, bool(row and row.add_one))

    def label(key: str) -> str:
        row = names.from_canonical(key, config.post_norms)
        return labels.get(key) or (row.gguf if row else key)

    check(config, {key: tensor.shape for key, tensor in tensors.items()}, label=lambda key: plain(label(key)))
    tokens = pairs.get("tokenizer.ggml.tokens")
    if tokens is not None:
        check_vocabulary(pairs, config.vocab_size, warn)
    metadata = {key: value for key, value in pairs.items() if not isinstance(value, GGUFArray)}
    if images:
        counts = ", ".join(f"{count} tensors of {part}" for part, count in images.items())
        metadata["ignored"] = f"{counts}: images are not read"
    template = _get(pairs, "tokenizer.chat_template", str, None)
    said = [_get(pairs, f"general.{key}", str, "") for key in ("name", "finetune")]
    return Checkpoint(
        config,
        tensors,
        vocabulary=None if tokens is None else lambda: read_vocabulary(file.first, config.vocab_size, warn),
        vocabulary_key=None if tokens is None else lambda: vocabulary_key(file.first, config.vocab_size),
        chat_template=template,
        name=_get(pairs, "general.name", str, "") or file.path.stem,
        instruction_tuned=tuned.instruction_tuned(tuned.mark(pairs, tuned.GGUF_KEY, template), template, *said),
        source=file.path,
        metadata=metadata,
        close=file.close,
    )


def config_from_metadata(
    pairs: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    warn: Callable[[str], None] = lambda text: None,
) -> ModelConfig:
    """Return the configuration that a GGUF file's key-values state.

    shapes: of the tensors by GGUF name; the rows of token_embd.weight are the vocabulary.
    warn: called with a sentence on each value that is passed over. Raises GemkitError.
    """
    kind = pairs.get("general.type")
    if companion := _COMPANIONS.get(kind if isinstance(kind, str) else ""):
        raise GemkitError(f"it is {companion}")
    architecture = _get(pairs, "general.architecture", str)
    if architecture == "clip":
        raise GemkitError(f"it is {_COMPANIONS['mmproj']}")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise GemkitError(f"its architecture is {shown(architecture)}; gemkit reads {known}: get a Gemma model")

    def integer(key: str, default: object = _REQUIRED) -> int:
        value = _get(pairs, f"{architecture}.{key}", int, default)
        if not 0 < value < 2**31:
            raise GemkitError(f"{architecture}.{key} is {value}, not from 1 to 2^31 - 1; get another conversion")
        return value

    def number(key: str, default: object = _REQUIRED) -> float:
        return _get(pairs, f"{architecture}.{key}", float, default)

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
    rows = embedding[0]
    bos = _token(pairs, "tokenizer.ggml.bos_token_id", rows, warn)
    return ModelConfig(
        model_type=ARCHITECTURES[architecture],
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=integer("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=integer("context_length"),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon", _GEMMA3_EPS if gemma3 else _REQUIRED),
        query_pre_attn_scalar=hidden // heads if big else head_dim,
        attn_logit_softcapping=(number("attn_logit_softcapping", 50.0) or None) if gemma2 else None,
        final_logit_softcapping=number("final_logit_softcapping", 30.0 if gemma2 else 0.0) or None,
        qk_norm=gemma3,
        post_norms=gemma2 or gemma3,
        tie_word_embeddings="output.weight" not in shapes,
        bos_token_id=_BOS if bos is None else bos,
        stop_token_ids=stop_ids(pairs, ARCHITECTURES[architecture], rows, warn),
        layers=_layers(pairs, architecture, layers, hidden, integer, number),
    )


def _layers(
    pairs: Mapping[str, object],
    architecture: str,
    count: int,
    hidden: int,
    integer: Callable[..., int],
    number: Callable[..., float],
) -> tuple[LayerSpec, ...]:
    """Return one record per layer; by default every sixth (Gemma 3) or second (Gemma 2) layer is full."""
    factor = _rope_factor(pairs, architecture)
    if architecture == "gemma3":
        base, scaled = _gemma3_rope(pairs, count, hidden)
        theta = number("rope.freq_base", number("rope.global.freq_base", base))
        factor = scaled if factor is None else factor
    else:
        theta = number("rope.freq_base", 10_000.0)
    factor = factor or 1.0
    if architecture == "gemma":
        return layer_pattern(count, rope_theta=theta, rope_factor=factor)
    # Gemma 3's local layers have a base of their own and are never scaled
    local = None
    if architecture == "gemma3":
        local = number("rope.freq_base_swa", number("rope.local.freq_base", 10_000.0))
    key = f"{architecture}.attention.sliding_window"
    if architecture == "gemma3" and pairs.get(key, 0) == 0:
        return layer_pattern(count, rope_theta=theta, rope_factor=factor)
    window = integer("attention.sliding_window", 4096)
    pattern = pairs.get(f"{key}_pattern")
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


def _gemma3_rope(pairs: Mapping[str, object], layers: int, hidden: int) -> tuple[float, float | None]:
    """Return base and factor of the full layers where the file states none, from the published model of these sizes.

    A file with the base under llama.cpp's key, where neither is asked for, states the factor too: without one, it is 1.
    """
    if "gemma3.rope.freq_base" in pairs:
        return 0.0, None
    from gemkit.arch.presets import PRESETS

    full = PRESETS["gemma-3-1b-it"].config.layers[5]
    for preset in PRESETS.values():
        config = preset.config
        if (config.model_type, config.num_hidden_layers, config.hidden_size) == ("gemma3_text", layers, hidden):
            full = config.layers[5]
    return full.rope_theta, full.rope_factor


def _rope_factor(pairs: Mapping[str, object], architecture: str) -> float | None:
    """Return the factor that the file states, or None."""
    kind = _get(pairs, f"{architecture}.rope.scaling.type", str, "linear")
    if kind not in ("linear", "none"):
        raise GemkitError(f"its positions are scaled by {shown(kind)}; gemkit knows linear: get another conversion")
    old = _get(pairs, f"{architecture}.rope.scale_linear", float, None)
    factor = _get(pairs, f"{architecture}.rope.scaling.factor", float, old)
    if kind == "none":
        return 1.0
    return 1.0 if factor == 0 else factor


def stop_ids(
    pairs: Mapping[str, object], model_type: str, rows: int, warn: Callable[[str], None] = lambda text: None
) -> tuple[int, ...]:
    """Return the ids of gemkit's own key, or those that the file names, with Gemma's two in Google's vocabularies."""
    if own := _tokens(pairs, STOP_IDS, rows, warn):
        return tuple(dict.fromkeys(own))
    usual = [token for token in STOP_TOKEN_IDS[model_type] if token < rows]
    ids: list[int | None] = [*usual] if rows >= GOOGLE_VOCABULARY else []
    ids += [_token(pairs, f"tokenizer.ggml.{key}", rows, warn) for key in _STOP_KEYS]
    for key in _STOP_LISTS:
        ids += _tokens(pairs, key, rows, warn)
    found = tuple(dict.fromkeys(token for token in ids if token is not None)) or tuple(usual)
    if not found:
        raise GemkitError(f"its vocabulary of {rows} has no stop token; get another conversion")
    return found


def _token(pairs: Mapping[str, object], key: str, rows: int, warn: Callable[[str], None]) -> int | None:
    """Return a special token's id, or None; one outside the vocabulary, such as 2^32 - 1 for "none", is passed over."""
    return _inside(_get(pairs, key, int, None), key, rows, warn)


def _tokens(pairs: Mapping[str, object], key: str, rows: int, warn: Callable[[str], None]) -> list[int]:
    """Return the ids of a list, without those outside the vocabulary; none where the key is missing."""
    value = pairs.get(key)
    if isinstance(value, GGUFArray):
        value = value.numbers().tolist()
    if value is None:
        return []
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise GemkitError(f"the key {key} is {shown(value)}, not a list of ids; get another conversion")
    return [token for token in value if _inside(token, key, rows, warn) is not None]


def _inside(token: int | None, key: str, rows: int, warn: Callable[[str], None]) -> int | None:
    if token is not None and not 0 <= token < rows:
        warn(f"{key} is {token}, which is no id of a vocabulary of {rows}: it is passed over")
        return None
    return token


def _get(pairs: Mapping[str, object], key: str, kind: type[T], default: object = _REQUIRED) -> T:
    """Return a key-value of that type. If it is missing: `default`, or GemkitError without one."""
    value = pairs.get(key)
    if value is None:
        if default is _REQUIRED:
            raise GemkitError(f"the key {key} is missing; get a whole conversion")
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise GemkitError(f"the key {key} is {shown(value)}, not of type {kind.__name__}; get another conversion")
    # Stored as float32, 1e-6 comes back as 9.999999974752427e-07; the shortest decimal is the intended value
    with np.errstate(over="ignore"):
        return float(str(np.float32(value))) if kind is float else value
