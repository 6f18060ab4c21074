"""Writer of a `Checkpoint` as a model folder in Hugging Face's layout, which transformers, vLLM and gemkit read.

Written are ``config.json``, ``generation_config.json`` with all stop ids, safetensors (sharded above a size, with an
index), the tokenizer as ``tokenizer.json`` and ``tokenizer.model``, the chat template, and the NOTICE that Gemma's
terms require when weights are redistributed. The tokenizer's files of a folder are copied as they are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from gemkit.arch.hf_config import to_hf
from gemkit.arch.tensors import manifest
from gemkit.errors import GemkitError
from gemkit.weights import tuned
from gemkit.weights.checkpoint import Checkpoint, Tensor
from gemkit.weights.hf.arrays import header
from gemkit.weights.hf.read import read_chat_template, read_hf
from gemkit.weights.hf.safetensors import INDEX, SINGLE
from gemkit.weights.quant import GGMLType, quantise
from gemkit.weights.staged import Check, check_readable, staged_model

NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
    "The weights in this folder were converted to another file format with gemkit.\n"
)
_DTYPES = {GGMLType.F32: "F32", GGMLType.F16: "F16", GGMLType.BF16: "BF16"}
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COPIED = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_BLOCK = 1 << 22


def write_hf(
    folder: str | os.PathLike[str],
    checkpoint: Checkpoint,
    *,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] = lambda done, total: None,
    check: Check | None = None,
) -> Path:
    """Write the folder under a temporary name, read it back and rename it: there is a good folder or none.

    Tensors keep their float types; quantised ones become float32, without loss. Norms are written as w in the type that
    most of the matrices have, if that loses nothing, else in float32.
    progress: called with the bytes written so far and in all.
    check: called with the temporary path before the folder gets its name; whatever it raises leaves no folder.
    Raises GemkitError if the folder exists or cannot be written or read, or if Hugging Face's classes cannot state the
    model.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise GemkitError(f"{folder} exists: give another name, or delete it first")
    with staged_model(folder) as temporary:
        temporary.mkdir(parents=True)
        _write_weights(temporary, checkpoint, shard_bytes, progress)
        _write_texts(temporary, checkpoint)
        check_readable(temporary, folder, read_hf, checkpoint, check)
    return folder


# --- weights ---------------------------------------------------------------------------------------------------------


def _write_weights(
    folder: Path, checkpoint: Checkpoint, shard_bytes: int, progress: Callable[[int, int], None]
) -> None:
    kind = _main_type(checkpoint.tensors)
    plan = {name: _type_of(checkpoint.tensors[name], kind) for name in manifest(checkpoint.config)}
    sizes = {name: _size(checkpoint.tensors[name].shape, dtype) for name, dtype in plan.items()}
    shards: list[list[str]] = [[]]
    for name in plan:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    done, total, where = 0, sum(sizes.values()), {}
    for number, shard in enumerate(shards, 1):
        file_name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with open(folder / file_name, "xb") as file:
            entries = {name: (_DTYPES[plan[name]], checkpoint.tensors[name].shape, sizes[name]) for name in shard}
            file.write(header(entries, {"format": "pt"}))
            for name in shard:
                data = _bytes(checkpoint.tensors[name], plan[name])
                assert data.nbytes == sizes[name]
                for at in range(0, data.nbytes, _BLOCK):
                    done += file.write(data[at : at + _BLOCK])
                    progress(done, total)
                where[name] = file_name
    if len(shards) > 1:
        _json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _main_type(tensors: Mapping[str, Tensor]) -> GGMLType:
    """Return the float type of most parameters, float32 where they are quantised."""
    counts: dict[GGMLType, int] = {}
    for tensor in tensors.values():
        kind = tensor.type if tensor.type in _DTYPES else GGMLType.F32
        counts[kind] = counts.get(kind, 0) + int(np.prod(tensor.shape))
    return max(counts, key=counts.__getitem__)


def _type_of(tensor: Tensor, kind: GGMLType) -> GGMLType:
    """Return the type to write a tensor in."""
    if len(tensor.shape) > 1:
        return tensor.type if tensor.type in _DTYPES else GGMLType.F32
    if kind == GGMLType.F32 or (tensor.type == kind and not tensor.add_one):
        return kind
    values = tensor.to_float32()
    back = Tensor(kind, tensor.shape, quantise(kind, values[None]).reshape(-1)).to_float32()
    return kind if np.array_equal(back, values) else GGMLType.F32


def _bytes(tensor: Tensor, kind: GGMLType) -> np.ndarray:
    """Return a tensor's values in a type, uint8, flat."""
    if tensor.type == kind and not tensor.add_one:
        return np.asarray(tensor.data).reshape(-1)
    values = tensor.to_float32()
    if kind == GGMLType.F32:
        return np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8)
    return quantise(kind, values.reshape(-1, values.shape[-1])).reshape(-1)


def _size(shape: Iterable[int], kind: GGMLType) -> int:
    return int(np.prod(tuple(shape))) * (4 if kind == GGMLType.F32 else 2)


# --- everything else -------------------------------------------------------------------------------------------------


def _write_texts(folder: Path, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    raw_config = to_hf(config)
    if tuned.needs_mark(checkpoint):
        raw_config[tuned.CONFIG_KEY] = False
    raw_config["dtype"] = _NAMES[_DTYPES[_main_type(checkpoint.tensors)]]
    _json(folder / "config.json", raw_config)
    _json(
        folder / "generation_config.json",
        {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(config.stop_token_ids),
            "pad_token_id": 0,
            "do_sample": True,
            "top_k": 64,
            "top_p": 0.95,
        },
    )
    (folder / "NOTICE").write_text(NOTICE, encoding="utf-8", newline="\n")
    source = checkpoint.source if checkpoint.source is not None and checkpoint.source.is_dir() else None
    copied = [name for name in _COPIED if source is not None and (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, folder / name)
    has_tokenizer = not {"tokenizer.model", "tokenizer.json"}.isdisjoint(copied)
    if not has_tokenizer and checkpoint.vocabulary is not None:
        _write_tokenizer(folder, checkpoint)
    template = tuned.template_to_write(checkpoint)
    if template and not (has_tokenizer and read_chat_template(folder)):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")


def _write_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    from gemkit.text.spm_proto import write_model
    from gemkit.text.tokenizer_json import write_tokenizer_json

    vocabulary, config = checkpoint.vocabulary, checkpoint.config
    (folder / "tokenizer.model").write_bytes(write_model(vocabulary))
    (folder / "tokenizer.json").write_bytes(write_tokenizer_json(vocabulary, config.bos_token_id))
    pieces = vocabulary.pieces
    stops = [token for token in config.stop_token_ids if token < len(pieces)] or [1]
    stop = tuned.end_in_template(checkpoint)
    if stop is None:
        stop = stops[-1] if checkpoint.instruction_tuned else stops[0]
    settings: dict[str, object] = {
        "tokenizer_class": "GemmaTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": pieces[config.bos_token_id].decode(),
        "eos_token": pieces[stop].decode(),
        "pad_token": pieces[0].decode(),
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        "padding_side": "left",
    }
    if template := tuned.template_to_write(checkpoint):
        settings["chat_template"] = template
    _json(folder / "tokenizer_config.json", settings)


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
