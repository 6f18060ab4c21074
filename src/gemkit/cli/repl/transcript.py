"""Conversations in files: JSON that `/save` writes and `/load` reads, and the last one, which the chat keeps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gemkit.cache import atomic_write, cache_dir
from gemkit.errors import UsageError
from gemkit.text.encoding import decode

Message = dict[str, Any]

MAX_FILE_BYTES = 64 << 20
LAST = "last_chat.json"


def last_path() -> Path:
    """Return where the last conversation is kept, a file that only its owner may read."""
    return cache_dir() / LAST


def expand(path: str) -> Path:
    """Return a path with `~` resolved; raises UsageError if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path}: there is no such user") from None


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record whole or not at all. Raises OSError."""
    atomic_write(path, (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode())


def check_target(path: Path) -> None:
    """Raise UsageError where a conversation may not be written: over another kind of file, or into no folder."""
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist: make it first, or choose another")
    if path.exists():
        try:
            read(path)
        except UsageError:
            raise UsageError(f"{path} exists and is no conversation: choose another name") from None


def read(path: Path) -> dict[str, Any]:
    """Return a file's record, its outermost shape checked. A bare list of messages is one too."""
    data = read_bytes(path, f"{path} does not exist: /save FILE writes a conversation", "it is no conversation")
    try:
        record = json.loads(decode(data))
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not JSON in UTF-8: /save FILE writes what /load reads") from None
    record = {"messages": record} if isinstance(record, list) else record
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise UsageError(f"{path} has no list of messages: /save FILE writes what /load reads")
    if not isinstance(record.get("settings", {}), dict):
        raise UsageError(f"{path} has settings that are no JSON object")
    return record


def read_bytes(path: Path, missing: str, too_large: str) -> bytes:
    """Return a file's bytes; raises UsageError for what is missing, no file or too large."""
    if not path.exists():
        raise UsageError(missing)
    # Reading a pipe or a device could wait forever.
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    if os.stat(path).st_size > MAX_FILE_BYTES:
        raise UsageError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB: {too_large}")
    return path.read_bytes()


def messages(path: Path, record: dict[str, Any]) -> list[Message]:
    """Return the messages of a record, each of them checked. Raises UsageError."""
    return [_message(path, number, message) for number, message in enumerate(record["messages"])]


def _message(path: Path, number: int, message: object) -> Message:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if role not in ("user", "assistant", "system") or not isinstance(content, str):
        raise UsageError(f'{path}: message {number} is no {{"role": "user" | "assistant" | "system", "content": text}}')
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise UsageError(f"{path}: message {number} is not Unicode text")
    if role == "system" and number:
        raise UsageError(f"{path}: message {number} is the system's: only the first may be")
    stopped = {"stopped": True} if role == "assistant" and message.get("stopped") is True else {}
    return {"role": role, "content": content, **stopped}
