"""The tokens after which generation ends, and other control tokens, as the files of a Hugging Face folder name them.

transformers obeys ``eos_token_id`` of generation_config.json, or of config.json where there is no such file; vLLM and
llama.cpp's converter also ``eos_token`` of tokenizer_config.json (in older folders, of special_tokens_map.json). gemkit
ends after any of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from gemkit.errors import GemkitError
from gemkit.text.special import CORE
from gemkit.weights.folder import top_level
from gemkit.weights.hf.safetensors import shown
from gemkit.weights.hf.tokenizer import find_tokenizer
from gemkit.weights.json_file import read_file, read_object


def stop_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that generation_config.json and the tokenizer's settings name, in this order, each once.

    Ids outside the vocabulary are left out. Raises GemkitError if generation_config.json names what is no id.
    """
    return tuple(
        dict.fromkeys([*_generation(folder / "generation_config.json", vocab_size), *_token(folder, vocab_size)])
    )


def special_tokens(folder: Path) -> dict[str, str]:
    """Return what the tokenizer's settings call bos_token, eos_token and so on, which chat templates write."""
    settings = _settings(folder)
    more = [settings.get(key) for key in ("extra_special_tokens", "model_specific_special_tokens")]
    rows = {key: value for key, value in settings.items() if key.endswith("_token")}
    for found in more:
        rows |= found if isinstance(found, dict) else {}
    return {key: text for key, value in rows.items() if (text := _content(value))}


def _settings(folder: Path) -> dict[str, object]:
    """Read tokenizer_config.json; without a list of added tokens in it, special_tokens_map.json overrides its names."""
    path, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    settings = read_object(path) if os.path.lexists(path) else {}
    if "added_tokens_decoder" not in settings and os.path.lexists(older):
        settings = settings | read_object(older)
    return settings


def _content(token: object) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _generation(path: Path, vocab_size: int) -> list[int]:
    if not os.path.lexists(path):
        return []
    eos = read_object(path).get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if wrong := [token for token in ids if type(token) is not int]:
        raise GemkitError(f"{path}: eos_token_id names {shown(wrong[0])}, which is no id; get the file again")
    return [token for token in ids if 0 <= token < vocab_size]  # others cannot be chosen


def _token(folder: Path, vocab_size: int) -> list[int]:
    """Return the id of ``eos_token``; none if no file names it, or the model has no row for it."""
    settings = _settings(folder)
    eos = _content(settings.get("eos_token"))
    if eos is None:
        return []
    found = _added(settings.get("added_tokens_decoder"), eos)
    if found is None:
        found = next((number for piece, number in CORE.values() if piece == eos), None)
    if found is None:
        found = _vocabulary(folder, eos)
    if found is None:
        found = _whole(folder, eos, vocab_size)
    return [] if found is None or not 0 <= found < vocab_size else [found]


def _added(rows: object, piece: str) -> int | None:
    for number, row in rows.items() if isinstance(rows, dict) else ():
        if isinstance(row, dict) and row.get("content") == piece and number.isdecimal():
            return int(number)
    return None


def _vocabulary(folder: Path, piece: str) -> int | None:
    """Return the id of a token that tokenizer_config.json does not list: newer files have it in the tokenizer's own."""
    path = folder / "tokenizer.json"
    if os.path.lexists(path):
        text = read_file(path).decode("utf-8", "replace")
        try:  # the list of added tokens comes before the vocabulary, which takes long to read
            rows, _ = json.JSONDecoder().raw_decode(text, text.index("[", text.index('"added_tokens"')))
            found = {row["content"]: row["id"] for row in rows}.get(piece)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            found = None
        if type(found) is int:
            return found
    path = folder / "tokenizer.model"
    if not os.path.lexists(path):
        return None
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(read_file(path))
    except RuntimeError:  # said when the vocabulary is read
        return None
    found = model.piece_to_id(piece)
    return found if model.id_to_piece(found) == piece else None


def _whole(folder: Path, piece: str, rows: int) -> int | None:
    """Return the id of a token that other files add, or that is added by name alone, from the complete tokenizer."""
    try:
        tokenizer = find_tokenizer(folder, top_level(folder))
        pieces = tokenizer.vocabulary(rows).pieces if tokenizer else ()
        return pieces.index(piece.encode("utf-8", "surrogatepass"))
    except (GemkitError, OSError, ValueError):  # a broken file is reported when the vocabulary is read
        return None
