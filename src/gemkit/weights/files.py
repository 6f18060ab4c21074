"""One door for all model files: a path decides the format."""

from __future__ import annotations

import os
from pathlib import Path

from gemkit.errors import GemkitError
from gemkit.weights.checkpoint import Checkpoint


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a model by what its files are.

    A GGUF file or a folder with one; a Hugging Face folder (``config.json`` and safetensors); a Flax/Orbax folder, or
    the one around it; a ``.ckpt`` file of gemma_pytorch or a folder with one.
    Raises GemkitError if there is no such model or it is broken.
    """
    path = Path(path)
    if path.is_dir():
        from gemkit.weights.orbax import find_orbax
        from gemkit.weights.torch_ckpt import is_torch_checkpoint, read_torch

        others = any(path.glob("*.safetensors")) or any(path.glob("*.gguf"))
        if not others and find_orbax(path) is not None:
            from gemkit.weights.orbax import read_orbax

            return read_orbax(path)
        if not others and is_torch_checkpoint(path):
            return read_torch(path)
        if (path / "config.json").is_file():
            from gemkit.weights.hf import read_hf

            return read_hf(path)
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise GemkitError(
                f"{path} holds {len(files) or 'no'} GGUF files and no config.json: give the path of one model"
            )
        path = files[0]
    if path.name == "config.json" or path.name.endswith((".safetensors", ".safetensors.index.json")):
        from gemkit.weights.hf import read_hf

        return read_hf(path.parent)
    if path.suffix != ".gguf":
        from gemkit.weights.torch_ckpt import is_torch_checkpoint, read_torch

        if is_torch_checkpoint(path):
            return read_torch(path)
    from gemkit.weights.gguf import read_gguf

    return read_gguf(path)
