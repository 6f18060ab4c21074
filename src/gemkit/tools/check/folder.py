"""Reads a Hugging Face folder for the rules, as much of it as there is."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path

from gemkit.arch.config import MODEL_TYPES
from gemkit.arch.hf_config import from_hf
from gemkit.errors import GemkitError, listed
from gemkit.text.encoding import decode
from gemkit.text.spm_proto import read_model
from gemkit.tools.check.finding import fault_of
from gemkit.tools.check.subject import HF, Subject, TensorView, Tokens
from gemkit.weights import git_lfs
from gemkit.weights.folder import ggufs_of, is_adapter_file, safetensors_of
from gemkit.weights.gguf.container import GGUFFile
from gemkit.weights.hf.safetensors import DTYPES, INDEX, SINGLE, SafetensorsFile
from gemkit.weights.hf.tensors import canonical
from gemkit.weights.json_file import parse_object, read_file
from gemkit.weights.quant import GGMLType

_FORMS = {"F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}
# A file of the folder or below it
_INSIDE = re.compile(r"[^/\\:][^\\:]*\.safetensors")
_MAX_FILES = 10_000
_MAX_HEADER = 100_000_000


def files_of(folder: Path) -> list[str]:
    """Return the regular files in a folder and three levels below, by relative name, without version control's."""
    found: list[str] = []
    for root, folders, names in os.walk(folder):
        near = len(Path(root).relative_to(folder).parts) < 3
        folders[:] = sorted(name for name in folders if near and name not in (".git", ".cache"))
        paths = (Path(root) / name for name in sorted(names))
        found += [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
        if len(found) > _MAX_FILES:
            break
    return found[:_MAX_FILES]


def pointers_of(folder: Path, files: list[str]) -> list[str]:
    """Return the files that are Git LFS pointers."""
    found = []
    for name in files:
        try:
            path = folder / name
            if path.stat().st_size < 1024 and path.read_bytes().startswith(git_lfs.HEAD):
                found.append(name)
        except OSError:
            continue
    return found


def name_of(folder: Path) -> str:
    """Return a folder's name; in Hugging Face's cache, where that is a checksum, the model's name."""
    folder = folder.resolve()
    return next((part for part in folder.parts if part.startswith("models--")), folder.name).replace("--", "/")


def read_json(subject: Subject, name: str) -> dict[str, object] | None:
    """Return a JSON object of the folder; None if there is no such file, or it is broken, which is written down."""
    if name not in subject.files:
        return None
    try:
        return parse_object(read_file(subject.folder / name))
    except (GemkitError, ValueError, RecursionError) as error:
        subject.broken.append((name, fault_of(subject.folder / name, error)))
    return None


def read(subject: Subject, config: Mapping[str, object] | None) -> None:
    """Fill in a subject from a folder. config: its ``config.json``, None if that is missing or broken."""
    subject.kind, subject.config_file = HF, "config.json"
    raw = config or {}
    text = raw.get("text_config")
    outer = {key: value for key, value in raw.items() if key != "text_config"}
    subject.raw = {**outer, **text} if isinstance(text, Mapping) else raw
    subject.outer, subject.inner = outer, text if isinstance(text, Mapping) else {}
    family = subject.raw.get("model_type")
    family = "gemma3_text" if family == "gemma3" else family
    subject.family = family if family in MODEL_TYPES else None
    fill_config(subject, raw)
    given = raw.get("_name_or_path")
    subject.name = f"{given if isinstance(given, str) else ''} {name_of(subject.folder)}".strip()
    _fill_weights(subject)
    fill_tokens(subject)
    _fill_ids(subject)


def _fill_ids(subject: Subject) -> None:
    """Fill in the ids that begin and end a text. generation_config.json, if it exists, alone decides where to stop."""
    name = "generation_config.json"
    generation = read_json(subject, name)
    for where, data in ((name, generation or {}), ("config.json", subject.raw)):
        if (value := data.get("bos_token_id")) is not None:
            subject.said_bos[f"{where}: bos_token_id"] = value
        if (value := data.get("pad_token_id")) is not None:
            subject.said_pad[f"{where}: pad_token_id"] = value
    if name in subject.files and generation is None:
        return  # it is broken, which is written down
    where, data = (name, generation) if generation is not None else ("config.json", subject.raw)
    value = data.get("eos_token_id")
    if value is not None:
        subject.said_eos[f"{where}: eos_token_id"] = value if isinstance(value, list) else [value]
    elif generation is not None:
        subject.said_eos[f"{where}: eos_token_id"] = []


def fill_config(subject: Subject, raw: Mapping[str, object]) -> None:
    """Fill in `config`, or `config_fault`."""
    try:
        subject.config = from_hf(raw)
    except GemkitError as error:
        subject.config_fault = str(error)
    except (TypeError, ValueError, OverflowError, AttributeError, KeyError, RecursionError) as error:
        subject.config_fault = f"config.json cannot be understood ({type(error).__name__}: {error})"


# --- tokenizer ----------------------------------------------------------------------------------------------------


def fill_tokens(subject: Subject) -> None:
    """Fill in the tokenizer, its settings and the chat template."""
    settings = read_json(subject, "tokenizer_config.json")
    subject.tokenizer_config = settings
    if "tokenizer.json" in subject.files and (data := read_json(subject, "tokenizer.json")) is not None:
        subject.tokens = _from_json(data)
        if subject.tokens is None:
            subject.broken.append(("tokenizer.json", "it has no model.vocab with ids"))
    if "tokenizer.model" in subject.files and (found := from_sentencepiece(subject, "tokenizer.model")) is not None:
        if subject.tokens is None:
            subject.tokens = found
        else:
            subject.neighbours.append(found)
    _fill_gguf_neighbour(subject)
    subject.where_bos = "tokenizer_config.json: add_bos_token"
    said = (settings or {}).get("add_bos_token")
    subject.add_bos = said if isinstance(said, bool) else None
    if subject.add_bos is None and subject.tokens is not None and subject.tokens.writes_bos is not None:
        subject.where_bos = "tokenizer.json: post_processor"
        subject.add_bos = subject.tokens.writes_bos > 0
    _fill_template(subject, settings or {})


def _fill_gguf_neighbour(subject: Subject) -> None:
    """Fill in the pieces of a GGUF file next to the safetensors."""
    from gemkit.tools.check.gguf import tokens_of

    names = ggufs_of(name for name in subject.files if "/" not in name)
    if len(names) == 1 and subject.tokens is not None:
        try:
            found = tokens_of(GGUFFile.open(subject.folder / names[0]).metadata, names[0])
        except GemkitError as error:
            subject.broken.append((names[0], fault_of(subject.folder / names[0], error)))
            return
        if found is not None:
            subject.neighbours.append(found)


def _fill_template(subject: Subject, settings: Mapping[str, object]) -> None:
    """Fill in the templates in the order in which transformers looks for them: the first is used."""
    found: dict[str, str] = {}
    if "chat_template.jinja" in subject.files:
        try:
            found["chat_template.jinja"] = decode(read_file(subject.folder / "chat_template.jinja"))
        except (GemkitError, UnicodeDecodeError) as error:
            subject.broken.append(("chat_template.jinja", f"it cannot be read ({error})"))
    data = read_json(subject, "chat_template.json")
    for where, source in (("chat_template.json", data or {}), ("tokenizer_config.json", settings)):
        value = source.get("chat_template")
        if isinstance(value, list):  # several by name
            rows = {str(row.get("name")): row.get("template") for row in value if isinstance(row, Mapping)}
            value = rows.get("default", next(iter(rows.values()), None))
        if isinstance(value, str) and value.strip():
            found[f"{where}: chat_template"] = value
    if found:
        subject.where_template, subject.template = next(iter(found.items()))
        subject.other_templates = dict(list(found.items())[1:])


def _from_json(data: Mapping[str, object]) -> Tokens | None:
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocab, Mapping) or not all(type(number) is int for number in vocab.values()):
        return None
    ids: dict[str, int] = dict(vocab)
    control, ordinary = set(), set()
    added = data.get("added_tokens")
    for row in added if isinstance(added, list) else []:
        if isinstance(row, Mapping) and isinstance(row.get("content"), str) and type(row.get("id")) is int:
            ids[row["content"]] = row["id"]
            (control if row.get("special") is True else ordinary).add(row["content"])
    size = max(ids.values(), default=-1) + 1
    return Tokens("tokenizer.json", ids, size, frozenset(control), frozenset(ordinary), _bos_of(data))


