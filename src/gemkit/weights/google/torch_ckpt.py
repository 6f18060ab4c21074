"""Reader of Google's PyTorch checkpoints: ``.ckpt`` files of gemma_pytorch, and its folders with shards and an index.

    embedder                          weight [V, D]; with images text_token_embedder
    model.layers.i.self_attn.qkv_proj weight [(N + 2K) H, D]: queries, keys, values
    model.layers.i.self_attn.o_proj   weight [D, N*H]; query_norm and key_norm: Gemma 3
    model.layers.i.mlp                gate_proj, up_proj, down_proj as in Hugging Face
    model.layers.i, model.norm        norms as in Hugging Face
    freqs_cis, local_, global_        tables that follow from the configuration: not read

A file quantised to int8 has a `weight_scaler` [out] for each such `weight` [out, in]; the matrix is their product.
The types in the file decide. Float matrices are views of the mapped file, products are computed when read.
Source: gemma/model.py and gemma/gemma3_model.py of github.com/google/gemma_pytorch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gemkit.arch.config import ModelConfig
from gemkit.errors import GemkitError
from gemkit.weights.checkpoint import Checkpoint, Tensor, check
from gemkit.weights.google.official import Sizes, find_config, make_checkpoint
from gemkit.weights.google.torch_zip import TorchFile, TorchTensor
from gemkit.weights.hf.safetensors import TYPES, shown
from gemkit.weights.json_file import read_object
from gemkit.weights.mapped import plain
from gemkit.weights.quant import GGMLType, dequantise

INDEX = "pytorch_model.bin.index.json"

_STATE = "model_state_dict"
_TABLES = ("freqs_cis", "local_freqs_cis", "global_freqs_cis")
_IMAGES = ("siglip_vision_model.", "mm_soft_embedding_norm.", "mm_input_projection.")
_WEIGHT, _SCALER = ".weight", ".weight_scaler"


class Row(NamedTuple):
    """One module of the file and the canonical modules that its rows are, from top to bottom. `{}`: the layer."""

    torch: str
    canonical: tuple[str, ...]


_TOP = (Row("model.norm", ("model.norm",)),)
_EMBEDDINGS = ("embedder", "text_token_embedder")
_SAME = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
_NORMS = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_LAYER = (
    Row("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Row("self_attn.query_norm", ("self_attn.q_norm",)),
    Row("self_attn.key_norm", ("self_attn.k_norm",)),
    *(Row(name, (name,)) for name in (*_SAME, *_NORMS)),
)


def is_torch_checkpoint(path: Path) -> bool:
    """Return whether a file is named like one, or a folder holds exactly one such file, or an index of shards."""
    if path.is_dir():
        return (path / INDEX).is_file() or len(list(path.glob("*.ckpt"))) == 1
    return path.suffix in (".ckpt", ".pt", ".pth", ".bin") or path.name == INDEX


def read_torch(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a ``.ckpt`` file, a folder with one, or a folder with ``pytorch_model.bin.index.json`` and its shards.

    metadata: "quantised" if the file has int8 matrices; "ignored": the tensors that are not part of the text model.
    Raises GemkitError if a file is broken or has objects other than tensors, or if the tensors do not fit a model.
    """
    files = _Files(Path(path))
    try:
        return _checkpoint(files)
    except BaseException:
        files.close()
        raise


class _Files:
    """The files of a checkpoint. tensors: by name, of all files."""

    def __init__(self, path: Path) -> None:
        if path.name == INDEX:
            path = path.parent
        self.folder = path if path.is_dir() else path.parent
        paths = self._paths(path)
        self.path = path if len(paths) > 1 else paths[0]
        self.tensors: dict[str, TorchTensor] = {}
        self._file_of: dict[str, TorchFile] = {}
        self._open: list[TorchFile] = []
        try:
            for one in paths:
                file = TorchFile(one)
                self._open.append(file)
                for name, tensor in _state(file).items():
                    if name in self.tensors:
                        raise GemkitError(f"{one}: {shown(name)} is in another file too; get the files again")
                    self.tensors[name], self._file_of[name] = tensor, file
        except BaseException:
            self.close()
            raise

    def _paths(self, path: Path) -> list[Path]:
        if not path.is_dir():
            return [path]
        if (path / INDEX).is_file():
            shards = read_object(path / INDEX).get("weight_map")
            names = set(shards.values()) if isinstance(shards, dict) and _texts(shards.values()) else set()
            wrong = [n for n in names if not n.isprintable() or "/" in n or "\\" in n or ":" in n or n in ("", "..")]
            if not names or wrong:
                fault = f"names {shown(wrong[0])}, which is no file next to it" if wrong else "has no weight_map"
                raise GemkitError(f"{path / INDEX} {fault}; get the file again")
            return [path / name for name in sorted(names)]
        found = sorted(path.glob("*.ckpt"))
        if len(found) != 1:
            raise GemkitError(f"{path} holds {len(found) or 'no'} .ckpt files: give the path of one")
        return found

    def data(self, name: str) -> np.ndarray:
        """See `TorchFile.data`."""
        return self._file_of[name].data(self.tensors[name], name)

    def close(self) -> None:
        for file in self._open:
            file.close()


