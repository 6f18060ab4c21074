"""The tokenizer in a GGUF file's key-values: read as a `Vocabulary`, and written with a piece for each embedding row.

llama.cpp wants one piece for each row, gemkit and transformers do not: published models have rows without a piece, and
Gemma 3 has <image_soft_token>, which needs no row in a text model. Source: ``src/llama-vocab.cpp`` of llama.cpp.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping

import numpy as np

from gemkit.errors import GemkitError, listed
from gemkit.text.special import COPY, SPACE, is_control_piece
from gemkit.text.vocabulary import PieceType, Vocabulary
from gemkit.weights.gguf.container import STRING, GGUFArray, GGUFFile, shown

_KEYS = re.compile(r"tokenizer\.ggml\.(model|tokens|scores|token_type|\w+_token_id)")
_BYTE = re.compile(rb"<0x[0-9A-F]{2}>")
_PAD_SCORE = -10000.0
_DISPENSABLE = {
    "scores": "text may be cut into other pieces than the model was trained on",
    "token_type": "control tokens and bytes are told by their text",
}
_NEVER_TEXT = (PieceType.CONTROL, PieceType.UNUSED, PieceType.UNKNOWN)


def check_vocabulary(pairs: Mapping[str, object], rows: int, warn: Callable[[str], None]) -> None:
    """Raise GemkitError unless the arrays are of the right kinds and lengths for an embedding of so many rows.

    warn: called with a sentence on each array that llama.cpp does without.
    """
    model = pairs.get("tokenizer.ggml.model", "llama")
    if model != "llama":
        raise GemkitError(
            f"its tokenizer (tokenizer.ggml.model) is {shown(model)}, not sentencepiece, which is called 'llama'; "
            "convert the model again from a folder with its tokenizer.model"
        )
    count = 0
    for key in ("tokens", "scores", "token_type"):
        array = pairs.get(f"tokenizer.ggml.{key}")
        if array is None and key in _DISPENSABLE:
            warn(f"tokenizer.ggml.{key} is missing: {_DISPENSABLE[key]}")
            continue
        if not isinstance(array, GGUFArray) or (array.type == STRING) != (key == "tokens"):
            raise GemkitError(f"tokenizer.ggml.{key} is not a list of the right type; get another conversion")
        count = count or len(array)
        if len(array) < count:
            raise GemkitError(
                f"tokenizer.ggml.{key} has {len(array)} entries and tokenizer.ggml.tokens {count}; "
                "get another conversion"
            )
    if count < rows:
        raise GemkitError(
            f"tokenizer.ggml.tokens has {count} entries and token_embd.weight {rows} rows: llama.cpp refuses it too; "
            "get another conversion, with a piece for each row"
        )


def read_vocabulary(file: GGUFFile, rows: int, warn: Callable[[str], None]) -> Vocabulary:
    """Return the pieces, without those that only fill up the rows of the embedding at its end.

    Missing scores are 0 and missing types follow from the text, as in llama.cpp; an empty piece and one
    that occurs a second time get a text of their own, so that text always becomes the first one.
    Raises GemkitError for a piece that text can become and that has no row.
    """
    pairs = file.metadata
    pieces = pairs["tokenizer.ggml.tokens"].strings()
    scores, types = _numbers(pairs, "scores", len(pieces)), _numbers(pairs, "token_type", len(pieces))
    if scores is None:
        scores = np.zeros(len(pieces), np.float32)
    if types is None:
        types = np.full(len(pieces), PieceType.NORMAL, np.int32)
        types[[i for i, piece in enumerate(pieces) if piece[:3] == b"<0x" and _BYTE.fullmatch(piece)]] = PieceType.BYTE
    types[~np.isin(types, list(PieceType))] = PieceType.NORMAL
    _name_empty(pieces)
    _name_copies(pieces, types, warn)
    for number in range(rows, len(pieces)):
        if types[number] not in _NEVER_TEXT and not is_control_piece(pieces[number]):
            raise GemkitError(
                f"{file.path}: the piece {number} {shown(pieces[number])} has no row in token_embd.weight, which has "
                f"{rows}: llama.cpp refuses it too; get another conversion"
            )
    end = len(pieces)
    while end and types[end - 1] == PieceType.UNUSED and pieces[end - 1].rstrip(b"_") == _pad(end - 1):
        end -= 1
    return Vocabulary(pieces[:end], scores[:end], types[:end])


def vocabulary_key(file: GGUFFile, rows: int) -> str:
    """Return the SHA-256 of all data that `read_vocabulary` reads; the rows count where pieces have none."""
    digest = file.digest(sorted(key for key in file.metadata if _KEYS.fullmatch(key)))
    if len(file.metadata["tokenizer.ggml.tokens"]) > rows:
        digest = hashlib.sha256(f"{digest} {rows}".encode()).hexdigest()
    return digest


def fit_to_rows(vocabulary: Vocabulary, rows: int) -> Vocabulary:
    """Return the vocabulary with one piece for each row of the embedding, as llama.cpp's converter writes it.

    Rows without a piece get "[PAD262145]" and so on, of the type UNUSED, which text never becomes; pieces without a row
    are left out. `read_vocabulary` takes the former away again.
    """
    count = min(len(vocabulary), rows)
    fill = range(count, rows)
    pieces = vocabulary.pieces[:count]
    taken = set(pieces) if fill else set()
    pieces += [_pad(number) + b"_" * (_pad(number) in taken) for number in fill]
    return Vocabulary(
        pieces,
        np.append(vocabulary.scores[:count], np.full(len(fill), _PAD_SCORE, np.float32)).astype(np.float32),
        np.append(vocabulary.types[:count], np.full(len(fill), PieceType.UNUSED, np.int32)).astype(np.int32),
    )


def _pad(number: int) -> bytes:
    return b"[PAD%d]" % number


def _numbers(pairs: Mapping[str, object], key: str, count: int) -> np.ndarray | None:
    array = pairs.get(f"tokenizer.ggml.{key}")
    if not isinstance(array, GGUFArray):
        return None
    with np.errstate(all="ignore"):
        return array.numbers()[:count].astype(np.float32 if key == "scores" else np.int32)


def _name_empty(pieces: list[bytes]) -> None:
    """Give empty pieces the text that llama.cpp gives them."""
    if b"" in pieces:
        pieces[:] = [piece or b"[EMPTY_%d]" % number for number, piece in enumerate(pieces)]


def _name_copies(pieces: list[bytes], types: np.ndarray, warn: Callable[[str], None]) -> None:
    """Mark pieces that occurred before with `COPY`, so that they are told apart and read as the same text."""
    space, mark = SPACE.encode(), COPY.encode()
    plain = [piece.replace(b" ", space) if b" " in piece else piece for piece in pieces]
    if len(set(plain)) == len(plain):
        return
    seen: dict[bytes, int] = {}
    told = []
    for number, piece in enumerate(plain):
        first = seen.setdefault(piece, number)
        if first == number:
            continue
        told.append(f"{number} {shown(piece.decode('utf-8', 'replace'))} (first at {first})")
        while piece in seen:
            piece += mark
        seen[piece] = number
        pieces[number] = piece
        if types[number] not in _NEVER_TEXT:
            types[number] = PieceType.CONTROL if is_control_piece(plain[number]) else PieceType.UNUSED
    warn(f"pieces of its vocabulary occur twice: {listed(told)}; text becomes the first one of each")
