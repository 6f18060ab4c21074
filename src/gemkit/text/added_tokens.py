"""Tokens that are added to a vocabulary, as the `tokenizers` library adds them. See `with_added`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from gemkit.errors import GemkitError
from gemkit.text.special import SPACE, is_control_piece
from gemkit.text.vocabulary import PieceType, Vocabulary


@dataclass(frozen=True)
class AddedToken:
    """One token. special: a control token, never made from text. normalized: found after spaces became U+2581.

    number: the id that its file gives it. strips: the first of lstrip, rstrip and single_word that is set, or "".
    implied: no file names it, the class of the tokenizer does; it takes an id only if another token follows.
    """

    content: str
    special: bool
    normalized: bool = False
    number: int | None = None
    strips: str = ""
    implied: bool = False

    @classmethod
    def from_json(cls, row: Mapping[str, object], number: int | None = None, special: bool = False) -> AddedToken:
        """Read a row of ``added_tokens`` or of ``added_tokens_decoder``. Raises KeyError, TypeError or ValueError."""
        content = row["content"]
        if not isinstance(content, str) or not content:
            raise ValueError("a token without text")
        special = bool(row.get("special", special))
        strips = next((key for key in ("lstrip", "rstrip", "single_word") if row.get(key)), "")
        normalized = bool(row.get("normalized", not special))
        return cls(content, special, normalized, row.get("id") if number is None else number, strips)

    def as_special(self) -> AddedToken:
        return self if self.special else replace(self, special=True)


def with_added(vocabulary: Vocabulary, tokens: Iterable[AddedToken], rows: int | None = None) -> Vocabulary:
    """Return a vocabulary with tokens added in their order.

    A token that is a piece already keeps that id, any other gets the next one, whatever number its file gives it. Where
    that one would have no row in the embedding and the number is inside the vocabulary, the token takes that piece's
    place, as in transformers 4. rows: of the embedding, None if they are not known.
    Raises GemkitError for tokens that the sentencepiece library cannot find as `tokenizers` does.
    """
    pieces, types = list(vocabulary.pieces), vocabulary.types.tolist()
    ids = {piece: number for number, piece in enumerate(pieces)}
    count = len(pieces)
    found: dict[int, AddedToken] = {}
    for token in tokens:
        piece = token.content.encode("utf-8", "surrogatepass")
        number = ids.get(piece)
        if number is None:
            number = len(pieces)
            if rows is not None and number >= rows and token.number is not None and 0 <= token.number < count:
                number = token.number
                ids.pop(pieces[number], None)
                pieces[number] = piece
            else:
                pieces.append(piece)
                types.append(int(PieceType.NORMAL))
            ids[piece] = number
        before = found.get(number)
        found[number] = token.as_special() if before is not None and before.special else token
    while len(pieces) > count and found[len(pieces) - 1].implied:
        found.pop(len(pieces) - 1)
        pieces.pop(), types.pop()
    for number, token in found.items():
        control = token.special or is_control_piece(pieces[number])
        types[number] = int(PieceType.CONTROL if control else PieceType.USER_DEFINED)
        if not control:
            _check(token, ids)
    for number in _hidden(found, types, pieces):
        types[number] = int(PieceType.UNUSED)
    scores = np.zeros(len(pieces), np.float32)
    scores[:count] = vocabulary.scores
    return Vocabulary(pieces, scores, np.array(types, np.int32))


def _check(token: AddedToken, ids: Mapping[bytes, int]) -> None:
    if token.strips:
        raise GemkitError(
            f"the added token {token.content[:60]!a} has {token.strips}, with which it takes its surroundings into "
            "account; gemkit finds added tokens as they are: save the tokenizer without it"
        )
    spaced = token.content.replace(" ", SPACE)
    if spaced != token.content and spaced.encode("utf-8", "surrogatepass") in ids:
        raise GemkitError(
            f"the added token {token.content[:60]!a} is a piece of the vocabulary too, with its space as U+2581; "
            "gemkit needs them different: save the tokenizer without it"
        )


def _hidden(found: Mapping[int, AddedToken], types: list[int], pieces: list[bytes]) -> list[int]:
    """Return tokens that text never gives: normalised ones in which another is found, which is looked for first."""
    defined = {number for number, kind in enumerate(types) if kind == PieceType.USER_DEFINED}
    late = [number for number in defined & found.keys() if found[number].normalized]
    if not late:
        return []
    first = {pieces[number] for number in defined.difference(late)}
    return [
        number
        for number in late
        for piece in (pieces[number],)
        if any(piece[a:b] in first for a in range(len(piece)) for b in range(a + 1, len(piece) + 1))
    ]
