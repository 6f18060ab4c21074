"""Low-rank adapters in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``. See `read_peft`.

An adapter adds scale · B·A to a matrix [out, in]: A is [r, in], B is [out, r], scale is alpha / r, or alpha / √r with
use_rslora. Anything else that PEFT can store is refused by its name, since leaving it out would change the answers.
Source: peft, ``tuners/lora/layer.py`` (update_layer), ``tuners/lora/model.py`` and ``utils/other.py`` (patterns).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.arch.tensors import manifest
from gemkit.errors import GemkitError, listed
from gemkit.weights.gguf import names
from gemkit.weights.hf.safetensors import TYPES, SafetensorsFile, shown
from gemkit.weights.json_file import read_object
from gemkit.weights.quant import dequantise

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Keys that say how an adapter was trained or where it came from: any value is right.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "lora_ga_config",
    "loftq_config",
    "corda_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
# Meaning of a set key, for the error message; any other unknown key that is set is refused too.
_VARIANTS = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules",
    "fan_in_fan_out": "transposed weights",
    "lora_bias": "biases",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "parameters without a module",
    "megatron_config": "Megatron layers",
}
# Starts from which A and B alone are enough. The others (pissa, olora, corda, loftq …) change the base weights too.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

_MLX_WEIGHTS = "adapters.safetensors"
_FUSE = "merge it with mlx_lm.fuse (--dequantize if the model is quantised) and load the result"
_MERGE = "merge it into the model with peft (merge_and_unload) and load the result"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
# Most patterns, and most steps back that matching them all against one module's name may take; a name's length
_MAX_PATTERNS = 2_000
_MAX_STEPS = 100_000
_MAX_MODULE = 200


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """An adapter: what `gemkit.models.native` adds to the matrices.

    name: the folder's, for people. rank: the largest r. source: its folder.
    parts: by canonical weight name ("model.layers.0.self_attn.q_proj.weight"): A [r, in], B [out, r] (float32), scale.
    ignored: the names of its modules for images, which text never reaches.
    """

    name: str
    rank: int
    parts: Mapping[str, tuple[np.ndarray, np.ndarray, float]]
    source: Path
    ignored: tuple[str, ...] = ()


def read_peft(path: str | os.PathLike[str]) -> LoraAdapter:
    """Read an adapter: its folder or one of its two files. Raises GemkitError if it is broken or not plain LoRA."""
    folder = Path(path)
    if folder.name in (CONFIG, WEIGHTS, _MLX_WEIGHTS) and not folder.is_dir():
        folder = folder.parent
    if not folder.is_dir():
        what = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise GemkitError(f"the adapter {folder} {what}: give the path of a PEFT adapter's folder")
    if not os.path.lexists(folder / CONFIG):
        raise GemkitError(f"{folder} {_no_adapter(folder)}")
    raw = read_object(folder / CONFIG)
    if kind := _mlx_kind(folder, raw):
        raise GemkitError(f"{folder} is an adapter of mlx_lm ({kind}), and gemkit runs PEFT's LoRA: {_FUSE}")
    scales = _Scales(folder / CONFIG, raw)
    if not os.path.lexists(folder / WEIGHTS):
        if os.path.lexists(folder / "adapter_model.bin"):
            raise GemkitError(
                f"{folder / 'adapter_model.bin'} is a pickle, which can run programs: load it with peft where you "
                "trust it and save it again as safetensors"
            )
        raise GemkitError(f"{folder} has no {WEIGHTS}: get the whole adapter")
    pairs: dict[str, dict[str, np.ndarray]] = {}
    with SafetensorsFile(folder / WEIGHTS) as file:
        for name in file.tensors:
            module, side = _parse(file.path, name)
            pair = pairs.setdefault(module, {})
            if side in pair:
                raise GemkitError(f"{file.path}: {shown(module)} has two lora_{side}: keep one adapter in the file")
            pair[side] = _values(file, name)
    return _adapter(folder, pairs, scales)


def _mlx_kind(folder: Path, raw: Mapping[str, object]) -> str:
    """Return the evidence that an adapter was trained by mlx_lm, or ""."""
    for key in ("fine_tune_type", "lora_parameters", "lora_layers"):
        if key in raw:
            return f"{key} in {CONFIG}"
    if "peft_type" not in raw and os.path.lexists(folder / _MLX_WEIGHTS) and not os.path.lexists(folder / WEIGHTS):
        return _MLX_WEIGHTS
    return ""


def _no_adapter(folder: Path) -> str:
    """Return the kind of a folder without ``adapter_config.json``, and the remedy."""
    if os.path.lexists(folder / _MLX_WEIGHTS):
        return f"has no {CONFIG}, and {_MLX_WEIGHTS} is mlx_lm's: {_FUSE}"
    if os.path.lexists(folder / "config.json"):
        return f"holds a model (config.json), not an adapter, which has {CONFIG}: give the folder of a PEFT adapter"
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    found = f", but there are adapters in it: give one, such as {listed(inner)}" if inner else ""
    return f"has no {CONFIG}{found or ': give the folder of a PEFT adapter'}"


def check_fits(adapter: LoraAdapter, config: ModelConfig) -> None:
    """Raise GemkitError unless every part belongs to a matrix of the model that adapters attach to, of its shape."""
    specs = manifest(config)
    for name, (a, b, _) in adapter.parts.items():
        spec = specs.get(name)
        if spec is None or not spec.lora:
            raise GemkitError(
                f"{adapter.source}: the adapter changes {shown(name)}, which this model does not have: "
                "load it with the model it was trained on"
            )
        if (b.shape[0], a.shape[1]) != spec.shape:
            raise GemkitError(
                f"{adapter.source}: the adapter's {name} is for a matrix of {[b.shape[0], a.shape[1]]}, this model has "
                f"{list(spec.shape)}: load it with the model it was trained on"
            )


def _parse(path: Path, name: str) -> tuple[str, str]:
    """Return the module and the side, "A" or "B", of a tensor."""
    found = _TENSOR.fullmatch(name)
    if found is None:
        for word, kind in (
            ("lora_embedding_", "an adapter of an embedding"),
            ("embed_tokens", "a part of the embedding"),
            ("lora_magnitude_vector", "DoRA"),
            ("modules_to_save", "a whole module"),
            (".bias", "a bias"),
        ):
            if word in name:
                raise GemkitError(f"{path}: {shown(name)} is {kind}; gemkit runs plain LoRA: {_MERGE}")
        raise GemkitError(f"{path}: {shown(name)} is no tensor of plain LoRA: {_MERGE}")
    module = found["module"]
    if len(module) > _MAX_MODULE:
        raise GemkitError(f"{path}: {shown(name)} is no module of a Gemma model: give another adapter")
    if module.rpartition(".")[2] in ("lm_head", "embed_tokens"):
        raise GemkitError(f"{path}: {shown(name)} adapts the {module.rpartition('.')[2]}, not a layer: {_MERGE}")
    return module, found["side"]


def _values(file: SafetensorsFile, name: str) -> np.ndarray:
    """Return a matrix as float32."""
    entry = file.tensors[name]
    if entry.dtype not in TYPES:
        raise GemkitError(
            f"{file.path}: {shown(name)} is {entry.dtype}; gemkit reads {', '.join(TYPES)}: save it as one"
        )
    if len(entry.shape) != 2 or 0 in entry.shape:
        raise GemkitError(
            f"{file.path}: {shown(name)} has the shape {list(entry.shape)}, not [rows, columns]: get it again"
        )
    values = dequantise(TYPES[entry.dtype], file.data(name), entry.shape)
    if not np.isfinite(values).all():
        raise GemkitError(f"{file.path}: {shown(name)} holds a number that is not finite: train it again")
    return values


def _adapter(folder: Path, pairs: Mapping[str, Mapping[str, np.ndarray]], scales: _Scales) -> LoraAdapter:
    parts: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
    ignored = []
    for module, pair in pairs.items():
        if missing := {"A", "B"} - pair.keys():
            raise GemkitError(f"{folder / WEIGHTS}: {shown(module)} lacks lora_{missing.pop()}: get the adapter again")
        a, b = pair["A"], pair["B"]
        rank, scale = scales.of(module)
        if len(a) != rank or b.shape[1] != rank:
            raise GemkitError(
                f"{folder / WEIGHTS}: {shown(module)} has A {list(a.shape)} and B {list(b.shape)}, but {CONFIG} gives "
                f"it rank {rank}: get both files again"
            )
        if names.image_part(module):
            ignored.append(module)
            continue
        key = names.from_multimodal(module) + ".weight"
        if key in parts:
            raise GemkitError(f"{folder / WEIGHTS}: {shown(module)} is there under two names: get the adapter again")
        parts[key] = a, b, scale
    if not parts:
        raise GemkitError(f"{folder / WEIGHTS} changes no layer of the text model: give another adapter")
    name = folder.absolute().name
    return LoraAdapter(name, max(len(a) for a, _, _ in parts.values()), parts, folder, tuple(ignored))


class _Scales:
    """The ranks and scales that ``adapter_config.json`` gives. Raises GemkitError for anything but plain LoRA."""

    def __init__(self, path: Path, raw: Mapping[str, object]) -> None:
        self.path = path
        self._refuse_variants(raw)
        self.rank = self._rank("r", raw.get("r"))
        self.alpha = self._alpha("lora_alpha", raw.get("lora_alpha"))
        self.rslora = raw.get("use_rslora") or False
        if not isinstance(self.rslora, bool):
            raise GemkitError(f"{path}: use_rslora is {shown(self.rslora)}, not true or false; get the file again")
        self.ranks = {k: self._rank("rank_pattern", v) for k, v in self._patterns(raw, "rank_pattern").items()}
        self.alphas = {k: self._alpha("alpha_pattern", v) for k, v in self._patterns(raw, "alpha_pattern").items()}
        self._rank_rules = self._compile(self.ranks)
        self._alpha_rules = self._compile(self.alphas)

    def of(self, module: str) -> tuple[int, float]:
        """Return rank and scale; the first pattern that fits counts, and it may match the end of the name."""
        rank = next((self.ranks[key] for key, rule in self._rank_rules if rule.match(module)), self.rank)
        alpha = next((self.alphas[key] for key, rule in self._alpha_rules if rule.match(module)), self.alpha)
        return rank, alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def _refuse_variants(self, raw: Mapping[str, object]) -> None:
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise GemkitError(f"{self.path}: its peft_type is {shown(kind)}; gemkit runs LORA: {_MERGE}")
        if raw.get("bias", "none") != "none":
            raise GemkitError(f"{self.path}: it trains biases (bias is {shown(raw['bias'])}): {_MERGE}")
        init = raw.get("init_lora_weights", True)
        if not any(init is known or (isinstance(init, str) and init == known) for known in _INITS):
            raise GemkitError(
                f"{self.path}: init_lora_weights is {shown(init)}, which changes the model's own weights: "
                "convert it to plain LoRA with peft"
            )
        for key, value in raw.items():
            if value and key not in _HARMLESS and key not in _READ:
                what = _VARIANTS.get(key, "something unknown to gemkit")
                raise GemkitError(f"{self.path}: it uses {what} ({shown(key)}); gemkit runs plain LoRA: {_MERGE}")

    def _rank(self, key: str, value: object) -> int:
        if type(value) is not int or not 0 < value < 2**16:
            raise GemkitError(
                f"{self.path}: {key} gives {shown(value)}, not a rank from 1 to 65535; get the file again"
            )
        return value

    def _alpha(self, key: str, value: object) -> float:
        if type(value) not in (int, float) or not 0 < abs(value) < 1e30:
            raise GemkitError(f"{self.path}: {key} gives {shown(value)}, not a number other than 0; get the file again")
        return value

    def _patterns(self, raw: Mapping[str, object], key: str) -> dict[str, object]:
        value = raw.get(key) or {}
        if not isinstance(value, dict):
            raise GemkitError(f"{self.path}: {key} is {shown(value)}, not an object; get the file again")
        return value

    def _compile(self, patterns: Mapping[str, object]) -> list[tuple[str, re.Pattern[str]]]:
        if len(patterns) > _MAX_PATTERNS or sum(_steps(key) for key in patterns) > _MAX_STEPS:
            raise GemkitError(f"{self.path}: its patterns take too long to match: write simpler ones")
        try:
            return [(key, re.compile(rf"(.*\.)?({key})$")) for key in patterns]
        except (re.error, RecursionError, OverflowError) as error:
            raise GemkitError(f"{self.path}: a pattern is no regular expression ({error}): mend it") from None


_TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\)[*+{]|\(\?:|\(\?|.", re.DOTALL)


def _steps(pattern: str) -> float:
    """Estimate how often a regular expression can backtrack over a module's name; infinite where unbounded.

    A file that is not trusted must not make gemkit hang: repeated groups, and all special ones, count as unbounded.
    """
    total, alternatives = 1.0, [1]
    for token in _TOKENS.findall(pattern[: 2 * _MAX_MODULE + 1]):
        if token in (")*", ")+", "){", "(?"):
            return math.inf
        if token in ("(", "(?:"):
            alternatives.append(1)
        elif token == ")" and len(alternatives) > 1:
            total *= alternatives.pop()
        elif token == "|":
            alternatives[-1] += 1
        elif token in ("*", "+", "{"):
            total *= 32
        elif token == "?":
            total *= 2
    return total * math.prod(alternatives) if len(pattern) <= 2 * _MAX_MODULE else math.inf
