"""Downloaded models: those in the hubs' caches and the demo model, complete or partial. No network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemkit.arch.config import STOP_TOKEN_IDS
from gemkit.cache import cache_dir
from gemkit.errors import GemkitError
from gemkit.hub import hf_cache, kaggle
from gemkit.hub.names import HfName, KaggleName, official, quantisation
from gemkit.weights.folder import part_paths, unsplit

_TYPES = {*STOP_TOKEN_IDS, "gemma3"}  # gemma3: the multimodal wrapper, whose text model gemkit reads


@dataclass(frozen=True)
class Entry:
    """One model. name: what `resolve` takes. path: its folder or GGUF file. ready: it is complete.

    format: file format and element type. size: bytes on disk. modified: seconds since 1970. The rest is its
    source: repo, revision (the hub's name) and commit on Hugging Face; handle and version on Kaggle.
    """

    name: str
    path: Path
    ready: bool
    format: str
    size: int
    modified: float
    repo: str | None = None
    revision: str | None = None
    commit: str | None = None
    handle: str | None = None
    version: int | None = None

    def remove(self) -> None:
        """Delete its files; raises OSError."""
        if self.repo is not None:
            folder = hf_cache.repo_folder(self.repo)
            if self.path.is_file():
                for path in filter(Path.is_file, part_paths(self.path)):
                    hf_cache.remove_file(path, folder)
            elif folder.is_dir():
                hf_cache.remove(folder, self.commit)
        elif self.handle is not None:
            kaggle.remove(self.path if self.path.is_dir() else self.path.parent)
        else:
            for path in self.path.parent.iterdir():
                path.unlink()
            self.path.parent.rmdir()


def installed() -> list[Entry]:
    """Return the models that are downloaded, by name; interrupted downloads have `ready` False."""
    return sorted([*_demo(), *_hugging_face(), *_kaggle()], key=lambda entry: entry.name)


def _demo() -> Iterator[Entry]:
    from gemkit.hub.demo import SIZE

    for path in (cache_dir() / "demo").glob("*.gguf"):
        status = path.stat()
        yield Entry("demo", path, status.st_size == SIZE, _gguf_format(path), status.st_size, status.st_mtime)


def _hugging_face() -> Iterator[Entry]:
    for repo, folder in hf_cache.repo_folders():
        names, found = hf_cache.revisions(folder), False
        for snapshot in hf_cache.snapshots(folder):
            reference = names.get(snapshot.name)
            revision = None if reference == "main" else reference or snapshot.name[:12]
            origin = {"repo": repo, "revision": reference, "commit": snapshot.name}
            for path, ready, format in _models(snapshot):
                found = True
                selector = path.relative_to(snapshot).as_posix() if path != snapshot else None
                name = str(HfName(repo, revision, selector))
                yield Entry(name, path, ready, format, *_size(path), **origin)
        if not found and "gemma" in repo.lower() and any(folder.glob("blobs/*")):
            yield Entry(str(HfName(repo)), folder, False, "", *_size(folder / "blobs"), repo=repo)


def _kaggle() -> Iterator[Entry]:
    for handle, variation in kaggle.variations():
        for version, folder in kaggle.versions_of(variation):
            name = str(KaggleName(handle, version))
            models = list(_models(folder))
            if not models and "gemma" in handle and any(folder.glob("*")):
                models = [(folder, False, "")]
            for path, _, format in models:
                ready = kaggle.whole(folder) == path
                yield Entry(name, path, ready, format, *_size(path), handle=handle, version=version)


def _models(folder: Path) -> Iterator[tuple[Path, bool, str]]:
    """Yield the Gemma models in a folder: path, whether it is whole, format."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        config = None
    if isinstance(config, dict) and config.get("model_type") in _TYPES:
        weights = any(folder.glob("*.safetensors"))
        text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
        dtype = next((d[k] for d in (config, text) for k in ("dtype", "torch_dtype") if isinstance(d.get(k), str)), "")
        if weights or not any(folder.rglob("*.gguf")):
            yield folder, hf_cache.is_whole(folder), f"safetensors {dtype}".strip()
    elif found := official(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()):
        yield folder, True, "torch" if any(name.endswith(".ckpt") for name in found) else "flax"
    for path in sorted(folder.rglob("*.gguf")):
        parts = part_paths(path)
        if path == parts[0] and path.is_file() and _is_gemma(path):
            yield path, all(part.is_file() for part in parts), _gguf_format(path)


def _is_gemma(path: Path) -> bool:
    from gemkit.weights.gguf.container import GGUFFile
    from gemkit.weights.gguf.read import ARCHITECTURES

    try:
        with GGUFFile.open(path, part=True) as file:
            return file.metadata.get("general.architecture") in ARCHITECTURES
    except GemkitError:
        return False


def _gguf_format(path: Path) -> str:
    return f"gguf {quantisation(unsplit(path.name)) or ''}".strip()


def _size(path: Path) -> tuple[int, float]:
    """Return bytes on disk, and when they last changed."""
    files = [file for file in (part_paths(path) if path.is_file() else path.rglob("*")) if file.is_file()]
    stats = [file.stat() for file in files]
    return sum(stat.st_size for stat in stats), max((stat.st_mtime for stat in stats), default=0.0)
