"""Copies that gemkit keeps and can make again: packed weights, tokenizers. List, remove, hold to a limit.

``cache_dir()/packed`` has images of packed weights (``*.packed``) and a JSON record for each model that names its image
and tells, by size and time of the model's files, whether it still belongs to them. Several records may name one image.
A record's time of modification is that of its last use. ``cache_dir()/tokenizers`` has tokenizers by the checksum of
their vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from gemkit.cache import cache_dir
from gemkit.errors import UsageError

LIMIT = 20 * 10**9  # bytes of all copies, where GEMKIT_CACHE_SIZE does not say
_FRESH_SECONDS = 3600  # a file without a record may be one that another process is about to name
_BUSY_SECONDS = 60
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SECONDS = {"S": 1, "M": 60, "H": 3600, "D": 86400, "W": 7 * 86400}

PACKED, TOKENIZER, DOWNLOAD = "packed weights", "tokenizer", "partial download"


@dataclass
class Copy:
    """One copy, which may be removed alone.

    kind: one of the constants above. files: what is deleted with it. size: in bytes. used: seconds since 1970.
    sources: the models that it is of, as far as they are known. state: "there", "changed" or "gone", of the source;
    "unknown" if it has none. busy: says whether a process writes it just now.
    """

    kind: str
    files: list[Path]
    size: int
    used: float
    sources: list[str] = field(default_factory=list)
    state: str = "unknown"
    busy: Callable[[], bool] = lambda: False

    @property
    def is_dead(self) -> bool:
        """Whether nothing can use it any more."""
        return self.state in ("gone", "changed")

    def remove(self) -> bool:
        """Deletes its files; returns whether all of them are gone."""
        if self.busy():
            return False
        for path in self.files:
            with contextlib.suppress(OSError):  # Windows: another process has it mapped
                path.unlink(missing_ok=True)
        return not any(os.path.lexists(path) for path in self.files)


def copies() -> list[Copy]:
    """Returns all copies in gemkit's cache folder, the most recently used first."""
    return sorted([*packed(), *_tokenizers()], key=lambda copy: -copy.used)


def packed() -> list[Copy]:
    """Returns the packed weights, with what killed processes left."""
    folder = cache_dir() / "packed"
    found = {path.name: Copy(PACKED, [path], *_facts(path)) for path in folder.glob("*.packed")}
    lost = []
    for record in sorted(folder.glob("*.json")):
        source, name, state = read_record(record)
        size, used = _facts(record)
        if name is None:
            continue
        if name not in found:
            lost.append(Copy(PACKED, [record], size, used, [source], "gone"))
            continue
        copy = found[name]
        copy.files.append(record)
        copy.size += size
        copy.sources.append(source)
        if copy.state == state:
            copy.used = max(copy.used, used)
        elif copy.state != "there":
            copy.used, copy.state = used, state
    leftovers = [Copy(PACKED, [path], *_facts(path)) for path in folder.glob(".*-*")]
    for copy in [*found.values(), *leftovers]:
        if not copy.sources and time.time() - copy.used > _FRESH_SECONDS:
            copy.state = "gone"
    return [*found.values(), *lost, *leftovers]


def downloads() -> list[Copy]:
    """Returns the partial files of Gemma models in the caches of Hugging Face and Kaggle.

    They may be gone on with, so that nothing removes them unasked.
    """
    from gemkit.weights import hub_hf_cache, hub_kaggle
    from gemkit.weights.hub_item import is_locked

    found = []
    for repo, folder in hub_hf_cache.repo_folders():
        if "gemma" in repo.lower():
            found += [(f"hf:{repo}", path) for path in folder.glob("blobs/*.incomplete")]
    for handle, folder in hub_kaggle.variations():
        if "gemma" in handle.lower():
            found += [(f"kaggle:{handle}", path) for path in folder.rglob(".*.incomplete")]
    return [
        Copy(DOWNLOAD, [path], *_facts(path), [name], busy=partial(_is_written, path, is_locked))
        for name, path in sorted(found)
    ]


