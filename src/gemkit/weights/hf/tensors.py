"""Tensors of a Hugging Face folder under canonical names, as transformers assigns them. See `read_tensors`.

Like transformers, this reads every alias of the text model's tensors and ignores tensors that the model does not
use. Files with other mathematics in them (quantised, with an adapter, a classifier) are refused by name.
Source: transformers, ``core_model_loading.py`` (rename_source_key), ``conversion_mapping.py`` and
``modeling_utils.py`` (tie_weights).
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.arch.hf_config import left_out
from gemkit.arch.tensors import EMBEDDING, HEAD, manifest
from gemkit.errors import GemkitError, GemkitWarning, listed
from gemkit.weights.checkpoint import Tensor, check
from gemkit.weights.hf.safetensors import TYPES, Entry, ShardedFiles, shown
from gemkit.weights.mapped import plain
from gemkit.weights.quant import GGMLType, dequantise

# Prefixes of a name when another module holds the model: multimodal models, PEFT, torch.compile, DDP, FSDP
_AROUND = re.compile(r"(?:(?:base_model|language_model|model|module|_orig_mod|_fsdp_wrapped_module)\.)*")
_TEXT = ("layers.", "embed_tokens.", "norm.")
_IMAGE = ("vision_tower", "multi_modal_projector")
# Follow from the configuration
_DERIVED = (".rotary_emb.inv_freq", "embed_tokens.embed_scale", ".self_attn.masked_bias")
_COMPARED = 1 << 22  # elements compared at a time

# Names by which a quantised file is known, the more particular ones first.
_QUANTISED = (
    (r"\.SCB$", "int8 of bitsandbytes (SCB)"),
    (r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\.", "4 bits of bitsandbytes (absmax)"),
    (r"\.g_idx$", "GPTQ (qweight, g_idx)"),
    (r"\.qzeros$", "AWQ or GPTQ (qweight, qzeros)"),
    (r"\.(weight_packed|weight_zero_point|weight_shape|weight_g_idx)$", "compressed-tensors (weight_packed)"),
    (r"\.weight_scale_2$", "NVIDIA ModelOpt (weight_scale_2)"),
    (r"\.(weight_scale_inv|weight_scale|input_scale|activation_scale)$", "FP8 or int8 with scales (weight_scale)"),
    (r":(qdata|scale|zero_point)$|(_weight|\.weight)_(qdata|scale_and_zero)$", "torchao (qdata)"),
    (r"\.(W_q|W_nbits)$", "HQQ (W_q)"),
    (r"\.weight\._(data|scale)$", "Quanto"),
    (r"\.(codebooks|codes)$", "AQLM (codebooks)"),
    (r"\.(scales|biases)$", "MLX (scales, biases)"),
)
_REMEDY = "get the model in BF16, F16 or F32, or as GGUF"


def _from_float64(raw: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.frombuffer(raw.tobytes(), "<f8").astype("<f4")


def _from_float8(exponent_bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """Read E4M3 (finite, without infinities) or E5M2 by a table of its 256 values."""
    codes = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = (codes & 127) >> mantissa_bits, codes & (1 << mantissa_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    fraction = mantissa / (1 << mantissa_bits)
    values = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - float(bias)))
    if exponent_bits == 5:
        values = np.where(exponent == 31, np.where(mantissa == 0, np.inf, np.nan), values)
    else:
        values = np.where((codes & 127) == 127, np.nan, values)
    table = np.where(codes > 127, -values, values).astype("<f4")
    return lambda raw: table[raw]


_CONVERTED: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "F64": (8, _from_float64),
    "F8_E4M3": (1, _from_float8(4)),
    "F8_E5M2": (1, _from_float8(5)),
}


def canonical(name: str) -> str | None:
    """Return the canonical name of a text model's tensor in a Hugging Face file; None for any other tensor.

    Example: "model.language_model.layers.0.mlp.up_proj.weight" and "layers.0.mlp.up_proj.weight" are both
    "model.layers.0.mlp.up_proj.weight".
    """
    rest = name[_AROUND.match(name).end() :]
    if rest.startswith("lm_head."):
        return rest
    return f"model.{rest}" if rest.startswith(_TEXT) else None


def image_part(name: str) -> str | None:
    """Return "vision_tower" or "multi_modal_projector" if a tensor belongs to it."""
    part = name[_AROUND.match(name).end() :].partition(".")[0]
    return part if part in _IMAGE else None


def refuse_quantised(path: Path, raw_config: Mapping[str, object]) -> None:
    """Raise GemkitError if ``config.json`` says that the weights are quantised."""
    if found := raw_config.get("quantization_config"):
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        kind = (
            f"by {method}" if isinstance(method, str) and method.isprintable() and len(method) < 40 else "in a format"
        )
        raise GemkitError(
            f"{path}: the weights are quantised {kind} (quantization_config), which gemkit does not read: {_REMEDY}"
        )
    if found := raw_config.get("quantization"):
        bits = f", {found['bits']} bits" if isinstance(found, Mapping) and type(found.get("bits")) is int else ""
        raise GemkitError(
            f"{path}: the weights are quantised by MLX (quantization in config.json{bits}), which gemkit does not "
            f"read: {_REMEDY}"
        )


def read_tensors(
    folder: Path, config: ModelConfig, raw_config: Mapping[str, object], files: ShardedFiles
) -> tuple[ModelConfig, dict[str, Tensor], str]:
    """Return the tensors by canonical name, the configuration that they fit, and a sentence about the image part ("").

    raw_config: ``config.json``. The configuration is the given one, except that a head that differs from the embedding
    is not tied. Warns of unused tensors. Raises GemkitError if tensors are missing or of the wrong shape, or if the
    file holds another kind of model.
    """
    refuse_other_models(folder, raw_config, files.tensors)
    if config.num_hidden_layers > len(files.tensors):
        raise GemkitError(
            f"{folder}: config.json announces {config.num_hidden_layers} layers but there are {len(files.tensors)} "
            "tensors: get a whole model"
        )
    labels, images, others = _sorted(folder, config, files)
    if not any(key in labels for key in manifest(config)):
        raise GemkitError(f"{folder} {_no_text(images, others)}")
    config = _tied(folder, config, files, labels)
    label = _labeller(labels)
    shapes = {key: files.tensors[name].shape for key, name in labels.items()}
    try:
        check(config, shapes, folder, label)
    except GemkitError as error:
        raise GemkitError(f"{error}{_hint(config, raw_config, shapes)}") from None
    tensors = {key: _tensor(files, name) for key, name in labels.items()}
    if others:
        warnings.warn(
            f"{folder}: {len(others)} tensor{'s' * (len(others) > 1)} the model has no use for "
            f"({listed(map(plain, others))}), left out",
            GemkitWarning,
            stacklevel=4,
        )
    counts = ", ".join(f"{count} tensors of {part}" for part, count in images.items())
    return config, tensors, counts and f"{counts}: images are not read"


def refuse_other_models(folder: Path, raw_config: Mapping[str, object], names: Iterable[str]) -> None:
    """Raise GemkitError for quantised files, adapters that are not merged, and classifiers, by what they are."""
    names = list(names)
    for pattern, kind in _QUANTISED:
        found = [name for name in names if re.search(pattern, name)]
        if found:
            raise GemkitError(
                f"{folder}: the weights are quantised, {kind} by the names of their tensors "
                f"({listed(map(shown, found), 1)}), which gemkit does not read: {_REMEDY}"
            )
    if found := [name for name in names if re.search(r"\.lora_|\.base_layer\.|\.modules_to_save\.", name)]:
        raise GemkitError(
            f"{folder}: an adapter is in the weights and not merged ({listed(map(shown, found), 1)}): merge it with "
            "peft (merge_and_unload) and save the result"
        )
    said = raw_config.get("architectures")
    said = [name for name in said if isinstance(name, str)] if isinstance(said, list) else []
    heads = [
        name
        for name in names
        if re.match(r"(score|classifier|classification_head)\.", name[_AROUND.match(name).end() :])
    ]
    heads += [name for name in said if re.search(r"For(Sequence|Token)Classification|RewardModel", name)]
    if heads:
        raise GemkitError(
            f"{folder}: this is a classifier or reward model ({listed(map(plain, heads), 1)}), and gemkit runs models "
            "that write text: give another"
        )


def _sorted(folder: Path, config: ModelConfig, files: ShardedFiles) -> tuple[dict[str, str], dict[str, int], list[str]]:
    """Return the names in the file by canonical name; count of the image parts' tensors; name of all others."""
    wanted = {*manifest(config), HEAD}
    labels: dict[str, str] = {}
    images: dict[str, int] = {}
    others: list[str] = []
    for name in files.tensors:
        key = canonical(name)
        if key in wanted:
            if key in labels and not _equal(files, name, labels[key]):
                raise GemkitError(
                    f"{folder}: {shown(labels[key])} and {shown(name)} are one tensor and differ; get the model again"
                )
            labels.setdefault(key, name)
        elif part := image_part(name):
            images[part] = images.get(part, 0) + 1
        elif not name.endswith(_DERIVED):
            others.append(name)
    return labels, images, others


