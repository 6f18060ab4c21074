"""A file of weights, memory-mapped and not trusted: what the readers of GGUF, safetensors and torch share."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path
from typing import BinaryIO, NoReturn, Self

from gemkit.errors import GemkitError


class MappedFile(ABC):
    """An open file; a context manager. Raises GemkitError if it cannot be read or is broken.

    kind: the format, for messages.
    """

    kind: str

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise GemkitError(f"{self.path} is not a regular file: give the path of a {self.kind} file")
            with open(self.path, "rb") as file:
                self._look(file)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            remedy = "close other programs" if error.errno == errno.ENOMEM else "check the path"
            raise GemkitError(f"{self.path} cannot be read ({error.strerror or error}): {remedy}") from None
        self._size = len(self._map)
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _look(self, file: BinaryIO) -> None:
        """Refuse a file that is too short to be mapped, or of another format."""

    @abstractmethod
    def _parse(self) -> None:
        """Read the header of the mapped file."""

    def _buffer(self) -> mmap.mmap:
        if self._map is None:
            raise GemkitError(f"{self.path} is closed: open it again")
        return self._map

    def _fail(self, fault: str, remedy: str = "the file is damaged: get it again") -> NoReturn:
        raise GemkitError(f"{self.path}: {fault}; {remedy}")

    def close(self) -> None:
        """Close the file. Views that are still referenced keep the mapping alive."""
        mapped, self._map = self._map, None
        if mapped is not None:
            with contextlib.suppress(BufferError):  # it goes with the last view
                mapped.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def shown(value: object) -> str:
    """Return a value from a file for a message: quoted, on one line, not long."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:100]}..."


def plain(name: str) -> str:
    """Return a tensor's name for a message, quoted only if it needs to be."""
    return name if name.isascii() and name.isprintable() and len(name) <= 200 else shown(name)
