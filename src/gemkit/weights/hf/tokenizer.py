"""The tokenizer of a Hugging Face folder, as transformers 5 puts it together from its files. See `find_tokenizer`.

``tokenizer.json`` has the pieces, or else ``tokenizer.model``. Tokens are added in this order: those by number, which
``tokenizer_config.json`` has, or without such a list there ``added_tokens.json`` and ``tokenizer.json``; the tokens
with a name (``bos_token`` …); the extra ones. Source: transformers, ``tokenization_utils_base.py`` (_from_pretrained),
``tokenization_utils_tokenizers.py`` and ``models/gemma/tokenization_gemma.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gemkit.errors import GemkitError
from gemkit.text.added_tokens import AddedToken, with_added
from gemkit.text.vocabulary import PieceType, Vocabulary
from gemkit.weights.folder import TOKENIZER_SETTINGS, tokenizer
from gemkit.weights.hf.safetensors import shown
from gemkit.weights.json_file import read_file, read_object

# To be changed whenever other tokens come of the same files.
_KEY = b"gemkit Hugging Face tokenizer 2\n"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Of transformers' class for Gemma
_DEFAULTS = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_OWN_CLASSES = (None, "GemmaTokenizer", "GemmaTokenizerFast")


@dataclass(frozen=True)
class TokenizerFiles:
    """A folder's tokenizer. path: the file with the pieces. others: those of its settings that exist."""

    path: Path
    others: tuple[Path, ...] = ()

    def key(self, rows: int) -> str:
        """Return the SHA-256 of all files and the rows of the embedding: equal keys, equal tokenizers."""
        digest = hashlib.sha256(_KEY + f"{rows}\n".encode())
        for path in (self.path, *self.others):
            digest.update(f"{path.name}\n".encode() + hashlib.sha256(read_file(path)).digest())
        return digest.hexdigest()

    def vocabulary(self, rows: int) -> Vocabulary:
        """Return the pieces. rows: of the embedding, which may be more: the last ones are then unused.

        Raises GemkitError if a file is broken, or if text can give a token that has no row.
        """
        settings = {path.name: read_object(path) for path in self.others}
        plan = _Plan(self.path, *(settings.get(name, {}) for name in TOKENIZER_SETTINGS))
        try:
            vocabulary = self._read(plan, rows)
        except GemkitError as error:
            raise (
                error if str(error).startswith(str(self.path.parent)) else GemkitError(f"{self.path}: {error}")
            ) from None
        # <image_soft_token> has no row in Gemma 3's text models; text never makes a control token
        pieces, types = vocabulary.pieces, vocabulary.types
        if beyond := [i for i in range(rows, len(pieces)) if types[i] != PieceType.CONTROL]:
            raise GemkitError(
                f"{self.path}: piece {beyond[0]} {shown(pieces[beyond[0]])} has no row in an embedding of {rows}: "
                "get the tokenizer of this model"
            )
        return vocabulary

    def _read(self, plan: _Plan, rows: int) -> Vocabulary:
        data = read_file(self.path)
        if self.path.name == "tokenizer.json":
            from gemkit.text.tokenizer_json import read_tokenizer_json

            return read_tokenizer_json(data, plan.tokens, rebuilt=plan.own_class, rows=rows)
        from gemkit.text.spm_proto import read_model

        base = read_model(data)
        if not plan.own_class:
            base = _renamed(base, plan.by_number([]))
        return with_added(base, plan.tokens([]), rows)


def find_tokenizer(folder: Path, names: Iterable[str]) -> TokenizerFiles | None:
    """Return the tokenizer among the files of a folder; None if it has none. No file is read."""
    names = set(names)
    found = tokenizer(names)
    if found is None:
        return None
    return TokenizerFiles(folder / found, tuple(folder / name for name in TOKENIZER_SETTINGS if name in names))