def _tied(folder: Path, config: ModelConfig, files: ShardedFiles, labels: dict[str, str]) -> ModelConfig:
    """Leave one of a tied pair in `labels`, where a head alone becomes the embedding; return the configuration."""
    if not config.tie_word_embeddings or HEAD not in labels:
        return config
    if EMBEDDING not in labels:
        labels[EMBEDDING] = labels.pop(HEAD)
    elif _equal(files, labels[HEAD], labels[EMBEDDING]):
        del labels[HEAD]
    else:
        warnings.warn(
            f"{folder}: {plain(labels[HEAD])} differs from {plain(labels[EMBEDDING])}, to which config.json ties it; "
            "it is used as it is, as transformers does",
            GemkitWarning,
            stacklevel=5,
        )
        return dataclasses.replace(config, tie_word_embeddings=False)
    return config


def _equal(files: ShardedFiles, a: str, b: str) -> bool:
    """Return whether two tensors, of any types, have equal elements, compared a piece at a time."""
    one, other = files.tensors[a], files.tensors[b]
    if one.shape != other.shape:
        return False
    x, y = files.data(a), files.data(b)
    if one.dtype == other.dtype:
        pieces = (slice(at, at + 4 * _COMPARED) for at in range(0, x.size, 4 * _COMPARED))
        return all(np.array_equal(x[piece], y[piece]) for piece in pieces)
    if not {one.dtype, other.dtype} <= {*TYPES, *_CONVERTED}:
        return False
    count = x.size // _width(one)
    return all(
        np.array_equal(_numbers(one, x, at, at + _COMPARED), _numbers(other, y, at, at + _COMPARED))
        for at in range(0, count, _COMPARED)
    )


