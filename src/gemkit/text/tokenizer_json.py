"""tokenizer.json, the tokenizer file of Hugging Face, read as a vocabulary."""

from __future__ import annotations

import json

import numpy as np

from gemkit.errors import GemkitError
from gemkit.text.special import SPACE, is_control_piece
from gemkit.text.vocabulary import PieceType, Vocabulary

_RUNS = (SPACE, "\n", "\t")


def read_tokenizer_json(data: bytes) -> Vocabulary:
    """Returns the vocabulary of a Gemma ``tokenizer.json``.

    A score is minus the rank of the first merge that makes the piece. Added tokens are CONTROL if special, else
    USER_DEFINED. So are runs of white space and pieces that no merge can make (HTML tags), which older exports of
    Gemma 1 do not list as added, though they are USER_DEFINED in its ``tokenizer.model``.
    Raises GemkitError for broken data and for a tokenizer that splits text in another way than Gemma's.
    """
    try:
        file = json.loads(data)
        model = file["model"]
        vocab, merges = dict(model["vocab"]), model["merges"]
        added = [(token["id"], token["content"], bool(token["special"])) for token in file["added_tokens"]]
        spaces = file["normalizer"]
        wanted = {
            "byte-pair merges": model["type"] == "BPE" and not model.get("ignore_merges"),
            "byte fallback": bool(model["byte_fallback"]),
            "spaces kept": (spaces["type"], spaces["pattern"], spaces["content"])
            == ("Replace", {"String": " "}, SPACE),
        }
        if missing := [name for name, holds in wanted.items() if not holds]:
            raise GemkitError(f"the tokenizer lacks {', '.join(missing)}: this is no Gemma tokenizer")
        return _vocabulary(vocab, merges, added)
    except GemkitError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise GemkitError(f"this is no tokenizer.json of a Gemma ({error!r}): get the file again") from None


def _vocabulary(vocab: dict[str, int], merges: list, added: list[tuple[int, str, bool]]) -> Vocabulary:
    vocab |= {content: number for number, content, _ in added}
    pieces: list[str | None] = [None] * len(vocab)
    for piece, number in vocab.items():
        if not 0 <= number < len(pieces) or pieces[number] is not None:
            raise GemkitError(f"id {number} of the tokenizer is used twice or leaves a gap: get the file again")
        pieces[number] = piece
    # Exports of Gemma 1 and 2 write "\t" for <0x09>.
    tab = vocab.get("<0x00>", 0) + 9
    if "<0x09>" not in vocab and vocab.get("\t") == tab:
        pieces[tab] = "<0x09>"
    # A merge is "left right" in older files, [left, right] in newer ones.
    made = [merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in merges]
    rank = dict(zip(reversed(made), range(len(made) - 1, -1, -1)))

    scores = np.array([-rank.get(piece, len(made)) for piece in pieces], np.float32)
    types = np.full(len(pieces), PieceType.NORMAL, np.int32)
    for number, piece in enumerate(pieces):
        if len(piece) == 6 and piece.startswith("<0x"):
            types[number] = PieceType.BYTE
        elif len(piece) > 1 and (piece not in rank or (piece[0] in _RUNS and not piece.strip(piece[0]))):
            types[number] = PieceType.USER_DEFINED
    for number, _, special in added:
        types[number] = PieceType.CONTROL if special else PieceType.USER_DEFINED
    encoded = [piece.encode() for piece in pieces]
    types[[number for number, piece in enumerate(encoded) if is_control_piece(piece)]] = PieceType.CONTROL
    return Vocabulary(encoded, scores, types)


def write_tokenizer_json(vocabulary: Vocabulary, bos_id: int = 2) -> bytes:
    """Returns the ``tokenizer.json`` of a vocabulary: the same ids as sentencepiece's, one <bos> before each text.

    The merges are all ways in which two pieces make a third, best piece first. Runs of white space come before all
    others, from long pieces first, so that a run is cut as sentencepiece cuts it.
    """
    pieces = [piece.decode().replace(" ", SPACE) for piece in vocabulary.pieces]
    types, scores = vocabulary.types.tolist(), vocabulary.scores.tolist()
    normal, defined = int(PieceType.NORMAL), int(PieceType.USER_DEFINED)
    special = {int(PieceType.CONTROL), int(PieceType.UNKNOWN)}
    rank = {piece: i for i, piece in enumerate(pieces) if types[i] in (normal, defined)}
    merges = []
    for piece, number in rank.items():
        run = types[number] == defined
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in rank and right in rank:
                order = (0, -at, -len(piece)) if run else (1, -scores[number], number)
                merges.append((*order, rank[left], rank[right]))
    merges.sort()
    added = [
        {
            "id": number,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[number] in special,
        }
        for number, piece in enumerate(pieces)
        if types[number] in special or types[number] == defined
    ]
    bos = pieces[bos_id]
    begin = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    file = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": begin,
            "pair": [*begin, *pair],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": [[pieces[left], pieces[right]] for *_, left, right in merges],
        },
    }
    return json.dumps(file, ensure_ascii=False).encode()
