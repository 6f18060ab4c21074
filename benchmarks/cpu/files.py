"""The model files of a run, made once and kept in gemkit's cache: other types, other shapes, the peers' formats."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from engines import HERE, Engine

from gemkit.cache import cache_dir


class Files:
    """model: the GGUF file that all others are converted from. quick: the large shapes get two layers and few words."""

    def __init__(self, model: str, quick: bool = False) -> None:
        self.model, self.quick = model, quick

    @property
    def folder(self) -> Path:
        """Return the folder of files converted from the model, by its name and size."""
        path = Path(self.model)
        return cache_dir() / "bench" / f"{path.stem}-{path.stat().st_size}"

    def gguf(self, name: str) -> str:
        """The file of a session's model: "demo", "Q8_0", "2B Q4_0", …"""
        if name == "demo":
            return self.model
        if name.startswith("2B "):
            kind = name.split()[1].lower()
            path = cache_dir() / "bench" / f"gemma-2b-{kind}{'-quick' if self.quick else ''}.gguf"
            small = ["--layers", "2", "--vocabulary", "4096"] if self.quick else []
            return _made(path, [sys.executable, str(HERE / "shapes.py"), "gemma-2b", kind, "{}", *small])
        kind = name.lower()
        quantize = [sys.executable, "-m", "gemkit", "quantize", self.model, "{}", "--type", kind, "--no-measure"]
        return _made(self.folder / f"{kind}.gguf", quantize)

    def of(self, engine: Engine, name: str) -> str:
        """Return the file that an engine loads. Raises SystemExit with the reason if a conversion fails."""
        if engine.convert is None:
            return self.gguf(name)
        plain = _made(self.folder / "hf", [sys.executable, "-m", "gemkit", "convert", self.model, "{}", "--to", "hf"])
        if engine.convert == "hf":
            return plain
        convert = [engine.python, str(HERE.parent / "peers" / "convert.py"), engine.convert, plain, "{}"]
        return _made(self.folder / engine.convert, convert)


def _made(path: Path, command: list[str]) -> str:
    """Return the path of a file made by a command, in which {} is the path."""
    if not path.exists():
        print(f"  making {path}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first: what was interrupted is not taken for whole
        part = path.with_name(f"part-{os.getpid()}-{path.name}")
        command = [str(part) if word == "{}" else word for word in command]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
            raise SystemExit(f"bench: {path.name} cannot be made: {last}")
        part.rename(path)
    return str(path)
