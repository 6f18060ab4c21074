"""Train and validation parts by the content of a row, so that they stay when rows are added, moved or repeated."""

from __future__ import annotations

import hashlib
import json

from gemkit.data.rows import Conversation, Pair, Text
from gemkit.text.chat import turns

_BYTES = 8


def position(content: Conversation | Pair | Text) -> float:
    """Return a number in [0, 1) that depends on the content alone; rows below a share are validation rows.

    A pair has that of the same conversation, and white space around a text does not count.
    """
    if isinstance(content, Conversation):
        parts = turns(content.messages)
    elif isinstance(content, Pair):
        parts = [("user", content.prompt.strip()), ("model", content.completion.strip())]
    else:
        parts = [("text", content.text.strip())]
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=_BYTES).digest()
    # The upper 53 bits: a float64 has no more, and all 64 could be rounded up to 1
    return (int.from_bytes(digest) >> 11) / 2**53
