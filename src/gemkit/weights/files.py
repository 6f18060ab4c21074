"""One door for all model files: a path decides the format."""

from __future__ import annotations

import os
from pathlib import Path

from gemkit.errors import GemkitError
from gemkit.weights.checkpoint import Checkpoint


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a GGUF file, a folder with one, or a Hugging Face folder (``config.json`` and safetensors).

    Raises GemkitError if there is no such model or it is broken.
    """
    path = Path(path)
    if path.is_dir():
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
    from gemkit.weights.gguf import read_gguf

    return read_gguf(path)
