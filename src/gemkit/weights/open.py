"""One door for all model files: a path decides the format. Which file of a folder is meant: `gemkit.weights.folder`."""

from __future__ import annotations

import os
from pathlib import Path

from gemkit.errors import GemkitError, listed
from gemkit.weights import folder
from gemkit.weights.checkpoint import Checkpoint


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a model, its format detected from its files.

    A GGUF file or a folder with one; a Hugging Face folder (``config.json`` and safetensors); a Flax/Orbax folder, or
    the one around it; a ``.ckpt`` file of gemma_pytorch or a folder with one.
    Raises GemkitError if there is no such model or it is broken.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if is_renamed_gguf(path):
        return _open_gguf(path)
    if path.name == folder.CONFIG or path.name.endswith((".safetensors", ".safetensors.index.json")):
        if folder.is_adapter_file(path.name):
            raise GemkitError(f"{path} is an adapter, not a model: give the model's path, and this as --adapter-path")
        return _open_hf(path.parent)
    from gemkit.weights.git_lfs import refuse_pointer

    refuse_pointer(path)
    if path.suffix != ".gguf":
        from gemkit.weights.google.torch_ckpt import is_torch_checkpoint, read_torch

        if is_torch_checkpoint(path):
            return read_torch(path)
    return _open_gguf(path)


def is_renamed_gguf(path: Path) -> bool:
    """Return whether a file without the suffix of GGUF begins as one: others rename them, to .bin for example."""
    try:
        if path.suffix == ".gguf" or not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _open_folder(path: Path) -> Checkpoint:
    try:
        names = folder.top_level(path)
    except OSError as error:
        raise GemkitError(f"{path} cannot be read ({error.strerror or error}): check the path") from None
    if folder.is_hugging_face(names):
        return _open_hf(path)
    if ggufs := folder.ggufs_of(names):
        return _open_gguf(path / one_gguf(path, ggufs))
    if not folder.safetensors_of(names):
        from gemkit.weights.google.orbax import find_orbax
        from gemkit.weights.google.torch_ckpt import is_torch_checkpoint, read_torch

        if find_orbax(path) is not None:
            from gemkit.weights.google.orbax import read_orbax

            return read_orbax(path)
        if is_torch_checkpoint(path) and not _is_pickled_hugging_face(path, names):
            return read_torch(path)
    if folder.CONFIG in names:
        return _open_hf(path)  # names the missing file
    raise GemkitError(f"{path} {_no_model(path, names)}")


def one_gguf(path: Path, ggufs: list[str]) -> str:
    """Return the name of the only model among the GGUF files of a folder, or its first part.

    Raises GemkitError that lists the models if there are several.
    """
    if len(ggufs) == 1 or folder.are_parts(ggufs):
        return ggufs[0]
    models = sorted({folder.unsplit(name): name for name in reversed(ggufs)}.values())
    raise GemkitError(f"{path} holds {len(models)} GGUF models: give the path of one of {listed(models, 8)}")


def _no_model(path: Path, names: list[str]) -> str:
    if folder.ADAPTER_CONFIG in names or any(map(folder.is_adapter_file, names)):
        return f"holds an adapter{_base_of(path)}, not a model: give the model's path, and this one as --adapter-path"
    if found := folder.safetensors_of(names):
        return f"has {listed(found)} and no {folder.CONFIG}: get that file too"
    if found := [name for name in names if name.lower().endswith(".gguf")]:
        return f"holds no model, only {listed(found)}: give the path of a model"
    if found := folder.pickles_of(names):
        return f"has {listed(found)} and no {folder.CONFIG}: give the path of one model"
    if inner := sorted(child.parent.name for child in path.glob("*/" + folder.CONFIG)):
        return f"holds no model itself, but there are some in it: give one, such as {listed(inner)}"
    return f"holds no GGUF files and no {folder.CONFIG}: give the path of one model"


def _base_of(path: Path) -> str:
    """Return the model that an adapter was trained on, for a message."""
    from gemkit.weights.hf.safetensors import shown
    from gemkit.weights.json_file import read_object

    try:
        raw_config = read_object(path / folder.ADAPTER_CONFIG)
    except GemkitError:
        return ""
    base = raw_config.get("base_model_name_or_path") or raw_config.get("model")
    return f" of {shown(base)}" if isinstance(base, str) else ""


def _is_pickled_hugging_face(path: Path, names: list[str]) -> bool:
    """Return whether ``pytorch_model.bin.index.json`` is transformers' and not gemma_pytorch's of the same name."""
    if folder.CONFIG not in names or folder.PICKLE_INDEX not in names:
        return False
    from gemkit.weights.json_file import read_object

    shards = read_object(path / folder.PICKLE_INDEX).get("weight_map")
    return isinstance(shards, dict) and any("q_proj.weight" in name for name in shards)


def _open_hf(path: Path) -> Checkpoint:
    from gemkit.weights.hf.read import read_hf

    return read_hf(path)


def _open_gguf(path: Path) -> Checkpoint:
    from gemkit.weights.gguf.read import read_gguf

    return read_gguf(path)
