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
import time
from collections.abc import Iterable
from pathlib import Path

from gemkit.cache import Copy, cache_dir, parse_size, size_and_use

LIMIT = 20 * 10**9  # bytes of all copies, where GEMKIT_CACHE_SIZE does not say
_FRESH_SECONDS = 3600  # a file without a record may be one that another process is about to name

PACKED, TOKENIZER = "packed weights", "tokenizer"


def copies() -> list[Copy]:
    """Return all copies in gemkit's cache folder, the most recently used first."""
    return sorted([*packed(), *_tokenizers()], key=lambda copy: -copy.used)


def packed() -> list[Copy]:
    """Return the packed weights, with what killed processes left."""
    folder = cache_dir() / "packed"
    found = {path.name: Copy(PACKED, [path], *size_and_use(path)) for path in folder.glob("*.packed")}
    lost = []
    for record in sorted(folder.glob("*.json")):
        source, name, state = read_record(record)
        size, used = size_and_use(record)
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
    leftovers = [Copy(PACKED, [path], *size_and_use(path)) for path in folder.glob(".*")]
    for copy in [*found.values(), *leftovers]:
        if not copy.sources and time.time() - copy.used > _FRESH_SECONDS:
            copy.state = "gone"
    return [*found.values(), *lost, *leftovers]


def read_record(record: Path) -> tuple[str, str | None, str]:
    """Return a record's source, the name of its image and the state of the source; no name if it is not a record."""
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
        same = isinstance(files, list) and all(file_identity(folder / str(file[0])) == file for file in files)
    except (OSError, TypeError, IndexError):
        same = False
    return source, name, "there" if same else "changed"


def file_identity(path: Path) -> list[object]:
    """Return the identity of a file: name, size, time, inode. Raises OSError."""
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns, status.st_ino]


def touch(record: Path) -> None:
    """Mark a copy as used now."""
    with contextlib.suppress(OSError):
        os.utime(record)


def drop(sources: Iterable[Path]) -> None:
    """Delete the records of these models, and each image that no other record names."""
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
    """Remove dead copies, then those used longest ago until all together take no more than the limit.

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
    """Return the most bytes that all copies may take, and whether GEMKIT_CACHE_SIZE set it."""
    text = os.environ.get("GEMKIT_CACHE_SIZE")
    return (LIMIT, False) if not text else (parse_size(text, "GEMKIT_CACHE_SIZE"), True)


def _tokenizers() -> list[Copy]:
    folder = cache_dir() / "tokenizers"
    return [Copy(TOKENIZER, [path], *size_and_use(path)) for path in sorted(folder.glob("*")) if path.is_file()]
