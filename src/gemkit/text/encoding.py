"""Bytes of a text file as text: UTF-8, or what a byte order mark says."""

from __future__ import annotations

import codecs

# UTF-32's mark for little endian begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode(data: bytes) -> str:
    """Return the text of bytes in UTF-8, or in UTF-16 or UTF-32 after a byte order mark, which is left out.

    Line ends stay as they are. Raises UnicodeDecodeError for anything else: its `encoding` says which was tried, and
    UTF-16 without a mark, which would be UTF-8 full of zero bytes, counts as an error in UTF-8.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding)
    if len(data) > 1 and len(data) % 2 == 0 and 0 in data[:2]:
        raise UnicodeDecodeError("utf-8", data, 0, 2, "a zero byte, as in UTF-16 without a byte order mark")
    return data.decode("utf-8")
