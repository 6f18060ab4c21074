"""Writer of TensorBoard event files, without TensorBoard: scalars by step.

A file is a sequence of TFRecords (length, masked CRC-32C of it, data, masked CRC-32C of them), each a protocol buffer
of the type Event: ``tensorboard/compat/proto/event.proto`` and ``summary.proto``. TensorBoard drops the points of an
earlier session behind the step at which a later one begins.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path

_START = 1  # SessionLog.START


class EventFile:
    """A new event file in a folder, flushed after every step. first: the first step that it has."""

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        count = len(list(folder.glob("events.out.tfevents.*")))
        # TensorBoard reads a folder's files in the order of their names
        self._file = open(folder / f"events.out.tfevents.{int(time.time()):010}.{count:04}.gemkit", "xb")
        self._event(0, _bytes(3, b"brain.Event:2"))
        self._event(first, _bytes(7, _varint(1, _START)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write one point of each curve. Raises OSError."""
        values = (_bytes(1, tag.encode()) + _tag(2, 5) + struct.pack("<f", value) for tag, value in scalars.items())
        self._event(step, _bytes(5, b"".join(_bytes(1, value) for value in values)))

    def close(self) -> None:
        self._file.close()

    def _event(self, step: int, content: bytes) -> None:
        data = _tag(1, 1) + struct.pack("<d", time.time()) + _varint(2, step) + content
        length = struct.pack("<Q", len(data))
        self._file.write(length + _masked_crc(length) + data + _masked_crc(data))
        self._file.flush()


# --- protocol buffers and checksums ----------------------------------------------------------------------------------


def _number(value: int) -> bytes:
    """Return a varint: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(field: int, kind: int) -> bytes:
    return _number(field << 3 | kind)


def _varint(field: int, value: int) -> bytes:
    return _tag(field, 0) + _number(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _tag(field, 2) + _number(len(value)) + value


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    """Return the CRC-32C (Castagnoli) of bytes, rotated by 15 bits, plus a constant, as TFRecords have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