def _bos_of(data: Mapping[str, object]) -> int:
    """Count the <bos> tokens that the post-processor puts in front of one text."""

    def count(processor: object) -> int:
        if not isinstance(processor, Mapping):
            return 0
        parts = processor.get("single") if processor.get("type") == "TemplateProcessing" else None
        inner = processor.get("processors") if processor.get("type") == "Sequence" else None
        tokens = [p.get("SpecialToken") for p in parts if isinstance(p, Mapping)] if isinstance(parts, list) else []
        own = sum(isinstance(token, Mapping) and token.get("id") == "<bos>" for token in tokens)
        return own + sum(map(count, inner[:100])) if isinstance(inner, list) else own

    return count(data.get("post_processor"))


def from_sentencepiece(subject: Subject, name: str) -> Tokens | None:
    """Return the pieces of a ``tokenizer.model``; None if it is broken, which is written down."""
    try:
        vocabulary = read_model(read_file(subject.folder / name))
    except GemkitError as error:
        subject.broken.append((name, fault_of(subject.folder / name, error)))
        return None
    pieces = [piece.decode("utf-8", "replace") for piece in vocabulary.pieces]
    return Tokens(name, {piece: number for number, piece in enumerate(pieces)}, len(pieces))


# --- weights ----------------------------------------------------------------------------------------------------


