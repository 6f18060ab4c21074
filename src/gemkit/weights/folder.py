"""Choice of the model's and the tokenizer's files in a folder or repository, by their names alone.

One rule for loading, the hubs, `check` and the converters:

- Safetensors next to a ``config.json`` are the model: ``model.safetensors``, or else the shards of its index, or else
  the only other file that is not an adapter. GGUF files next to them are ignored.
- Otherwise the only GGUF file that is a model: not an image encoder (mmproj), an importance matrix or an adapter.
- ``tokenizer.json`` is the tokenizer where there is one, as in transformers; else ``tokenizer.model``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"
# The first that exists is the tokenizer; the others add or rename tokens.
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Files that a training run keeps next to its weights
_TRAINING = frozenset(
    {"optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "scaler.pt", "training_args.bin"}
)
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}$")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
MOST_PARTS = 9999
_NO_MODEL = re.compile(r"mmproj|imatrix|(?:^|[-_.])lora(?:$|[-_.])|(?:^|[-_.])adapter(?:$|[-_.])")


def top_level(folder: Path) -> list[str]:
    """Return names of the entries of a folder that are no folders, sorted. Raises OSError."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.is_dir())


def tokenizer(names: Iterable[str]) -> str | None:
    """Return the tokenizer's file among those of a Hugging Face folder, or None."""
    names = set(names)
    return next((name for name in TOKENIZERS if name in names), None)


def is_adapter_file(name: str) -> bool:
    """Return whether a file holds the weights of a LoRA adapter, by PEFT's or MLX's name."""
    return name.endswith(".safetensors") and re.match(r"(?:\d+_)?adapters?(?:_model)?\.", name) is not None


def is_shard(name: str) -> bool:
    """Return whether a file is one of several with a model's weights."""
    return _SHARD.fullmatch(name) is not None


def safetensors_of(names: Iterable[str]) -> list[str]:
    """Return the safetensors files at the top of a folder that may be a model's: no adapter's."""
    return sorted(
        name
        for name in names
        if name.endswith(".safetensors") and "/" not in name and not (is_adapter_file(name) or _is_macos(name))
    )


def is_hugging_face(names: Iterable[str]) -> bool:
    """Return whether the model is the folder's safetensors, or would be if they were complete."""
    names = set(names)
    return CONFIG in names and bool(safetensors_of(names) or INDEX in names)


def ggufs_of(names: Iterable[str]) -> list[str]:
    """Return the GGUF files that are models, by name; `names` may be in subfolders."""
    return sorted(name for name in names if name.lower().endswith(".gguf") and is_model_gguf(name))


def is_model_gguf(name: str) -> bool:
    """Return whether the name is that of a model, not of an image encoder, importance matrix or adapter in GGUF."""
    name = name.rsplit("/", 1)[-1]
    return _NO_MODEL.search(stem(name).lower()) is None and not _is_macos(name)


def _is_macos(name: str) -> bool:
    """Return whether it is a file of attributes, which macOS writes on foreign disks and in archives."""
    return name.startswith("._")


def stem(name: str) -> str:
    """Return a GGUF file's name without the suffix."""
    return re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE)


def unsplit(name: str) -> str:
    """Return a GGUF file's name without the number of its part: `x-00001-of-00003.gguf` is a part of `x.gguf`."""
    return _SPLIT.sub("", stem(name)) + name[len(stem(name)) :]


def part_names(name: str) -> tuple[str, ...]:
    """Return the files of a GGUF model by the name of one of them, in order: itself alone if it is not split."""
    found = _PART.fullmatch(name)
    count = int(found[3]) if found else 1
    if not found or not 1 < count <= MOST_PARTS or not 0 < int(found[2]) <= count:
        return (name,)
    return tuple(f"{found[1]}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))


def part_paths(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return `part_names` in the folder of `path`."""
    path = Path(path)
    return tuple(path.with_name(name) for name in part_names(path.name))


def are_parts(ggufs: Iterable[str]) -> bool:
    """Return whether these files are all parts of one model."""
    ggufs = list(ggufs)
    return any(unsplit(name) != name for name in ggufs) and len({unsplit(name) for name in ggufs}) == 1


def pickles_of(names: Iterable[str]) -> list[str]:
    """Return pickled weights, such as pytorch_model.bin and its shards, without optimizer states and the like."""
    return sorted(
        name
        for name in names
        if name.endswith(_PICKLES)
        and not (name.rsplit("/", 1)[-1] in _TRAINING or name.rsplit("/", 1)[-1].startswith("rng_state"))
    )
