"""Reader of adapters in PEFT's layout: `read_peft`. Anything that is neither LoRA nor DoRA is refused by its name.

Source: peft, ``utils/save_and_load.py`` (names of tensors), ``tuners/lora/dora.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemkit.errors import GemkitError, listed
from gemkit.weights.hf.read import read_chat_template
from gemkit.weights.hf.safetensors import TYPES, SafetensorsFile, shown
from gemkit.weights.hf.tensors import canonical, image_part
from gemkit.weights.json_file import read_object
from gemkit.weights.lora import LoraAdapter, LoraPart, projection
from gemkit.weights.peft.config import CONFIG, MAX_MODULE, MERGE, WEIGHTS, Settings
from gemkit.weights.quant import dequantise

_MLX_WEIGHTS = "adapters.safetensors"
_FUSE = "merge it with mlx_lm.fuse (--dequantize if the model is quantised) and load the result"
_MAGNITUDE = "lora_magnitude_vector"
# Some programs keep the adapter's name in the tensors', and peft's modules have a magnitude's under ".weight"
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?:(?P<side>lora_[AB])(?:\.[^.]+)?\.weight"
    r"|lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)"
)


def read_peft(path: str | os.PathLike[str]) -> LoraAdapter:
    """Read an adapter: its folder or one of its two files. Raises GemkitError if it is broken or another kind."""
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
        raise GemkitError(f"{folder} is an adapter of mlx_lm ({kind}), and gemkit runs PEFT's: {_FUSE}")
    settings = Settings(folder / CONFIG, raw)
    if not os.path.lexists(folder / WEIGHTS):
        if os.path.lexists(folder / "adapter_model.bin"):
            raise GemkitError(
                f"{folder / 'adapter_model.bin'} is a pickle, which can run programs: load it with peft where you "
                "trust it and save it again as safetensors"
            )
        raise GemkitError(f"{folder} has no {WEIGHTS}: get the whole adapter")
    modules: dict[str, dict[str, np.ndarray]] = {}
    with SafetensorsFile(folder / WEIGHTS) as file:
        for name in file.tensors:
            module, side = _parse(file.path, name)
            sides = modules.setdefault(module, {})
            if side in sides:
                raise GemkitError(f"{file.path}: {shown(module)} has two {side}: keep one adapter in the file")
            sides[side] = _values(file, name, 1 if side == _MAGNITUDE else 2)
    return _adapter(folder, modules, settings)


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


def _parse(path: Path, name: str) -> tuple[str, str]:
    """Return the module and the side, "lora_A", "lora_B" or "lora_magnitude_vector", of a tensor."""
    found = _TENSOR.fullmatch(name)
    if found is None:
        for word, kind in (
            ("lora_embedding_", "an adapter of an embedding"),
            ("embed_tokens", "a part of the embedding"),
            ("modules_to_save", "a whole module"),
            (".bias", "a bias"),
        ):
            if word in name:
                raise GemkitError(f"{path}: {shown(name)} is {kind}; gemkit runs LoRA and DoRA: {MERGE}")
        raise GemkitError(f"{path}: {shown(name)} is no tensor of LoRA or DoRA: {MERGE}")
    module = found["module"]
    if len(module) > MAX_MODULE:
        raise GemkitError(f"{path}: {shown(name)} is no module of a Gemma model: give another adapter")
    if module.rpartition(".")[2] in ("lm_head", "embed_tokens"):
        raise GemkitError(f"{path}: {shown(name)} adapts the {module.rpartition('.')[2]}, not a layer: {MERGE}")
    return module, found["side"] or _MAGNITUDE


def _values(file: SafetensorsFile, name: str, axes: int) -> np.ndarray:
    """Return a tensor with this number of axes as float32."""
    entry = file.tensors[name]
    if entry.dtype not in TYPES:
        raise GemkitError(
            f"{file.path}: {shown(name)} is {entry.dtype}; gemkit reads {', '.join(TYPES)}: save it as one"
        )
    if len(entry.shape) != axes or 0 in entry.shape:
        expected = "[rows, columns]" if axes == 2 else "[rows]"
        raise GemkitError(f"{file.path}: {shown(name)} has the shape {list(entry.shape)}, not {expected}: get it again")
    values = dequantise(TYPES[entry.dtype], file.data(name), entry.shape)
    if not np.isfinite(values).all():
        raise GemkitError(f"{file.path}: {shown(name)} holds a value that is not finite: train it again")
    return values


def _adapter(folder: Path, modules: Mapping[str, Mapping[str, np.ndarray]], settings: Settings) -> LoraAdapter:
    path = folder / WEIGHTS
    needed = {"lora_A", "lora_B", _MAGNITUDE} if settings.dora else {"lora_A", "lora_B"}
    parts: dict[str, LoraPart] = {}
    ignored = []
    for module, sides in modules.items():
        if missing := sorted(needed - sides.keys()):
            raise GemkitError(f"{path}: {shown(module)} lacks {missing[0]}: get the adapter again")
        if more := sorted(sides.keys() - needed):
            raise GemkitError(
                f"{path}: {shown(module)} has {more[0]}, but {CONFIG} lacks use_dora: get both files again"
            )
        a, b, magnitude = sides["lora_A"], sides["lora_B"], sides.get(_MAGNITUDE)
        rank, scale = settings.of(module)
        if len(a) != rank or b.shape[1] != rank:
            raise GemkitError(
                f"{path}: {shown(module)} has A {list(a.shape)} and B {list(b.shape)}, but {CONFIG} gives "
                f"it rank {rank}: get both files again"
            )
        if magnitude is not None and len(magnitude) != len(b):
            raise GemkitError(
                f"{path}: {shown(module)} has B {list(b.shape)} and {len(magnitude)} magnitudes: get the adapter again"
            )
        if image_part(module):
            ignored.append(module)
            continue
        key = canonical(f"{module}.weight") or f"{module}.weight"
        if key in parts:
            raise GemkitError(f"{path}: {shown(module)} occurs under two names: get the adapter again")
        parts[key] = LoraPart(a, b, scale, magnitude)
    if not parts:
        raise GemkitError(f"{path} changes no layer of the text model: give another adapter")
    config = settings.lora(tuple(sorted(set(map(projection, parts)))))
    return LoraAdapter(folder.absolute().name, config, parts, folder, tuple(ignored), read_chat_template(folder))
