"""Sanitised text, to the terminal and from it."""

import re

_HIDDEN = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_HIDDEN |= {0x7F: "\u2421"} | {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
_HIDDEN |= dict.fromkeys(range(55296, 57344), "�")


def visible(text: str) -> str:
    """Return a text whose control characters but newline and tab are shown: escape as ␛, C1 codes as \\x9b."""
    return text.translate(_HIDDEN)


def clean(text: str) -> str:
    """Return input as valid Unicode: bytes that are not UTF-8 become U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
