"""Git LFS pointers: what a clone without Git LFS has in place of each large file, some lines of text."""

from __future__ import annotations

from pathlib import Path

from gemkit.errors import GemkitError

HEAD = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path, head: bytes | None = None) -> None:
    """Raise GemkitError if a file is a pointer. head: its first bytes, if they were read; else they are read here.

    A file that cannot be read is left to the reader's own error.
    """
    if head is None:
        try:
            if not path.is_file():  # a pipe would wait for its writer
                return
            with open(path, "rb") as file:
                head = file.read(len(HEAD))
        except OSError:
            return
    if head[: len(HEAD)] == HEAD:
        raise GemkitError(
            f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull' in its folder, or download it again"
        )
