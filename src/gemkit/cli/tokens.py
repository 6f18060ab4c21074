"""Tokens as JSON and as words for the eye."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemkit.text.tokenizer import Tokenizer


def token_record(tokenizer: Tokenizer, token: int) -> dict[str, object]:
    """Return {"id", "text"} of a token, control tokens by their names.

    A token that is a part of a character also has "bytes", and U+FFFD for text.
    """
    data = tokenizer.token_bytes(token, skip_control=False)
    try:
        return {"id": token, "text": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {"id": token, "text": data.decode("utf-8", "replace"), "bytes": list(data)}


def token_records(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[dict[str, object]]:
    """Return `token_record` of each of them."""
    return [token_record(tokenizer, token) for token in tokens]


def shown_piece(tokenizer: Tokenizer, token: int) -> str:
    """Return a piece as the vocabulary has it, ▁ for a space; what would move the cursor is escaped."""
    piece = tokenizer.id_to_piece(token)
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in piece)
