"""Model folders in the layout of Hugging Face: ``config.json``, safetensors, a tokenizer. See `read_hf`.

Read are ``config.json``; the stop ids of ``generation_config.json`` and ``tokenizer_config.json``;
``model.safetensors`` or the shards of its index; ``tokenizer.model`` with the tokens that ``tokenizer_config.json``
adds, or else ``tokenizer.json``; the chat template.
Multimodal Gemma 3 is read as its text model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.errors import GemkitError
from gemkit.text.encoding import decode
from gemkit.text.vocabulary import PieceType, Vocabulary
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.hf_stop import stop_ids
from gemkit.weights.hf_tensors import read_tensors, refuse_quantised
from gemkit.weights.json_file import read_file, read_object
from gemkit.weights.safetensors import open_weights, shown
from gemkit.weights.tuned import instruction_tuned


def read_hf(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a folder with a Gemma 1, 2 or 3 model. Tensors are views of the mapped files, the vocabulary is read later.

    metadata: "dtype" of ``config.json``, and in "ignored" which parts for images were not read.
    Raises GemkitError if files are missing or broken, or do not hold exactly the model's tensors.
    """
    folder = Path(path)
    facts = read_object(folder / "config.json")
    config = _config(folder, facts)
    tokenizer = _tokenizer_file(folder)
    template = _chat_template(folder)
    named = facts.get("transformers_weights")
    files = open_weights(folder, named if isinstance(named, str) else None)
    try:
        config, tensors, ignored = read_tensors(folder, config, facts, files)
        metadata: dict[str, object] = {key: value for key, value in files.metadata.items() if key == "format"}
        if isinstance(dtype := facts.get("dtype") or facts.get("torch_dtype"), str):
            metadata["dtype"] = dtype
        if ignored:
            metadata["ignored"] = ignored
        name = _name(folder)
        return Checkpoint(
            config,
            tensors,
            vocabulary=tokenizer and (lambda: _vocabulary(tokenizer, config)),
            vocabulary_key=tokenizer and (lambda: _vocabulary_key(tokenizer)),
            chat_template=template,
            name=name,
            instruction_tuned=instruction_tuned(None, template, name),
            source=folder,
            metadata=metadata,
            close=files.close,
        )
    except BaseException:
        files.close()
        raise


# --- configuration ---------------------------------------------------------------------------------------------------


def _config(folder: Path, facts: dict[str, object]) -> ModelConfig:
    """``config.json``, with the stop ids of the other files besides its own."""
    path = folder / "config.json"
    refuse_quantised(path, facts)
    try:
        config = ModelConfig.from_hf(facts)
    except GemkitError as error:
        raise GemkitError(f"{path}: {error}") from None
    ids = dict.fromkeys([*config.stop_token_ids, *stop_ids(folder, config.vocab_size)])
    return dataclasses.replace(config, stop_token_ids=tuple(ids))


def _name(folder: Path) -> str:
    """For people. The hubs' caches keep a model below its name, in a folder named by its commit or version."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return "/".join(folder.parents[1].name.split("--", 2)[1:])
    return folder.parent.name if folder.name.isdigit() else folder.name


def _chat_template(folder: Path) -> str | None:
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


# --- vocabulary ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _TokenizerFile:
    """The tokenizer's file, its reader, and the tokens added to it: id, text, whether it is a control token."""

    path: Path
    read: Callable[[bytes], Vocabulary]
    added: tuple[tuple[int, str, bool], ...]


def _tokenizer_file(folder: Path) -> _TokenizerFile | None:
    path = folder / "tokenizer.model"
    if os.path.lexists(path):
        from gemkit.text.spm_proto import read_model

        return _TokenizerFile(path, read_model, _added(folder / "tokenizer_config.json"))
    path = folder / "tokenizer.json"
    if os.path.lexists(path):
        from gemkit.text.tokenizer_json import read_tokenizer_json

        return _TokenizerFile(path, read_tokenizer_json, ())  # has its added tokens
    return None


def _added(path: Path) -> tuple[tuple[int, str, bool], ...]:
    """The added tokens by id; those that ``tokenizer.model`` has are among them."""
    if not os.path.lexists(path):
        return ()
    rows = read_object(path).get("added_tokens_decoder") or {}
    try:
        found = [(int(number), row["content"], bool(row["special"])) for number, row in rows.items()]
        if any(type(content) is not str or not content for _, content, _ in found):
            raise ValueError("no text")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise GemkitError(f"{path}: its added_tokens_decoder is broken; get the file again") from None
    return tuple(sorted(found))


def _vocabulary(file: _TokenizerFile, config: ModelConfig) -> Vocabulary:
    """The pieces. A model may have more rows than these: the last ones then stand for nothing."""
    try:
        vocabulary = file.read(read_file(file.path))
    except GemkitError as error:
        raise error if str(error).startswith(str(file.path)) else GemkitError(f"{file.path}: {error}") from None
    pieces, scores, types = list(vocabulary.pieces), list(vocabulary.scores), list(vocabulary.types)
    for number, content, special in file.added:
        if number < len(pieces):
            continue
        if number > len(pieces):
            raise GemkitError(
                f"{file.path.with_name('tokenizer_config.json')}: it adds the token {number} to a vocabulary of "
                f"{len(pieces)} and none between; get the file again"
            )
        pieces.append(content.encode("utf-8", "surrogatepass"))
        scores.append(np.float32(0))
        types.append(PieceType.CONTROL if special else PieceType.USER_DEFINED)
    # <image_soft_token> has no row in Gemma 3's text models; text never makes a control token
    if beyond := [i for i in range(config.vocab_size, len(pieces)) if types[i] != PieceType.CONTROL]:
        raise GemkitError(
            f"{file.path}: piece {beyond[0]} {shown(pieces[beyond[0]])} has no row in an embedding of "
            f"{config.vocab_size}: get the tokenizer of this model"
        )
    return Vocabulary(pieces, np.array(scores, np.float32), np.array(types, np.int32))


def _vocabulary_key(file: _TokenizerFile) -> str:
    digest = hashlib.sha256(read_file(file.path))
    if file.added:
        digest.update(json.dumps(file.added).encode())
    return digest.hexdigest()
