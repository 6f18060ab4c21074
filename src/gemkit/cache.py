"""Where gemkit keeps what it can make again, and how it writes there. Deleting the folder costs only time."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from gemkit.errors import GemkitError


def cache_dir() -> Path:
    """Returns gemkit's cache folder, which may not exist yet.

    GEMKIT_CACHE names it; else XDG_CACHE_HOME/gemkit; else ~/.cache/gemkit, on macOS ~/Library/Caches/gemkit, on
    Windows %LOCALAPPDATA%\\gemkit\\cache. Raises GemkitError if this user has no home folder.
    """
    if own := os.environ.get("GEMKIT_CACHE"):
        return Path(own).absolute()
    # The XDG specification has relative paths ignored.
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg and os.path.isabs(xdg):
        return Path(xdg) / "gemkit"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "gemkit" / "cache"
    try:
        home = Path.home()
    except RuntimeError:
        raise GemkitError("this user has no home folder to keep files in: set GEMKIT_CACHE to a folder") from None
    if sys.platform == "win32":
        return home / "AppData" / "Local" / "gemkit" / "cache"
    return home / "Library" / "Caches" / "gemkit" if sys.platform == "darwin" else home / ".cache" / "gemkit"


def atomic_write(path: str | os.PathLike[str], data: bytes, private: bool = True) -> None:
    """Writes a file under a temporary name and renames it: a reader sees the old file or the new one whole.

    Makes the folders on the way. private: for this user alone; False leaves it to the umask, as for any file.
    Raises OSError and leaves nothing behind if that fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    handle = os.open(temporary, flags, 0o600 if private else 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def try_atomic_write(path: str | os.PathLike[str], data: bytes) -> bool:
    """`atomic_write` for what can be made again: returns False if the disk is full or may not be written."""
    try:
        atomic_write(path, data)
    except OSError:
        return False
    return True
