"""JSON that is not trusted: any fault is a GemkitError that names the file."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import NoReturn

from gemkit.errors import GemkitError
from gemkit.text.encoding import decode
from gemkit.weights.git_lfs import refuse_pointer

_MAX_BYTES = 256 << 20  # the largest, tokenizer.json, has 40 MB


def parse_object(data: bytes) -> dict[str, object]:
    """Return the JSON object in UTF-8 bytes, or in what a byte order mark says.

    Raises ValueError for anything else and for a key that an object has twice.
    """

    def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            raise ValueError(f"the key {next(k for k, _ in pairs if k in seen or seen.add(k))!a:.60} appears twice")
        return found

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"it holds {name}")

    try:
        value = json.loads(decode(data), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def read_file(path: Path) -> bytes:
    """Return a small file's bytes. Raises GemkitError if it cannot be read or is no regular file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise GemkitError(f"{path} is not a regular file: check the path")
        if status.st_size > _MAX_BYTES:
            raise GemkitError(f"{path} has {status.st_size} bytes, far more than such a file needs: get it again")
        data = path.read_bytes()
    except OSError as error:
        raise GemkitError(f"{path} cannot be read ({error.strerror or error}): check the path") from None
    refuse_pointer(path, data)
    return data


def read_object(path: Path) -> dict[str, object]:
    """Return the object in a JSON file. Raises GemkitError if there is none."""
    try:
        return parse_object(read_file(path))
    except GemkitError:
        raise
    except ValueError as error:
        raise GemkitError(f"{path}: this is no JSON object ({error}); get the file again") from None
