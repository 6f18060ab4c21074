"""Cache folder of data that gemkit can make again, and atomic writes to it. Deleting the folder costs only time."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from gemkit.errors import GemkitError, UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SECONDS = {"S": 1, "M": 60, "H": 3600, "D": 86400, "W": 7 * 86400}


def cache_dir() -> Path:
    """Return gemkit's cache folder, which may not exist yet.

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


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a temporary path next to `target`, which is renamed to it at the end, or deleted if anything fails.

    A reader sees the old file or the new one whole. An empty folder at `target` is replaced. Raises OSError.
    """
    temporary = target.with_name(f".{target.name}.{os.urandom(8).hex()}")
    try:
        yield temporary
        if target.is_dir():
            target.rmdir()
        os.replace(temporary, target)
    except BaseException:
        # orbax-checkpoint writes under a longer name of its own
        for left in (temporary, *target.parent.glob(f"{glob.escape(temporary.name)}.*")):
            with contextlib.suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        raise


def create(path: Path, private: bool = True) -> BinaryIO:
    """Open a file that must not exist, for writing. private: for this user alone; False leaves it to the umask."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.fdopen(os.open(path, flags, 0o600 if private else 0o666), "wb")


def atomic_write(path: str | os.PathLike[str], data: bytes, private: bool = True) -> None:
    """Write a `staged` file, and the folders on the way. private: as in `create`. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as temporary, create(temporary, private) as file:
        file.write(data)


def try_atomic_write(path: str | os.PathLike[str], data: bytes) -> bool:
    """Write as `atomic_write` does; return False if the disk is full or not writable."""
    try:
        atomic_write(path, data)
    except OSError:
        return False
    return True


@dataclass
class Copy:
    """One copy, which may be removed alone.

    kind: such as "packed weights". files: what is deleted with it. size: in bytes. used: seconds since 1970.
    sources: the models that it was made from, as far as they are known. state of the source: "there", "changed" or
    "gone"; "unknown" if it has none. busy: returns whether a process is writing it.
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
        """True if it cannot be used any more."""
        return self.state in ("gone", "changed")

    def remove(self) -> bool:
        """Delete its files; return True if all of them are gone."""
        if self.busy():
            return False
        for path in self.files:
            with contextlib.suppress(OSError):  # Windows: another process has it mapped
                path.unlink(missing_ok=True)
        return not any(os.path.lexists(path) for path in self.files)


def parse_size(text: str, what: str) -> int:
    """Return the bytes of a size such as `5GB` or `500M`; raises UsageError. what: where it was given."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(I?)B?\s*", text, re.IGNORECASE)
    if not match:
        raise UsageError(f"{what} is {text!r}; give a size, such as 5GB or 500MB")
    unit = match[2].upper()
    return int(float(match[1]) * (1024 ** " KMGT".index(unit) if match[3] and unit else _UNITS[unit]))


def parse_age(text: str, what: str) -> float:
    """Return the seconds of a time such as `30d` or `12h`; raises UsageError. what: where it was given."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([SMHDW])\s*", text, re.IGNORECASE)
    if not match:
        raise UsageError(f"{what} is {text!r}; give a time, such as 30d, 12h or 2w")
    return float(match[1]) * _SECONDS[match[2].upper()]


def size_and_use(path: Path) -> tuple[int, float]:
    """Return a file's bytes and when it was last used: read or written, as far as the disk keeps that."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0.0
    return status.st_size, max(status.st_mtime, status.st_atime) if path.suffix == ".bin" else status.st_mtime
