"""One file of a download: its partial file, lock and final name.

It is written under a partial name, which one process locks, and renamed when it is complete. The lock is on the partial
file itself: it leaves no other file, and a killed process holds none.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

if TYPE_CHECKING:
    import httpx2

_LOCK_AT = (1 << 31) - 2  # Windows locks a byte; its function counts in 32 bits


class Digest(Protocol):
    """Interface of hashlib's objects."""

    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes: ...


@dataclass(frozen=True)
class Item:
    """One file to fetch.

    name: for messages. headers: sent to the hub, not to where it redirects. size: in bytes, or None if only the
    response tells. about: the size for the progress where `size` is None. target: the final path. partial: where it
    grows, in a folder on the same disk. digest: starts the checksum. expected: returns the right checksum, given a
    response's headers; None if they have none. finish: called when the file is whole and not yet renamed.
    """

    name: str
    url: str
    headers: dict[str, str]
    size: int | None
    target: Path
    partial: Path
    digest: Callable[[], Digest]
    expected: Callable[[httpx2.Headers], bytes | None]
    about: int = 0
    finish: Callable[[], None] = lambda: None


def rename(item: Item) -> None:
    """Give the whole file its final name; raises OSError."""
    for attempt in range(20):
        try:
            os.replace(item.partial, item.target)
            return
        except OSError as error:
            if is_whole(item):
                return
            # On Windows a process that waits for this file has it open for a moment
            if not isinstance(error, PermissionError) or os.name != "nt" or attempt == 19:
                raise
            time.sleep(0.05)


def is_whole(item: Item) -> bool:
    """Return whether the final name exists, with the right size."""
    try:
        size = item.target.stat().st_size
    except OSError:
        return False
    return item.size is None or size == item.size


@contextlib.contextmanager
def locked(item: Item, stopped: Callable[[], bool]) -> Iterator[BinaryIO | None]:
    """Give the partial file, open and locked; None if the final name exists, or when `stopped` says so.

    Waits for a process that fetches the same file. An empty partial file is removed at the end.
    """
    item.partial.parent.mkdir(parents=True, exist_ok=True)
    item.target.parent.mkdir(parents=True, exist_ok=True)
    file = None
    while not stopped() and not is_whole(item) and (file := _try_lock(item.partial)) is None:
        time.sleep(0.1)
    if file is None:
        yield None
        return
    with file:
        try:
            # The other process may have finished between the look and the lock
            yield None if is_whole(item) else file
        finally:
            if not file.closed and os.fstat(file.fileno()).st_size == 0 and _is_same(file, item.partial):
                with contextlib.suppress(OSError):
                    item.partial.unlink()


def is_locked(path: Path) -> bool:
    """Return whether another process is downloading a partial file."""
    try:
        file = _try_lock(path) if path.exists() else None
    except OSError:
        return False
    if file is None:
        return path.exists()
    file.close()
    return False


def _try_lock(path: Path) -> BinaryIO | None:
    """Open a file, make it if need be, and take it for this process; None if another one has it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    except PermissionError:
        if os.name != "nt":
            raise
        return None  # it is being renamed
    if _lock(file) and _is_same(file, path):
        return file
    file.close()
    return None


def _lock(file: BinaryIO) -> bool:
    """Lock the file until it is closed; return False if another process has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(_LOCK_AT)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Where a disk knows no locks, two processes may write one file: its checksum tells
        return error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
    return True


def _is_same(file: BinaryIO, path: Path) -> bool:
    """Return whether the file is still at its path: another process may have renamed it before the lock."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def sha256() -> Digest:
    """Return the checksum of a large file on Hugging Face."""
    return hashlib.sha256()


def git_blob(size: int) -> Digest:
    """Return the name that git gives a file of that size: the checksum of a small file on Hugging Face."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def md5() -> Digest:
    """Return the checksum of a file on Kaggle."""
    return hashlib.md5(usedforsecurity=False)
