"""Reader of ``adapter_config.json``: `Settings`. Anything that it cannot state as LoRA or DoRA is refused by its name.

Source: peft, ``tuners/lora/layer.py`` (update_layer), ``tuners/lora/model.py`` and ``utils/other.py`` (patterns).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from gemkit.errors import GemkitError
from gemkit.weights.hf.safetensors import shown
from gemkit.weights.lora import MAX_RANK, LoraConfig, divisor

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
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
_READ |= {"bias", "init_lora_weights"}
# Meaning of a set key, for the error message; any other unknown key that is set is refused too.
_VARIANTS = {
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
# Starts from which the tensors alone are enough. The others (pissa, olora, corda, loftq …) change the base weights too.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

MERGE = "merge it into the model with peft (merge_and_unload) and load the result"
# Most patterns, and most steps back that matching them all against one module's name may take; a name's length
_MAX_PATTERNS = 2_000
_MAX_STEPS = 100_000
MAX_MODULE = 200


class Settings:
    """The ranks and scales that ``adapter_config.json`` gives. Raises GemkitError for anything but LoRA and DoRA."""

    def __init__(self, path: Path, raw: Mapping[str, object]) -> None:
        self.path = path
        self._refuse_variants(raw)
        self.rank = self._rank("r", raw.get("r"))
        self.alpha = self._alpha("lora_alpha", raw.get("lora_alpha"))
        self.dropout = self._dropout(raw.get("lora_dropout") or 0.0)
        self.rslora, self.dora = self._flag(raw, "use_rslora"), self._flag(raw, "use_dora")
        self.ranks = {k: self._rank("rank_pattern", v) for k, v in self._patterns(raw, "rank_pattern").items()}
        self.alphas = {k: self._alpha("alpha_pattern", v) for k, v in self._patterns(raw, "alpha_pattern").items()}
        self._rank_rules = self._compile(self.ranks)
        self._alpha_rules = self._compile(self.alphas)

    def of(self, module: str) -> tuple[int, float]:
        """Return rank and scale; the first pattern that fits counts, and it may match the end of the name."""
        rank = next((self.ranks[key] for key, rule in self._rank_rules if rule.match(module)), self.rank)
        alpha = next((self.alphas[key] for key, rule in self._alpha_rules if rule.match(module)), self.alpha)
        return rank, alpha / divisor(rank, self.rslora)

    def lora(self, targets: tuple[str, ...]) -> LoraConfig:
        """Return the settings without the patterns. targets: what the tensors belong to."""
        return LoraConfig(self.rank, self.alpha, self.dropout, targets, self.rslora, self.dora)

    def _refuse_variants(self, raw: Mapping[str, object]) -> None:
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise GemkitError(f"{self.path}: its peft_type is {shown(kind)}; gemkit runs LORA: {MERGE}")
        if raw.get("bias", "none") != "none":
            raise GemkitError(f"{self.path}: it trains biases (bias is {shown(raw['bias'])}): {MERGE}")
        init = raw.get("init_lora_weights", True)
        if not any(init is known or (isinstance(init, str) and init == known) for known in _INITS):
            raise GemkitError(
                f"{self.path}: init_lora_weights is {shown(init)}, which changes the model's own weights: "
                "convert it to plain LoRA with peft"
            )
        for key, value in raw.items():
            if value and key not in _HARMLESS and key not in _READ:
                what = _VARIANTS.get(key, "something unknown to gemkit")
                raise GemkitError(f"{self.path}: it uses {what} ({shown(key)}); gemkit runs LoRA and DoRA: {MERGE}")

    def _flag(self, raw: Mapping[str, object], key: str) -> bool:
        value = raw.get(key) or False
        if not isinstance(value, bool):
            raise GemkitError(f"{self.path}: {key} is {shown(value)}, not true or false; get the file again")
        return value

    def _dropout(self, value: object) -> float:
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise GemkitError(
                f"{self.path}: lora_dropout gives {shown(value)}, not a share below 1; get the file again"
            )
        return value

    def _rank(self, key: str, value: object) -> int:
        if type(value) is not int or not 0 < value <= MAX_RANK:
            raise GemkitError(
                f"{self.path}: {key} gives {shown(value)}, not a rank from 1 to {MAX_RANK}; get the file again"
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
    for token in _TOKENS.findall(pattern[: 2 * MAX_MODULE + 1]):
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
    return total * math.prod(alternatives) if len(pattern) <= 2 * MAX_MODULE else math.inf
