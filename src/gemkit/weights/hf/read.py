"""Model folders in the layout of Hugging Face: ``config.json``, safetensors, a tokenizer. See `read_hf`.

Read are ``config.json``; the stop ids of ``generation_config.json`` and ``tokenizer_config.json``;
``model.safetensors`` or the shards of its index; the tokenizer (`gemkit.weights.hf.tokenizer`); the chat template.
Multimodal Gemma 3 is read as its text model.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemkit.arch.config import ModelConfig
from gemkit.arch.hf_config import from_hf
from gemkit.errors import GemkitError, GemkitWarning, listed
from gemkit.text.encoding import decode
from gemkit.weights import tuned
from gemkit.weights.checkpoint import Checkpoint, Tensor
from gemkit.weights.folder import top_level
from gemkit.weights.hf.safetensors import open_weights, shown
from gemkit.weights.hf.stop import special_tokens, stop_ids
from gemkit.weights.hf.tensors import read_tensors, refuse_quantised
from gemkit.weights.hf.tokenizer import TokenizerFiles, find_tokenizer
from gemkit.weights.json_file import read_file, read_object


def read_hf(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a folder with a Gemma 1, 2 or 3 model. Tensors are views of the mapped files, the vocabulary is read later.

    metadata: "dtype" of ``config.json``, and in "ignored" which parts for images were not read.
    Raises GemkitError if files are missing or broken, or do not hold exactly the model's tensors.
    """
    folder = Path(path)
    raw = read_object(folder / "config.json")
    config = _config(folder, raw)
    tokenizer = find_tokenizer(folder, _names(folder))
    named = raw.get("transformers_weights")
    files = open_weights(folder, named if isinstance(named, str) else None)
    try:
        config, tensors, ignored = read_tensors(folder, config, raw, files)
        metadata: dict[str, object] = {key: value for key, value in files.metadata.items() if key == "format"}
        if isinstance(dtype := raw.get("dtype") or raw.get("torch_dtype"), str):
            metadata["dtype"] = dtype
        if ignored:
            metadata["ignored"] = ignored
        more = {"special_tokens": special_tokens(folder), "source": folder, "metadata": metadata, "close": files.close}
        return folder_checkpoint(folder, config, tensors, _name(folder), tokenizer, raw, **more)
    except BaseException:
        files.close()
        raise


def folder_checkpoint(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    name: str,
    tokenizer: TokenizerFiles | None,
    raw: Mapping[str, object],
    **more: Any,
) -> Checkpoint:
    """Return a checkpoint with a folder's chat template, and with its tokenizer, which is read later.

    raw: ``config.json``, empty without one. more: further arguments of `Checkpoint`.
    """
    template = read_chat_template(folder)
    return Checkpoint(
        config,
        tensors,
        vocabulary=tokenizer and (lambda: tokenizer.vocabulary(config.vocab_size)),
        vocabulary_key=tokenizer and (lambda: tokenizer.key(config.vocab_size)),
        chat_template=template,
        name=name,
        instruction_tuned=tuned.instruction_tuned(tuned.mark(raw, tuned.CONFIG_KEY, template), template, name),
        **more,
    )


def _names(folder: Path) -> list[str]:
    try:
        return top_level(folder)
    except OSError as error:
        raise GemkitError(f"{folder} cannot be read ({error.strerror or error}): check the path") from None


# --- configuration ---------------------------------------------------------------------------------------------------


def _config(folder: Path, raw: dict[str, object]) -> ModelConfig:
    """Read ``config.json``, with the stop ids of the other files besides its own."""
    path = folder / "config.json"
    refuse_quantised(path, raw)
    try:
        config = from_hf(raw)
    except GemkitError as error:
        raise GemkitError(f"{path}: {error}") from None
    ids = dict.fromkeys([*config.stop_token_ids, *stop_ids(folder, config.vocab_size)])
    return dataclasses.replace(config, stop_token_ids=tuple(ids))


def _name(folder: Path) -> str:
    """Return the display name. The hubs' caches keep a model below its name, in a folder named by commit or version."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return "/".join(folder.parents[1].name.split("--", 2)[1:])
    return folder.parent.name if folder.name.isdigit() else folder.name


def read_chat_template(folder: Path) -> str | None:
    """Return a folder's chat template, from the file that transformers would read it from."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        return _text(path)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if not os.path.lexists(path):
            continue
        template = read_object(path).get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {row.get("name"): row.get("template") for row in template if isinstance(row, dict)}
            if "default" not in named and (first := next(iter(named), None)) is not None:
                warnings.warn(
                    f"{path}: it has the chat templates {listed(map(shown, named))} and none is the default: "
                    f"{shown(first)} is used",
                    GemkitWarning,
                    stacklevel=5,
                )
                template = named[first]
            else:
                template = named.get("default")
        if isinstance(template, dict):
            template = template.get("default")
        if template is not None and not isinstance(template, str):
            raise GemkitError(f"{path}: its chat_template is {shown(template)}, not text; get the file again")
        if template:
            return template
    return None


def _text(path: Path) -> str:
    try:
        return decode(read_file(path))
    except UnicodeDecodeError:
        raise GemkitError(f"{path} is not UTF-8; get the file again") from None