def _is_written(path: Path, is_locked: Callable[[Path], bool]) -> bool:
    """Whether a process fetches this file just now; other programs' locks are not seen, so a fresh file counts."""
    try:
        return time.time() - path.stat().st_mtime < _BUSY_SECONDS or is_locked(path)
    except OSError:
        return False


def read_record(record: Path) -> tuple[str, str | None, str]:
    """Returns a record's source, the name of its image and the state of the source; no name if it is not a record."""
    try:
        value = json.loads(record.read_bytes())
        source, name, files = str(value["source"]), Path(str(value["packed"])).name, value.get("files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", None, "gone"
    path = Path(source)
    try:
        if not path.exists():
            return source, name, "gone"
        folder = path if path.is_dir() else path.parent
        same = isinstance(files, list) and all(file_facts(folder / str(file[0])) == file for file in files)
    except (OSError, TypeError, IndexError):
        same = False
    return source, name, "there" if same else "changed"


def file_facts(path: Path) -> list[object]:
    """Returns what ties a record to a file: name, size, time, number on its disk. Raises OSError."""
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns, status.st_ino]


def touch(record: Path) -> None:
    """Marks a copy as used now."""
    with contextlib.suppress(OSError):
        os.utime(record)


def drop(sources: Iterable[Path]) -> None:
    """Deletes the records of these models, and each image that no other record names."""
    gone = {str(path) for path in sources}
    for copy in packed():
        theirs = [path for path in copy.files if path.suffix == ".json" and read_record(path)[0] in gone]
        if not theirs:
            continue
        if len(theirs) == sum(path.suffix == ".json" for path in copy.files):
            copy.remove()
        else:
            for record in theirs:
                record.unlink(missing_ok=True)


def tidy(keep: str = "", limit: int | None = None) -> list[Copy]:
    """Removes dead copies, then those used longest ago until all together take no more than the limit.

    keep: the name of an image that stays in any case. limit: in bytes, by default `size_limit()`. Returns what is gone.
    """
    removed, left = [], []
    for copy in copies():
        (removed if copy.is_dead and copy.remove() else left).append(copy)
    most = size_limit()[0] if limit is None else limit
    total = sum(copy.size for copy in left)
    for copy in reversed(left):  # the one used longest ago first
        if total <= most:
            break
        if any(path.name == keep for path in copy.files) or (copy.state == "unknown" and copy.kind == PACKED):
            continue
        if copy.remove():
            removed.append(copy)
            total -= copy.size
    return removed


def size_limit() -> tuple[int, bool]:
    """Returns the most bytes that all copies may take, and whether GEMKIT_CACHE_SIZE set it."""
    text = os.environ.get("GEMKIT_CACHE_SIZE")
    return (LIMIT, False) if not text else (parse_size(text, "GEMKIT_CACHE_SIZE"), True)


def parse_size(text: str, what: str) -> int:
    """Returns the bytes of a size such as `5GB` or `500M`; raises UsageError. what: where it was given."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(I?)B?\s*", text, re.IGNORECASE)
    if not match:
        raise UsageError(f"{what} is {text!r}; give a size, such as 5GB or 500MB")
    unit = match[2].upper()
    return int(float(match[1]) * (1024 ** " KMGT".index(unit) if match[3] and unit else _UNITS[unit]))


def parse_age(text: str, what: str) -> float:
    """Returns the seconds of a time such as `30d` or `12h`; raises UsageError. what: where it was given."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([SMHDW])\s*", text, re.IGNORECASE)
    if not match:
        raise UsageError(f"{what} is {text!r}; give a time, such as 30d, 12h or 2w")
    return float(match[1]) * _SECONDS[match[2].upper()]


def _tokenizers() -> list[Copy]:
    folder = cache_dir() / "tokenizers"
    return [Copy(TOKENIZER, [path], *_facts(path)) for path in sorted(folder.glob("*")) if path.is_file()]


def _facts(path: Path) -> tuple[int, float]:
    """Size, and when it was last used: read or written, as far as the disk keeps that."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0.0
    return status.st_size, max(status.st_mtime, status.st_atime) if path.suffix == ".bin" else status.st_mtime