def _texts(values: object) -> bool:
    return all(isinstance(value, str) for value in values)


def _state(file: TorchFile) -> dict[str, TorchTensor]:
    """Return the state dictionary: below its key in a .ckpt, at the top in a shard."""
    found = file.value
    if isinstance(found, dict) and _STATE in found:
        found = found[_STATE]
    if not isinstance(found, dict) or not found:
        raise GemkitError(f"{file.path}: it holds no {_STATE}; give a checkpoint of gemma_pytorch")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, TorchTensor):
            label = shown(name) if isinstance(name, str) else "a number"
            raise GemkitError(f"{file.path}: {label} is no tensor with a name; give a checkpoint of gemma_pytorch")
    return found


# --- canonical tensors -----------------------------------------------------------------------------------------------


def _checkpoint(files: _Files) -> Checkpoint:
    wanted, ignored = {}, 0
    for name in files.tensors:
        if name.startswith(_IMAGES):
            ignored += 1
        elif name not in _TABLES:
            wanted[name] = files.tensors[name]
    if "model.embed_tokens.weight" in wanted:
        raise GemkitError(
            f"{files.path}: it has Hugging Face's names, in pickles, which can run programs: get safetensors"
        )
    config = find_config(files.folder, _sizes(files, wanted), files.path, {})
    labels: dict[str, str] = {}  # the file's name of each canonical tensor
    parts: dict[str, tuple[str, int, int]] = {}  # its module and rows in it
    for module, first, end, canonical in _parts(config, wanted):
        parts[canonical], labels[canonical] = (module, first, end), module + _WEIGHT
    _check(files, config, wanted, parts, labels)
    tensors = {key: _tensor(files, *part) for key, part in parts.items()}
    metadata: dict[str, object] = {}
    if any(name.endswith(_SCALER) for name in wanted):
        metadata["quantised"] = "int8 with one scale a row"
    if ignored:
        metadata["ignored"] = f"{ignored} tensors for images: images are not read"
    source = files.path if files.path.is_file() else None
    return make_checkpoint(
        files.path, files.folder, config, tensors, source=source, metadata=metadata, close=files.close
    )


def _sizes(files: _Files, tensors: Mapping[str, TorchTensor]) -> Sizes:
    """Read the sizes from the shapes."""

    def shape(module: str) -> tuple[int, ...]:
        found = tensors.get(module + _WEIGHT)
        if found is None or len(found.shape) != 2:
            fault = "is missing" if found is None else f"has the shape {list(found.shape)}, not two axes"
            raise GemkitError(f"{files.path}: {module}{_WEIGHT} {fault}; give a whole checkpoint of gemma_pytorch")
        return found.shape

    layers = {int(parts[2]) for name in tensors if _is_layer(parts := name.split("."))}
    rows, width = shape(_embedding(tensors))
    queries = shape("model.layers.0.self_attn.o_proj")[1]
    return Sizes(
        rows=rows,
        hidden_size=width,
        intermediate_size=shape("model.layers.0.mlp.gate_proj")[0],
        layers=max(layers) + 1,
        queries=queries,
        keys=(shape("model.layers.0.self_attn.qkv_proj")[0] - queries) // 2,
        qk_norm="model.layers.0.self_attn.query_norm.weight" in tensors,
        post_norms="model.layers.0.pre_feedforward_layernorm.weight" in tensors,
    )


def _is_layer(parts: list[str]) -> bool:
    return parts[:2] == ["model", "layers"] and len(parts) > 3 and parts[2].isascii() and parts[2].isdecimal()