def is_adapter(name: str) -> bool:
    """Return whether a file is part of a LoRA adapter."""
    name = Path(name).name
    return is_adapter_file(name) or name.startswith(("adapter_model.", "adapter_config."))


def _fill_weights(subject: Subject) -> None:
    """Fill in the tensors of the files that the loader would open, and the mismatches with an index."""
    here = [name for name in subject.files if name.endswith(".safetensors") and "/" not in name]
    promised: dict[str, str] = {}
    index = read_json(subject, INDEX)
    if index is not None and SINGLE not in here:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, Mapping):
            subject.broken.append((INDEX, "it has no weight_map"))
            weight_map = {}
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or not _INSIDE.fullmatch(name) or ".." in name.split("/"):
                subject.broken.append((f"{INDEX}: {tensor}", f"{name!r} is no name of a file next to it"))
            else:
                promised[tensor] = name
        chosen = sorted(set(promised.values()))
    else:
        chosen = [SINGLE] if SINGLE in here else safetensors_of(here)
    named = subject.raw.get("transformers_weights")
    if isinstance(named, str) and named in here:
        chosen, promised = [named], {}
    left = [name for name in safetensors_of(here) if name not in chosen]
    if left:
        subject.unlisted += [(name, f"it is not read: the model is in {listed(chosen, 2)}") for name in left]
    for name in chosen:
        if name not in subject.files:
            subject.absent_shards.append((INDEX, f"it names {name}, which is missing"))
            subject.tensors_known = False
        else:
            subject.tensors += _read_shard(subject, name)
    if promised and subject.tensors_known and not subject.broken and not subject.truncated:
        _compare_with_index(subject, promised)


def _compare_with_index(subject: Subject, promised: Mapping[str, str]) -> None:
    """Compare with an index. promised: the file of each tensor. Loaders accept a tensor in any of the files."""
    found = {view.name for view in subject.tensors}
    keys = {view.key for view in subject.tensors}
    for tensor, name in promised.items():
        if tensor not in found:
            key = canonical(tensor)
            needed = key in subject.manifest and key not in keys
            rows = subject.absent_shards if needed else subject.unlisted
            rows.append((f"{INDEX}: {tensor}", f"it should be in {name}, which lacks it"))
    extra = [view for view in subject.tensors if view.name not in promised]
    subject.unlisted += [(view.where, f"{INDEX} does not name it") for view in extra]


def _read_shard(subject: Subject, name: str) -> list[TensorView]:
    path = subject.folder / name
    try:
        file = SafetensorsFile(path)
    except GemkitError as error:
        rows, cut = _salvage(path)
        fault = fault_of(path, error)
        (subject.truncated if cut else subject.broken).append((name, cut or fault))
        subject.tensors_known = subject.tensors_known and bool(rows)
        return [TensorView(key, canonical(key), kind, shape, name, _FORMS.get(kind)) for key, kind, shape in rows]
    return [
        TensorView(key, canonical(key), entry.dtype, entry.shape, name, _FORMS.get(entry.dtype), file.data(key))
        for key, entry in file.tensors.items()
    ]


def _salvage(path: Path) -> tuple[list[tuple[str, str, tuple[int, ...]]], str]:
    """Return names, types and shapes of a broken file's tensors, and, if it is truncated, by how much."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return [], ""
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            size = os.fstat(file.fileno()).st_size
            if length > _MAX_HEADER:
                return [], ""
            if 8 + length > size:
                return [], f"its header alone has {length:,} bytes, the file {size:,}"
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError):
        return [], ""
    rows, end = [], 0
    for key, value in header.items() if isinstance(header, dict) else []:
        kind, shape, offsets = (
            (value.get(k) for k in ("dtype", "shape", "data_offsets")) if isinstance(value, dict) else (None,) * 3
        )
        if key == "__metadata__" or kind not in DTYPES or not _counts(shape) or not _counts(offsets):
            continue
        rows.append((key, kind, tuple(shape)))
        end = max(end, 8 + length + (offsets[1] if len(offsets) == 2 else 0))
    return rows, f"it has {size:,} bytes and its header promises {end:,}" if end > size else ""


def _counts(value: object) -> bool:
    whole = isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)
    return whole and math.prod(value) < 2**63 and len(value) < 8