class _Plan:
    """Tokens to add, in order."""

    def __init__(
        self, path: Path, config: Mapping[str, object], special_map: Mapping[str, object], added: Mapping[str, object]
    ) -> None:
        self._path, self._added = path, added
        self._listed = config.get("added_tokens_decoder")
        name = config.get("tokenizer_class")
        self.own_class = name in _OWN_CLASSES
        settings = dict(config)
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
        if "added_tokens_decoder" not in config:  # its list replaces the older file
            settings |= special_map
            extra = settings.get("extra_special_tokens") or extra or settings.get("additional_special_tokens")
        self._settings = settings
        self._extra = extra if isinstance(extra, list) else []
        self._model_specific = extra if isinstance(extra, Mapping) else {}

    def tokens(self, of_file: list[AddedToken]) -> list[AddedToken]:
        """Return all tokens to add. of_file: those that ``tokenizer.json`` lists."""
        named = {key: token for key, value in self._names().items() if (token := self._token(value))}
        names = {token.content for token in named.values()}
        by_number = self.by_number(of_file)
        first = by_number if self.own_class else [*of_file, *(t for t in by_number if t not in of_file)]
        found = [token.as_special() if token.content in names else token for token in first]
        seen = {token.content for token in found}
        extra = [token for value in self._extra if (token := self._token(value))]
        for token in [*named.values(), *extra]:
            if token.content not in seen:
                seen.add(token.content)
                found.append(token.as_special() if token.content in names else token)
        return found

    def by_number(self, of_file: list[AddedToken]) -> list[AddedToken]:
        """Return the tokens that have an id in the files, in the order of the ids."""
        found: dict[int, AddedToken] = {}
        if self._listed is not None:
            where = "tokenizer_config.json", "added_tokens_decoder"
            rows = self._listed
        else:
            where = "added_tokens.json", "list of tokens"
            rows = self._old_list()
        try:
            for key, row in rows.items():
                found[int(key)] = AddedToken.from_json(row, int(key))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise GemkitError(
                f"{self._path.with_name(where[0])}: its {where[1]} is broken; get the file again"
            ) from None
        if self._listed is None:
            found |= {token.number: token for token in of_file if type(token.number) is int}
        return [found[number] for number in sorted(found)]

    def _old_list(self) -> dict[int, dict[str, object]]:
        """Read ``added_tokens.json``, ids by text; the other files define which are special."""
        values = [self._settings.get(key) for key in _NAMED] + self._extra
        special = {token.content for value in values if (token := self._token(value))}
        return {number: {"content": content, "special": content in special} for content, number in self._added.items()}

    def _names(self) -> dict[str, object]:
        """Return the tokens with a name: the usual ones in their order, then the model's own."""
        defaults = _DEFAULTS if self.own_class else {}
        defaults = {key: AddedToken(content, True, implied=True) for key, content in defaults.items()}
        found = {key: self._settings.get(key, defaults.get(key)) for key in _NAMED}
        own = {
            key: value
            for key, value in self._settings.items()
            if key.endswith("_token") and key not in _NAMED and isinstance(value, str)
        }
        return {key: value for key, value in (found | own | dict(self._model_specific)).items() if value is not None}

    def _token(self, value: object) -> AddedToken | None:
        """Return a token as text or as an object; None for anything else, which other programs may have put there."""
        if isinstance(value, AddedToken):
            return value
        if isinstance(value, str):
            return AddedToken(value, True) if value else None
        if isinstance(value, Mapping):
            try:
                return AddedToken.from_json(value, special=True)
            except (KeyError, TypeError, ValueError):
                return None
        return None


def _renamed(vocabulary: Vocabulary, tokens: list[AddedToken]) -> Vocabulary:
    """Give pieces the texts of the tokens with their ids, unless another piece has that text."""
    pieces = list(vocabulary.pieces)
    changed = {token.number: token.content.encode("utf-8", "surrogatepass") for token in tokens}
    kept = {piece for number, piece in enumerate(pieces) if number not in changed}
    for number, piece in changed.items():
        if 0 <= number < len(pieces) and piece not in kept:
            pieces[number] = piece
    return Vocabulary(pieces, vocabulary.scores, vocabulary.types)
