"""Writer of adapters in PEFT's layout: `write_peft`. peft, vLLM and gemkit load them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemkit.errors import GemkitError
from gemkit.weights.hf.arrays import header
from gemkit.weights.hf.safetensors import TYPES
from gemkit.weights.lora import LoraConfig, LoraPart, divisor, projection
from gemkit.weights.peft.config import CONFIG, WEIGHTS
from gemkit.weights.quant import GGMLType, quantise
from gemkit.weights.staged import staged_model

NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
    "The adapter in this folder changes a Gemma model; it was written with gemkit.\n"
)


def write_peft(
    folder: str | os.PathLike[str],
    config: LoraConfig,
    parts: Mapping[str, LoraPart],
    *,
    base_model: str = "",
    dtype: GGMLType = GGMLType.F32,
    chat_template: str | None = None,
) -> Path:
    """Write the folder under a temporary name and rename it: there is a whole folder or none.

    config: for all parts; those with another rank or scale are written as patterns.
    parts: by canonical weight name. base_model: the name or path that peft loads. dtype: F32, BF16 or F16.
    chat_template: of an adapter that was trained on turns, which makes a pretrained model expect them.
    Raises GemkitError if the folder exists or cannot be written, or a value is not finite.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise GemkitError(f"{folder} exists: give another name, or delete it first")
    tensors = {}
    for name, part in parts.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        assert projection(name).endswith("_proj"), f"{name} takes no adapter"
        assert part.a.shape[0] == part.b.shape[1] and (part.magnitude is not None) == config.dora, name
        tensors |= {f"{module}.lora_A.weight": part.a, f"{module}.lora_B.weight": part.b}
        if part.magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = part.magnitude
    if broken := next((name for name, values in tensors.items() if not np.isfinite(values).all()), None):
        raise GemkitError(f"{folder} is not written: {broken} holds a value that is not finite; train it again")
    stored = {name: quantise(dtype, np.asarray(values, np.float32)).reshape(-1) for name, values in tensors.items()}
    kind = next(name for name, value in TYPES.items() if value == dtype)
    with staged_model(folder) as temporary:
        temporary.mkdir(parents=True)
        with open(temporary / WEIGHTS, "xb") as file:
            entries = {name: (kind, tensors[name].shape, data.nbytes) for name, data in stored.items()}
            file.write(header(entries, {"format": "pt"}))
            for data in stored.values():
                file.write(data)
        text = json.dumps(_raw_config(config, parts, base_model), indent=2)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8", newline="\n")
        if chat_template is not None:
            (temporary / "chat_template.jinja").write_text(chat_template, encoding="utf-8", newline="\n")
        (temporary / "NOTICE").write_text(NOTICE, encoding="utf-8", newline="\n")
    return folder


def _raw_config(config: LoraConfig, parts: Mapping[str, LoraPart], base_model: str) -> dict[str, object]:
    """Return the contents of ``adapter_config.json``."""
    ranks, alphas = {}, {}
    for name, part in parts.items():
        module = name.removesuffix(".weight")
        if part.rank != config.rank:
            ranks[module] = part.rank
        alpha = _alpha(part, config)
        if alpha != config.alpha:
            alphas[module] = alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": _targets(parts),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _alpha(part: LoraPart, config: LoraConfig) -> float:
    """Return the alpha that gives a part's scale, the configured one if that does."""
    by = divisor(part.rank, config.rslora)
    alpha = part.scale * by
    near = [value for value in (config.alpha, round(alpha), alpha) if value / by == part.scale]
    return near[0] if near else alpha


def _plain(alpha: float) -> float:
    """Return a whole number as an int, as peft writes it."""
    return int(alpha) if alpha == int(alpha) else alpha


def _targets(parts: Mapping[str, LoraPart]) -> list[str]:
    """Return the names of the projections, or of all modules if some layers lack one that others have."""
    layers: dict[str, set[int]] = {}
    for name in parts:
        layers.setdefault(projection(name), set()).add(int(name.split(".")[2]))
    whole = set(range(1 + max(map(max, layers.values()))))
    if all(found == whole for found in layers.values()):
        return list(layers)
    return [name.removesuffix(".weight") for name in parts]
