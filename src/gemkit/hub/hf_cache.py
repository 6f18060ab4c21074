"""Hugging Face's cache of models on disk: find, list and delete. No network.

`models--org--name` holds `blobs`, files under their checksum; `snapshots/COMMIT`, a folder of links to them; and
`refs`, which commit a branch or tag is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from gemkit.errors import GemkitError
from gemkit.hub.names import HfName, official, select
from gemkit.weights.folder import CONFIG, INDEX, SINGLE, TOKENIZERS


def cache_folder() -> Path:
    """Return Hugging Face's cache of models, by its own variables: HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if text := os.environ.get(variable):
            return _expanded(text)
    if text := os.environ.get("HF_HOME"):
        return _expanded(text) / "hub"
    return _expanded(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")) / "huggingface" / "hub"


def find(name: HfName) -> Path | None:
    """Return a complete model in the cache: its folder or its GGUF file; None if there is none. No network.

    Without a revision a complete older copy is returned in place of a partial one.
    """
    folder = repo_folder(name.repo)
    commit = _commit(folder, name.revision)
    if commit and (path := whole(folder / "snapshots" / commit, name)):
        return path
    if name.revision is not None:
        return None
    for snapshot in sorted(snapshots(folder), key=_modified, reverse=True):
        if path := whole(snapshot, name):
            return path
    return None


def whole(folder: Path, name: HfName) -> Path | None:
    """Return the model in a snapshot folder if it is complete."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        chosen = select(files, name.selector, str(name))
    except GemkitError:
        return None
    if all(file.lower().endswith(".gguf") for file in chosen):
        return folder / chosen[0]
    return folder if chosen == official(files) or is_whole(folder) else None


def is_whole(folder: Path) -> bool:
    """Return whether a folder is a complete Hugging Face model: configuration, tokenizer and all of its weights."""
    if not (folder / CONFIG).is_file():
        return False
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return False
    if (folder / SINGLE).is_file():
        return True
    try:
        shards = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        return bool(shards) and all((folder / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def repo_folders() -> Iterator[tuple[str, Path]]:
    """Yield the models in the cache, whole or not: name and folder."""
    for folder in sorted(cache_folder().glob("models--*--*")):
        if folder.is_dir():
            yield "/".join(folder.name.split("--", 2)[1:]), folder


def snapshots(folder: Path) -> list[Path]:
    """Return the snapshot folders of a repository's folder."""
    return [path for path in sorted(folder.glob("snapshots/*")) if path.is_dir()]


def revisions(folder: Path) -> dict[str, str]:
    """Return branches and tags by commit; `main` takes precedence."""
    found: dict[str, str] = {}
    for path in sorted((folder / "refs").rglob("*")):
        if path.is_file() and path.suffix != ".tmp":
            name = path.relative_to(folder / "refs").as_posix()
            with contextlib.suppress(OSError, UnicodeDecodeError):
                commit = path.read_text("utf-8").strip()
                if name == "main" or commit not in found:
                    found[commit] = name
    return found


def remove(folder: Path, commit: str | None) -> None:
    """Remove one commit of a repository, or all of it; what other commits share stays."""
    others = [path for path in snapshots(folder) if path.name != commit]
    if commit is not None and others:
        from huggingface_hub import scan_cache_dir

        scan_cache_dir(folder.parent).delete_revisions(commit).execute()
        return
    shutil.rmtree(folder)
    shutil.rmtree(folder.parent / ".locks" / folder.name, ignore_errors=True)


def remove_file(path: Path, folder: Path) -> None:
    """Remove one file of a snapshot, and its blob if no other snapshot has it."""
    blob = path.resolve()
    path.unlink()
    with contextlib.suppress(OSError):
        path.parent.rmdir()
    if blob.parent == (folder / "blobs").resolve():
        users = (file for snapshot in snapshots(folder) for file in snapshot.rglob("*"))
        if not any(file.resolve() == blob for file in users):
            blob.unlink(missing_ok=True)
    if not any(file.is_file() for snapshot in snapshots(folder) for file in snapshot.rglob("*")):
        remove(folder, None)


def has_snapshot(repo: str, revision: str) -> bool:
    """Return whether any of a revision's files are in the cache."""
    folder = repo_folder(repo)
    commit = _commit(folder, revision)
    return commit is not None and (folder / "snapshots" / commit).is_dir()


def repo_of(path: Path) -> str | None:
    """Return the repository that a file of the cache belongs to; None for a path elsewhere."""
    try:
        folder = path.absolute().relative_to(cache_folder()).parts[0]
    except (ValueError, IndexError):
        return None
    return "/".join(folder.split("--", 2)[1:]) if folder.startswith("models--") else None


def repo_folder(repo: str) -> Path:
    """Return the folder of a model in the cache, which may not exist."""
    return cache_folder() / ("models--" + repo.replace("/", "--"))


def _commit(folder: Path, revision: str | None) -> str | None:
    """Return the commit that a revision means in the cache; a commit's first 7 letters do."""
    try:
        return (folder / "refs" / (revision or "main")).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        pass
    if revision is None or not re.fullmatch(r"[0-9a-f]{7,40}", revision):
        return None
    found = [path.name for path in snapshots(folder) if path.name.startswith(revision)]
    return found[0] if len(found) == 1 else None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _expanded(text: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(text))).absolute()
