"""Partial downloads of the hubs, which the next download of the same file continues."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from gemkit.cache import Copy, size_and_use
from gemkit.hub import hf_cache, kaggle
from gemkit.hub.item import is_locked

_BUSY_SECONDS = 60


def downloads() -> list[Copy]:
    """Return the partial files of Gemma models in the caches of Hugging Face and Kaggle.

    They can be resumed, so they are removed only on request.
    """
    found = []
    for repo, folder in hf_cache.repo_folders():
        if "gemma" in repo.lower():
            found += [(f"hf:{repo}", path) for path in folder.glob("blobs/*.incomplete")]
    for handle, folder in kaggle.variations():
        if "gemma" in handle.lower():
            found += [(f"kaggle:{handle}", path) for path in folder.rglob(".*.incomplete")]
    return [
        Copy("partial download", [path], *size_and_use(path), [name], busy=partial(_is_written, path))
        for name, path in sorted(found)
    ]


def _is_written(path: Path) -> bool:
    """Return whether a process writes this file; other programs' locks are not visible, so a recent file counts."""
    try:
        return time.time() - path.stat().st_mtime < _BUSY_SECONDS or is_locked(path)
    except OSError:
        return False
