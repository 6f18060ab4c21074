"""Receipts: what a text was made from, so that anyone with the same weights can make it again, token for token.

The native engine's results depend on neither batch, chunks nor threads, so a receipt needs the weights, the ids of the
prompt and the settings alone. It is a JSON file; its last field is a checksum of all others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemkit import __version__
from gemkit.api.load import Loading, find, wants_original
from gemkit.api.model import Model
from gemkit.api.options import LoadOptions
from gemkit.api.output import Completion
from gemkit.arch.hf_config import to_hf
from gemkit.arch.tensors import manifest
from gemkit.cache import atomic_write
from gemkit.errors import GemkitError, UsageError
from gemkit.weights.open import open_checkpoint

FORMAT = 1
# Arguments of `load` that change results
LOAD = ("dtype", "activations", "adapter")
_FIELDS = {
    "format": int,
    "gemkit": str,
    "model": str,
    "weights": str,
    "load": dict,
    "instructions": str,
    "prompt_ids": list,
    "settings": dict,
    "ids": list,
}


def write_receipt(
    path: str | os.PathLike[str],
    model: str | os.PathLike[str],
    loaded: Model,
    load: Mapping[str, object],
    prompt_ids: Sequence[int],
    settings: Mapping[str, object],
    ids: Sequence[int],
) -> None:
    """Write a receipt, whole or not at all.

    model: as it was given to `gemkit.load`, with `load`. settings: of `Model.generate`, the seed among them. ids: what
    was generated. Raises GemkitError if the file cannot be written.
    """
    source = find(model, original=_original(load))
    record = {
        "format": FORMAT,
        "gemkit": __version__,
        # A file is found from anywhere, a name on any machine
        "model": str(source.resolve()) if Path(model).exists() else str(model),
        "weights": _weights(source),
        "load": {name: str(load[name]) for name in LOAD if name in load}
        | ({"adapter_sha256": _folder(load["adapter"])} if "adapter" in load else {}),
        "instructions": loaded.engine.runner.info.path,
        "prompt_ids": list(prompt_ids),
        "settings": dict(settings),
        "ids": list(ids),
    }
    text = json.dumps(record | {"sha256": _checksum(record)}, indent=1) + "\n"
    try:
        atomic_write(path, text.encode(), private=False)
    except OSError as error:
        raise GemkitError(f"{path} cannot be written ({error.strerror or error}): check folder and space") from None


def read_receipt(path: str | os.PathLike[str]) -> dict:
    """Return the record of a receipt. Raises GemkitError if the file is none, or was changed."""
    try:
        record = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise GemkitError(f"{path} is no receipt ({type(error).__name__}): give a file that --receipt wrote") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise GemkitError(f"{path} is no receipt of format {FORMAT}: give a file that --receipt wrote")
    if record.pop("sha256", None) != _checksum(record):
        raise GemkitError(f"{path} was changed after it was written: get it again from where it was made")
    if any(not isinstance(record.get(name), kind) for name, kind in _FIELDS.items()):
        raise GemkitError(f"{path} lacks fields of a receipt: get it again from where it was made")
    return record


@dataclass(frozen=True)
class Replay:
    """The result of a replay. ids: the new tokens. first_difference: the index of the first token that differs from the
    receipt's; None if all are equal. instructions: the kernels then and now."""

    ids: list[int]
    text: str
    first_difference: int | None
    instructions: tuple[str, str]


def replay(
    record: Mapping, *, model: str | os.PathLike[str] | None = None, threads: int | None = None, batch: int = 1
) -> Replay:
    """Make the text of a receipt again.

    record: of `read_receipt`. model: where the weights are, if not where they were. threads: any number. batch: how
    many requests share the steps; the others have other prompts.
    Raises GemkitError if the weights are not those of the receipt.
    """
    if batch < 1:
        raise UsageError(f"batch is {batch}; give a whole number from 1")
    load = {name: value for name, value in record["load"].items() if name in LOAD}
    if "adapter" in load and _folder(load["adapter"]) != record["load"].get("adapter_sha256"):
        raise GemkitError(f"{load['adapter']} is not the receipt's adapter: put the one back that it was made with")
    source = find(model if model is not None else record["model"], original=_original(load))
    if _weights(source) != record["weights"]:
        raise GemkitError(f"{source} has other weights than the receipt: give the model that it was made with")
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in record["settings"].items()}
    if "logit_bias" in settings:
        settings["logit_bias"] = {int(token): value for token, value in settings["logit_bias"]}
    prompt = record["prompt_ids"]
    prompts = [prompt] + [prompt[: 1 + n % len(prompt)] for n in range(batch - 1)]
    with Loading(source, LoadOptions(threads, **load)).model() as loaded:
        found: Completion = loaded.generate(prompts, **settings)[0]
        now = loaded.engine.runner.info.path
    wanted = record["ids"]
    differ = (n for n, (a, b) in enumerate(zip(found.ids, wanted)) if a != b)
    at = next(differ, None if len(found.ids) == len(wanted) else min(len(found.ids), len(wanted)))
    return Replay(found.ids, str(found), at, (record["instructions"], now))


def _original(load: Mapping[str, object]) -> bool:
    return wants_original(dtype=str(load.get("dtype", "auto")), adapter=load.get("adapter"))


def _weights(source: Path) -> str:
    """Return the SHA-256 of a model's configuration and of its tensors as stored."""
    digest = hashlib.sha256()
    with open_checkpoint(source) as checkpoint:
        digest.update(json.dumps(to_hf(checkpoint.config), sort_keys=True).encode())
        for name in manifest(checkpoint.config):
            tensor = checkpoint.tensors[name]
            digest.update(f"{name} {tensor.type.name} {list(tensor.shape)} {tensor.add_one}\n".encode())
            digest.update(tensor.data.data)
    return digest.hexdigest()


def _folder(path: object) -> str:
    """Return the SHA-256 of the files of an adapter's folder, by name."""
    digest = hashlib.sha256()
    for file in sorted(Path(str(path)).glob("adapter_*")):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _checksum(record: Mapping) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
