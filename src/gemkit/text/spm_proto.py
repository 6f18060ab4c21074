"""Reader and writer of sentencepiece's model file, without protobuf.

Source: src/sentencepiece_model.proto of github.com/google/sentencepiece, from which the field numbers are. A message is
a row of fields, each a key (number · 8 + wire type) and a value: a varint (0), a length and bytes (2), 4 bytes (5).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from gemkit.errors import GemkitError
from gemkit.text.special import CORE, SPACE, is_control_piece
from gemkit.text.vocabulary import PieceType, Vocabulary

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BPE = 2
# ModelProto, SentencePiece, TrainerSpec, NormalizerSpec
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _SUFFIX, _BYTE_FALLBACK, _UNK_SURFACE = 3, 4, 24, 35, 44
_IDS = {"unk": (40, 45), "bos": (41, 46), "eos": (42, 47), "pad": (43, 48)}  # id, piece
_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 1, 2, 3, 4, 5


def write_model(vocabulary: Vocabulary) -> bytes:
    """Return a sentencepiece model that splits text as Gemma does: byte-pair merges by score, then bytes.

    The only normalisation is " " to U+2581, in pieces too. Every control token becomes CONTROL, so that text never
    makes one. Raises GemkitError for an invalid vocabulary.
    """
    pieces = vocabulary.pieces
    _check(vocabulary)
    space = SPACE.encode()
    pieces = [piece.replace(b" ", space) if b" " in piece else piece for piece in pieces]
    types = np.array(vocabulary.types, np.uint8)
    types[[i for i, piece in enumerate(pieces) if is_control_piece(piece)]] = PieceType.CONTROL
    # Converters write <unk> as CONTROL; sentencepiece wants exactly one UNKNOWN.
    types[types == PieceType.UNKNOWN] = PieceType.CONTROL
    unk = CORE["unk"][0].encode()
    types[[i for i, piece in enumerate(pieces[:16]) if piece == unk]] = PieceType.UNKNOWN

    tail = np.zeros(len(pieces), [("score_key", "u1"), ("score", "<f4"), ("type_key", "u1"), ("type", "u1")])
    tail["score_key"], tail["type_key"] = _key(_SCORE, _FIXED32)[0], _key(_TYPE, _VARINT)[0]
    tail["score"], tail["type"] = vocabulary.scores, types
    tails, width = tail.tobytes(), tail.itemsize
    heads = {}
    for length in set(map(len, pieces)):
        head = _key(_PIECE, _BYTES) + _varint(length)
        heads[length] = _key(_PIECES, _BYTES) + _varint(len(head) + length + width) + head
    parts = [
        part
        for at, piece in enumerate(pieces)
        for part in (heads[len(piece)], piece, tails[at * width : (at + 1) * width])
    ]
    parts += [_bytes(_TRAINER, _trainer(len(pieces))), _bytes(_NORMALIZER, _normalizer())]
    return b"".join(parts)


def _check(vocabulary: Vocabulary) -> None:
    pieces, scores, types = vocabulary.pieces, vocabulary.scores, vocabulary.types
    joined = b"\0".join(pieces)
    problem = None
    if not len(pieces) == len(scores) == len(types):
        problem = f"has {len(pieces)} pieces, {len(scores)} scores and {len(types)} types"
    elif b"" in pieces:
        problem = f"has an empty piece at {pieces.index(b'')}"
    elif joined.count(b"\0") >= max(1, len(pieces)):
        problem = "has a piece with a zero byte"  # sentencepiece would cut it there
    elif not np.isfinite(scores).all():
        problem = f"has no number for a score at {int(np.argmin(np.isfinite(scores)))}"
    elif not np.isin(types, list(PieceType)).all():
        problem = f"has an unknown type at {int(np.argmin(np.isin(types, list(PieceType))))}"
    else:
        try:
            joined.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = f"has a piece at {joined.count(0, 0, error.start)} that is not UTF-8"
    if problem:
        raise GemkitError(f"the vocabulary {problem}: get the file again")


def _trainer(vocab_size: int) -> bytes:
    ids = [
        _number(id_field, CORE[name][1]) + _bytes(piece_field, CORE[name][0].encode())
        for name, (id_field, piece_field) in _IDS.items()
    ]
    size = _number(_VOCAB_SIZE, vocab_size)
    return b"".join([_number(_MODEL_TYPE, _BPE), size, _number(_BYTE_FALLBACK, 1), *ids, _bytes(_UNK_SURFACE, b"")])


def _normalizer() -> bytes:
    off = _number(_DUMMY_PREFIX, 0) + _number(_REMOVE_SPACES, 0)
    return _bytes(_NAME, b"identity") + off + _number(_ESCAPE_SPACES, 1)


def read_model(data: bytes) -> Vocabulary:
    """Return the vocabulary of a sentencepiece model, such as a published ``tokenizer.model``.

    Raises GemkitError for broken data and for a model that splits text in another way than Gemma's.
    """
    pieces, scores, types = [], [], []
    trainer: dict[int, object] = {}
    normalizer: dict[int, object] = {}
    try:
        for number, value in _fields(data, 0, len(data)):
            if number == _PIECES:
                row = _message(data, value)
                pieces.append(bytes(data[slice(*row[_PIECE])]))
                scores.append(row.get(_SCORE, 0.0))
                types.append(row.get(_TYPE, int(PieceType.NORMAL)))
            elif number == _TRAINER:
                trainer |= _message(data, value)
            elif number == _NORMALIZER:
                normalizer |= _message(data, value)
        start, end = normalizer.get(_CHARSMAP, (0, 0))
        vocabulary = Vocabulary(pieces, np.array(scores, np.float32), np.array(types, np.int32))
    except (IndexError, KeyError, TypeError, OverflowError, ValueError, struct.error):
        raise GemkitError("the tokenizer model is broken: get the file again") from None
    wanted = {
        "byte-pair merges": trainer.get(_MODEL_TYPE, 1) == _BPE,
        "byte fallback": trainer.get(_BYTE_FALLBACK, 0) == 1,
        "spaces before words": not trainer.get(_SUFFIX, 0),
        "no space put in front": normalizer.get(_DUMMY_PREFIX, 1) == 0,
        "spaces kept": normalizer.get(_REMOVE_SPACES, 1) == 0 and normalizer.get(_ESCAPE_SPACES, 1) == 1,
        "no normalisation": start == end,
    }
    if missing := [name for name, holds in wanted.items() if not holds]:
        raise GemkitError(f"the tokenizer model lacks {', '.join(missing)}: this is no Gemma tokenizer")
    return vocabulary


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _number(field: int, value: int) -> bytes:
    return _key(field, _VARINT) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(value)) + value


def _message(data: bytes, span: tuple[int, int]) -> dict[int, object]:
    return dict(_fields(data, *span))


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, object]]:
    """Yield number and value of each field in data[at:end]; bytes come as (start, end), 4 bytes as a float.

    Raises IndexError, ValueError or struct.error where the data is broken.
    """
    while at < end:
        key, at = _read_varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _read_varint(data, at)
        elif wire == _BYTES:
            length, at = _read_varint(data, at)
            value = (at, at + length)
            at += length
        elif wire == _FIXED32:
            value = struct.unpack_from("<f", data, at)[0]
            at += 4
        elif wire == _FIXED64:
            value = None
            at += 8
        else:
            raise ValueError(f"wire type {wire}")
        if at > end:
            raise IndexError("a field ends behind its message")
        yield key >> 3, value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = data[at]
    at += 1
    if value < 128:
        return value, at
    value &= 127
    for shift in range(7, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a varint has more than ten bytes")
