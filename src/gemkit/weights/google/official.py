"""Configuration and tokenizer for Google's own checkpoints, whose files hold tensors alone.

The configuration is that of ``config.json`` (Hugging Face's keys) if there is one; else that of the published model
with these sizes. The tokenizer is ``tokenizer.model`` in the folder, or in the one above, where the releases have it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemkit.arch.config import ModelConfig
from gemkit.arch.presets import PRESETS
from gemkit.errors import GemkitError
from gemkit.weights.checkpoint import Checkpoint, Tensor
from gemkit.weights.hf import read as hf
from gemkit.weights.hf.tokenizer import TokenizerFiles
from gemkit.weights.json_file import read_object

CONFIG, TOKENIZER = "config.json", "tokenizer.model"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes read from shapes and names. rows: of the embedding. queries, keys: N*H and K*H."""

    rows: int
    hidden_size: int
    intermediate_size: int
    layers: int
    queries: int
    keys: int
    qk_norm: bool
    post_norms: bool

    def fit(self, config: ModelConfig) -> bool:
        """Return whether a model has these sizes, but for the rows of its embedding."""
        H = config.head_dim
        return dataclasses.astuple(self)[1:] == (
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads * H,
            config.num_key_value_heads * H,
            config.qk_norm,
            config.post_norms,
        )


def find_config(folder: Path, sizes: Sizes, path: Path, padded: Mapping[int, int]) -> ModelConfig:
    """Return the configuration of the checkpoint at `path`; see above.

    padded: vocabularies and the rows that the format gives them. Raises GemkitError if the model cannot be identified.
    """
    file = folder / CONFIG
    if file.is_file():
        raw = read_object(file)
        if "model_type" in raw:  # gemma_pytorch's own has other keys, and says no more than the shapes
            return hf._config(folder, raw)
    found = {preset.config for preset in PRESETS.values() if sizes.fit(preset.config)}
    if len(found) != 1:
        raise GemkitError(
            f"{path}: {'no' if not found else 'more than one'} published Gemma has {sizes.layers} layers of width "
            f"{sizes.hidden_size} and {sizes.intermediate_size}, {sizes.queries} and {sizes.keys} for attention: put "
            f"its {CONFIG} (of Hugging Face) next to it"
        )
    config = found.pop()
    if padded.get(config.vocab_size) == sizes.rows:
        return config
    return dataclasses.replace(config, vocab_size=sizes.rows)


def make_checkpoint(
    path: Path,
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    **more: Any,
) -> Checkpoint:
    """Return the checkpoint at `path` with the tokenizer of its folder.

    more: further arguments of `Checkpoint`; source: a file that is another one whenever the weights are others, None if
    there is none: by it copies of them are found again.
    """
    name = path.stem if path.is_file() else hf._name(path)
    raw = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return hf.folder_checkpoint(folder, config, tensors, name, _tokenizer(folder), raw, **more)


def _tokenizer(folder: Path) -> TokenizerFiles | None:
    for place in (folder, folder.absolute().parent):
        if (place / TOKENIZER).is_file():
            return TokenizerFiles(place / TOKENIZER)
    return None
