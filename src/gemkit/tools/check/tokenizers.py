"""Rules about a tokenizer's files: whether those that programs choose between say the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from gemkit.errors import GemkitError, listed
from gemkit.text.tokenizer import Tokenizer
from gemkit.tools.check.finding import ERROR, Hit, fault_of, rule
from gemkit.tools.check.folder import read_json
from gemkit.tools.check.subject import HF, Subject, Tokens
from gemkit.weights.folder import TOKENIZERS

# In tokenizer.json only, as published: it has no row in the text models and none in tokenizer.model
_IMAGE = "<image_soft_token>"
_PROBES = (
    "The quick brown fox, inherently different, jumps over 1,234.50 lazy dogs.",
    "  def add(a, b):\n\t\treturn a + b\n\n\n# Größe, naïve, façade",
    "日本語のテキスト、한국어 텍스트, русский текст, नमस्ते, 🙂👩‍👩‍👧",
    "https://example.org/a?b=c&d=e#f  <div class='x'>&nbsp;</div>",
)


@rule(
    "tokenizer-differs",
    ERROR,
    "Two files of the tokenizer contradict each other.",
    why="transformers and gemkit read tokenizer.json, converters and other engines tokenizer.model: the same text "
    "becomes other tokens, and added tokens fall apart",
    remedy="keep the file that the model was tuned with (tokenizer.json, if it was saved last), and delete the other",
)
def tokenizer_differs(s: Subject) -> Iterator[Hit]:
    if s.kind != HF or s.tokens is None:
        return
    listed_ids = _added(s)
    equal = True
    for other in s.neighbours:
        for hit in _pieces(s.tokens, other, set(listed_ids)):
            equal = False
            yield hit
    if equal and s.neighbours and all(name in s.files for name in TOKENIZERS):
        yield from _encodings(s.folder)
    wrong = [
        f"{piece} is {number}, in {s.tokens.where} {s.tokens.ids[piece]}"
        for piece, number in listed_ids.items()
        if s.tokens.ids.get(piece, number) != number
    ]
    wrong += [
        f"{number} is {piece}, in {s.tokens.where} {s.tokens.pieces[number]}"
        for piece, number in listed_ids.items()
        if piece not in s.tokens.ids and number in s.tokens.pieces
    ]
    if wrong:
        yield "tokenizer_config.json: added_tokens_decoder", listed(wrong)
    yield from _names(s)


def _added(s: Subject) -> dict[str, int]:
    """Return the tokens that the settings list, by piece."""
    rows = (s.tokenizer_config or {}).get("added_tokens_decoder")
    found = {}
    for number, row in rows.items() if isinstance(rows, Mapping) else ():
        if isinstance(row, Mapping) and isinstance(row.get("content"), str) and str(number).isdecimal():
            found[row["content"]] = int(number)
    for piece, number in (read_json(s, "added_tokens.json") or {}).items():
        if type(number) is int:
            found.setdefault(piece, number)
    return found


def _pieces(one: Tokens, other: Tokens, listed_pieces: set[str]) -> Iterator[Hit]:
    """Yield the first ids that have different pieces, and pieces that only one of the two has."""
    wrong = [
        f"{number} is {piece!r}, in {one.where} {one.pieces[number]!r}"
        for number, piece in other.pieces.items()
        if number in one.pieces and one.pieces[number] != piece
    ]
    if wrong:
        yield other.where, listed(wrong, 3)
        return
    lacking = [piece for piece, number in one.ids.items() if number >= other.size]
    # Converters add those that tokenizer_config.json lists
    lacking = [piece for piece in lacking if piece != _IMAGE and piece not in listed_pieces]
    if lacking:
        yield other.where, f"it lacks {listed(lacking)}, which {one.where} has"
    more = other.size - one.size
    if more > 0:
        yield other.where, f"it has {more:,} more pieces than {one.where}"


def _encodings(folder: Path) -> Iterator[Hit]:
    """Yield texts that the two files with equal pieces take apart differently: scores and merges."""
    try:
        one, other = (Tokenizer.from_file(folder / name) for name in TOKENIZERS)
    except GemkitError as error:
        yield TOKENIZERS[1], fault_of(folder / TOKENIZERS[1], error)
        return
    for text in _PROBES:
        a, b = (tokenizer.encode(text, bos=False) for tokenizer in (one, other))
        if list(a) != list(b):
            yield TOKENIZERS[1], f"{text[:24]!r} becomes {len(b)} tokens, with {TOKENIZERS[0]} {len(a)} others"
            return


def _names(s: Subject) -> Iterator[Hit]:
    """Read special tokens by name in special_tokens_map.json, which older programs read."""
    mapped = read_json(s, "special_tokens_map.json") or {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        a, b = (_content(source.get(key)) for source in (mapped, s.tokenizer_config or {}))
        if a is not None and b is not None and a != b:
            yield f"special_tokens_map.json: {key}", f"it is {a!r}, and {b!r} in tokenizer_config.json"


def _content(value: object) -> str | None:
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None