def _width(entry: Entry) -> int:
    """Return the bytes of one element."""
    return _CONVERTED[entry.dtype][0] if entry.dtype in _CONVERTED else 4 if entry.dtype == "F32" else 2


def _numbers(entry: Entry, data: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Return a range of a tensor's elements as float32, flat."""
    raw = data[begin * _width(entry) : end * _width(entry)]
    if entry.dtype in _CONVERTED:
        return _CONVERTED[entry.dtype][1](raw)
    return dequantise(TYPES[entry.dtype], raw, (raw.size // _width(entry),))


def _tensor(files: ShardedFiles, name: str) -> Tensor:
    entry = files.tensors[name]
    if entry.dtype in TYPES:
        return Tensor(TYPES[entry.dtype], entry.shape, files.data(name))
    if entry.dtype in _CONVERTED:
        raw, convert = files.data(name), _CONVERTED[entry.dtype][1]
        return Tensor(GGMLType.F32, entry.shape, lambda: convert(raw).view(np.uint8))
    known = ", ".join([*TYPES, *_CONVERTED])
    raise GemkitError(f"{files.path(name)}: {shown(name)} is {entry.dtype}; gemkit reads {known}: {_REMEDY}")


def _labeller(labels: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function from a canonical name to the file's own; missing tensors get the name the file would use."""
    known = next((key for key in labels if key.startswith("model.")), "model.")
    name = labels.get(known, known)
    rest = known.removeprefix("model.")
    prefix = name[: len(name) - len(rest)] if name.endswith(rest) else "model."
    return lambda key: plain(labels.get(key) or (key if key == HEAD else prefix + key.removeprefix("model.")))


def _no_text(images: Mapping[str, int], others: list[str]) -> str:
    """Describe the content of a file without a single tensor of the text model."""
    if images:
        return f"holds the image part of a model ({', '.join(images)}) and nothing of its text model: get it whole"
    return (
        f"holds no tensor of a Gemma: it has {listed(map(plain, others)) or 'none at all'}; "
        "get the model in the layout of Hugging Face"
    )


def _hint(config: ModelConfig, raw_config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return a likely cause of tensors that do not fit, for the end of the message."""
    if absent := left_out(raw_config):
        return f" (config.json has no {', '.join(absent)}, so the defaults were taken)"
    rows = shapes.get(EMBEDDING, (config.vocab_size,))[0]
    if rows != config.vocab_size:
        return f" (config.json gives vocab_size {config.vocab_size}, the embedding has {rows} rows)"
    if HEAD not in shapes and not config.tie_word_embeddings:
        return " (config.json sets tie_word_embeddings to false; without a head of its own it should be true)"
    return ""