def _embedding(tensors: Mapping[str, TorchTensor]) -> str:
    return next((module for module in _EMBEDDINGS if module + _WEIGHT in tensors), _EMBEDDINGS[0])


def _parts(config: ModelConfig, tensors: Mapping[str, TorchTensor]) -> Iterator[tuple[str, int, int, str]]:
    """Yield for each canonical tensor: module in the file, first row, row after the last (0: all), canonical name."""
    keys = config.num_key_value_heads * config.head_dim
    queries = config.num_attention_heads * config.head_dim
    blocks = [(f"model.layers.{i}.", row) for i in range(config.num_hidden_layers) for row in _LAYER]
    for prefix, row in [("", Row(_embedding(tensors), ("model.embed_tokens",))), *(("", row) for row in _TOP), *blocks]:
        module = prefix + row.torch
        if module + _WEIGHT not in tensors:
            continue
        at = 0
        for part in row.canonical:
            count = 0 if len(row.canonical) == 1 else queries if at == 0 else keys
            yield module, at, at + count, f"{prefix}{part}{_WEIGHT}"
            at += count


def _check(
    files: _Files,
    config: ModelConfig,
    tensors: Mapping[str, TorchTensor],
    parts: Mapping[str, tuple[str, int, int]],
    labels: Mapping[str, str],
) -> None:
    """Raise GemkitError that names each tensor that is missing, unknown, misshapen or of another type."""
    shapes: dict[str, tuple[int, ...]] = {}
    modules = {module for module, _, _ in parts.values()}
    for key, (module, first, end) in parts.items():
        shape = tensors[module + _WEIGHT].shape
        total = sum(last - begin for name, begin, last in parts.values() if name == module)
        split = end and shape and shape[0] == total  # else it shows its own shape below
        shapes[key] = (end - first, *shape[1:]) if split else shape
    known = {module + ending for module in modules for ending in (_WEIGHT, _SCALER)}
    for name in tensors:
        if name not in known:
            shapes[name] = tensors[name].shape

    check(config, shapes, files.path, lambda key: plain(labels.get(key, key)))
    for module in sorted(modules):
        _check_type(files, module, tensors[module + _WEIGHT], tensors.get(module + _SCALER))


def _check_type(files: _Files, module: str, weight: TorchTensor, scaler: TorchTensor | None) -> None:
    fault = None
    if weight.dtype == "I8":
        if scaler is None:
            fault = f"{module}{_WEIGHT} is int8 and has no {_SCALER[1:]} next to it; get the whole file"
        elif scaler.dtype not in TYPES or scaler.shape != weight.shape[:1] or len(weight.shape) != 2:
            fault = f"{module}{_SCALER} is {scaler.dtype} {list(scaler.shape)}, not a number a row; get the file again"
    elif weight.dtype not in TYPES:
        fault = f"{module}{_WEIGHT} is {weight.dtype}; gemkit reads {', '.join(TYPES)} and int8: save it in one of them"
    elif scaler is not None:
        fault = f"{module} has a {_SCALER[1:]}, but its weight is {weight.dtype}, not int8; get the file again"
    if fault:
        raise GemkitError(f"{files.path}: {fault}")


def _tensor(files: _Files, module: str, first: int, end: int) -> Tensor:
    name = module + _WEIGHT
    weight = files.tensors[name]
    bytes_ = files.data(name)
    rows = slice(first, end or None)
    if weight.dtype == "I8":
        scaler = files.data(module + _SCALER)[rows]
        kind = TYPES[files.tensors[module + _SCALER].dtype]
        return _product(bytes_[rows].reshape(bytes_[rows].shape[:2]).view(np.int8), scaler, kind)
    part = bytes_[rows]
    if weight.contiguous:
        return Tensor(TYPES[weight.dtype], part.shape[:-1], part.reshape(-1))
    return Tensor(TYPES[weight.dtype], part.shape[:-1], lambda: np.ascontiguousarray(part).reshape(-1))


def _product(whole: np.ndarray, scales: np.ndarray, kind: GGMLType) -> Tensor:
    """Return an int8 matrix times a number a row, float32, made at each use."""
    factors = dequantise(kind, np.ascontiguousarray(scales).reshape(-1), (len(whole),))[:, None]
    return Tensor(GGMLType.F32, whole.shape, lambda: (whole * factors).reshape(-1).view(np.uint8))
