"""Checks of path arguments, made before anything is downloaded or loaded."""

import os
from pathlib import Path

from gemkit.errors import GemkitError


def check_text_file(path: str) -> None:
    """Raise GemkitError unless `path` is a file that can be read, or `-`, standard input."""
    if path == "-":
        return
    if not os.path.exists(path):
        raise GemkitError(f"there is no file {path}: check the path")
    if os.path.isdir(path):
        raise GemkitError(f"{path} is a folder: give a text file")
    if not os.access(path, os.R_OK):
        raise GemkitError(f"{path} cannot be read (permission denied): check its permissions")


def check_new(path: str | os.PathLike[str]) -> None:
    """Raise GemkitError if `path` exists, or cannot be made."""
    if os.path.lexists(path):
        raise GemkitError(f"{path} exists: give another name, or delete it first")
    check_writable(path)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise GemkitError unless the file `path`, or the nearest folder above it that exists, can be written."""
    target = Path(path).absolute()
    place = next(parent for parent in (target, *target.parents) if parent.exists())
    if place != target and not place.is_dir():
        raise GemkitError(f"{path} cannot be written ({place} is not a folder): give another path")
    if not os.access(place, os.W_OK):
        raise GemkitError(f"{path} cannot be written ({place} is read-only): give another path")
