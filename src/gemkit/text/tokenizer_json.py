"""tokenizer.json, the tokenizer file of Hugging Face, read as a vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from gemkit.errors import GemkitError
from gemkit.text.added_tokens import AddedToken, with_added
from gemkit.text.special import SPACE, is_control_piece
from gemkit.text.vocabulary import PieceType, Vocabulary

_RUNS = (SPACE, "\n", "\t")
_CHECKED_PIECES = 10_000


def read_tokenizer_json(
    data: bytes,
    choose: Callable[[list[AddedToken]], Iterable[AddedToken]] = list,
    *,
    rebuilt: bool = False,
    rows: int | None = None,
) -> Vocabulary:
    """Return the vocabulary of a Gemma ``tokenizer.json``.

    A score is minus the rank of the first merge that makes the piece; pieces that no merge makes are UNUSED. Added
    tokens are CONTROL if special, else USER_DEFINED. Older exports of Gemma 1 list no tokens but four; in them runs of
    white space and pieces that no merge makes (HTML tags) are USER_DEFINED, as in its ``tokenizer.model``.
    choose: gets the file's added tokens and returns those to add, in their order. rebuilt: the program builds the
    tokenizer from pieces and merges alone, as transformers' own class for Gemma does, and ignores the rest.
    rows: see `with_added`.
    Raises GemkitError for broken data and for a tokenizer that splits text in another way than Gemma's.
    """
    try:
        file = json.loads(data)
        model = file["model"]
        vocab, merges = dict(model["vocab"]), model["merges"]
        added = [AddedToken.from_json(token) for token in file["added_tokens"]]
        wanted = {"byte-pair merges": model.get("type", "BPE") == "BPE"}
        if not rebuilt:
            wanted |= _as_gemma(file, model)
        if missing := [name for name, holds in wanted.items() if not holds]:
            raise GemkitError(f"the tokenizer lacks {', '.join(missing)}: this is no Gemma tokenizer")
        old = "<unused0>" in vocab and all(token.special for token in added)
        return with_added(_vocabulary(vocab, merges, {t.content for t in added}, old), choose(added), rows)
    except GemkitError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise GemkitError(f"this is no tokenizer.json of a Gemma ({error!r:.200}): get the file again") from None


def _as_gemma(file: Mapping[str, object], model: Mapping[str, object]) -> dict[str, bool]:
    """Return whether the parts of the file besides pieces and merges behave as those of a Gemma."""
    spaces, cut = file.get("normalizer") or {}, file.get("pre_tokenizer")
    # Text has no spaces left when it is cut at them
    uncut = cut is None or (cut.get("type"), cut.get("pattern")) == ("Split", {"String": " "})
    wanted = ("Replace", {"String": " "}, SPACE)
    return {
        "byte fallback": bool(model.get("byte_fallback")),
        "merges of whole pieces": not model.get("ignore_merges"),
        "pieces without a mark": not (model.get("end_of_word_suffix") or model.get("continuing_subword_prefix")),
        "spaces kept": tuple(spaces.get(key) for key in ("type", "pattern", "content")) == wanted,
        "text in one piece": uncut,
    }


def _vocabulary(vocab: dict[str, int], merges: list, added: set[str], old: bool) -> Vocabulary:
    """Return the pieces without the added tokens. old: it is an export of Gemma 1 that lists four of them."""
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
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    made = ["".join(pair) for pair in pairs]
    rank = dict(zip(reversed(made), range(len(made) - 1, -1, -1)))
    _check_merges(pairs, rank, vocab, added)

    scores = np.array([-rank.get(piece, len(made)) for piece in pieces], np.float32)
    types = np.full(len(pieces), PieceType.NORMAL, np.int32)
    for number, piece in enumerate(pieces):
        if len(piece) == 6 and piece.startswith("<0x"):
            types[number] = PieceType.BYTE
        elif len(piece) > 1 and piece not in rank:
            types[number] = PieceType.USER_DEFINED if old else PieceType.UNUSED
        elif old and len(piece) > 1 and piece[0] in _RUNS and not piece.strip(piece[0]):
            types[number] = PieceType.USER_DEFINED
    encoded = [piece.encode() for piece in pieces]
    types[[number for number, piece in enumerate(encoded) if is_control_piece(piece)]] = PieceType.CONTROL
    return Vocabulary(encoded, scores, types)


def _check_merges(pairs: list, rank: Mapping[str, int], vocab: Mapping[str, int], added: set[str]) -> None:
    """Raise GemkitError unless any two pieces that make a third may be merged, as the sentencepiece library does.

    Gemma's files list all such pairs; a tokenizer that `tokenizers` trained lists one for each piece.
    """
    long = [piece for piece in rank if len(piece) > 2 and piece not in added]
    known = {(left, right) for left, right in pairs}
    for piece in long[:: max(1, len(long) // _CHECKED_PIECES)]:
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in vocab and right in vocab and (left, right) not in known:
                if (len(left) == 1 or left in rank) and (len(right) == 1 or right in rank):
                    raise GemkitError(
                        f"the tokenizer makes {piece[:60]!a} of some of its parts and not of {left[:60]!a} and "
                        f"{right[:60]!a}; gemkit merges all that make a piece, as Gemma's tokenizers do: take one of "
                        "these"
                    )


def write_tokenizer_json(vocabulary: Vocabulary, bos_id: int = 2) -> bytes:
    """Return the ``tokenizer.json`` of a vocabulary: the same ids as sentencepiece's, one <bos> before each text.

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
