"""Tokenizer: text to ids and back, with the sentencepiece library.

Its model is written from a vocabulary, whichever file that came in, and kept in the cache folder under a checksum: a
second start reads one file and never builds the list of pieces. That start imports neither NumPy nor the readers of
vocabularies, so that it can begin before they are loaded.
"""

from __future__ import annotations

import codecs
import hashlib
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import sentencepiece

from gemkit.cache import cache_dir, try_atomic_write
from gemkit.errors import GemkitError, brief
from gemkit.text.control import SHAPE, ControlNames
from gemkit.text.special import COPY, SPACE, find_special

if TYPE_CHECKING:
    from gemkit.text.vocabulary import Vocabulary

# To be changed whenever the model written from the same vocabulary changes.
_CACHE_FORMAT = b"gemkit tokenizer 2\n"
# Byte order marks, with which JSON may start.
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Template(Protocol):
    """A chat template, as in `gemkit.text.chat_template`. is_own: it renders other turns than Google's."""

    is_own: bool

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]: ...


class Tokenizer:
    """Splits text into the pieces of one vocabulary.

    special: ids of the control tokens. stop_ids: those that end an answer. vocab_size: number of pieces, V.
    template: the chat template of the model that it belongs to, which sets it.
    Its methods may be called from several threads.

    >>> tokenizer = Tokenizer.from_file("tokenizer.model")  # doctest: +SKIP
    >>> tokenizer.decode(tokenizer.encode("Hello")) == "Hello"  # doctest: +SKIP
    True
    """

    def __init__(self, model: bytes) -> None:
        """Take a model that `spm_proto.write_model` wrote; the classmethods are the usual way in."""
        if not isinstance(model, bytes):
            raise GemkitError(f"a tokenizer's model is {brief(model)}: read a file with Tokenizer.from_file")
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise GemkitError(f"sentencepiece refuses the vocabulary, get the file again: {reason}") from None
        self.template: Template | None = None
        self.vocab_size: int = self._model.get_piece_size()
        self.special = find_special(self.find)
        self.stop_ids = self.special.stop_ids
        self.pad_id, self.eos_id = self.special.pad, self.special.eos
        self.bos_id, self.unk_id = self.special.bos, self.special.unk
        self.start_of_turn_id = self.special.start_of_turn
        self.end_of_turn_id = self.special.end_of_turn
        self._bytes = {self._model.piece_to_id(f"<0x{byte:02X}>"): bytes([byte]) for byte in range(256)}

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> Tokenizer:
        """Raise GemkitError if the vocabulary is broken or not that of a Gemma model."""
        import numpy as np

        digest = hashlib.sha256()
        for part in (
            np.fromiter(map(len, vocabulary.pieces), np.int64, len(vocabulary.pieces)),
            np.asarray(vocabulary.scores, np.float32),
            np.asarray(vocabulary.types, np.int32),
        ):
            digest.update(len(part).to_bytes(8, "little") + part.tobytes())
        digest.update(b"".join(vocabulary.pieces))
        return cls.from_cached(f"vocabulary {digest.hexdigest()}", lambda: vocabulary)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a ``tokenizer.model`` or a ``tokenizer.json``. Raises GemkitError if it cannot."""
        if not isinstance(path, str | os.PathLike):
            raise GemkitError(f"a tokenizer's file is {brief(path)}: give its path")
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise GemkitError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from None
        from gemkit.text.spm_proto import read_model
        from gemkit.text.tokenizer_json import read_tokenizer_json

        # A model starts with the key of its first piece, 0x0A, which JSON may have as white space.
        is_json = data.startswith(_MARKS) or data[:64].lstrip()[:1] == b"{"
        read = read_tokenizer_json if is_json else read_model
        try:
            return cls.from_cached(f"file {hashlib.sha256(data).hexdigest()}", lambda: read(data))
        except GemkitError as error:
            raise GemkitError(f"{os.fspath(path)}: {error}") from None

    @classmethod
    def from_cached(cls, key: str, make: Callable[[], Vocabulary]) -> Tokenizer:
        """Load the tokenizer kept under ``key``; if there is none, ask ``make`` for the vocabulary and keep it.

        key: anything that changes whenever the vocabulary does, such as the checksum of the bytes it is read from.
        A cache that cannot be read or written only costs time.
        Raises GemkitError if the vocabulary is broken or no Gemma's.
        """
        if (tokenizer := cls.find_cached(key)) is not None:
            return tokenizer
        vocabulary = make()
        from gemkit.text.spm_proto import write_model

        model = write_model(vocabulary)
        tokenizer = cls(model)
        if (path := _cached(key)) is not None:
            try_atomic_write(path, _CACHE_FORMAT + hashlib.sha256(model).digest() + model)
        return tokenizer

    @classmethod
    def find_cached(cls, key: str) -> Tokenizer | None:
        """Load the tokenizer kept under ``key``; None if there is none or it is damaged."""
        path = _cached(key)
        model = None if path is None else _read_cached(path)
        return None if model is None else cls(model)

    def encode(self, text: str, bos: bool = True, parse_special: bool = False) -> list[int]:
        """Return the ids of a text, after exactly one BOS.

        Plain text gives no control token: "<bos>" or "<start_of_turn>" in it are split like any other word. U+2581
        counts as a space, as sentencepiece has it, and is decoded as one.
        parse_special: the names of control tokens become those tokens, as in a prompt that a chat template rendered;
        a BOS at its start is then the one.
        Raises GemkitError for what is no Unicode.
        """
        _check_text(text)
        if not parse_special:
            ids = self._model.encode(text)
            return [self.bos_id, *ids] if bos else ids
        ids = []
        for part in self._control.split(text):
            ids += [part] if isinstance(part, int) else self._model.encode(part)
        return self.with_bos(ids) if bos else ids

    def find_control(self, text: str) -> list[str]:
        """Return the names of control tokens, in angle or square brackets, that a text holds, each once."""
        _check_text(text)
        return [name for name in dict.fromkeys(SHAPE.findall(text)) if self._is_control_name(name)]

    def _is_control_name(self, name: str) -> bool:
        token = self.find(name)
        return token is not None and self.is_control(token)

    @cached_property
    def control_names(self) -> dict[str, int]:
        """The ids of the control tokens by name, as text has them."""
        ids = range(self.vocab_size)
        control = [token for token, found in zip(ids, self._model.is_control(list(ids))) if found]
        control.append(self.unk_id)
        return {piece.replace(SPACE, " "): token for piece, token in zip(self._model.id_to_piece(control), control)}

    @cached_property
    def _control(self) -> ControlNames:
        return ControlNames(self.control_names)

    def with_bos(self, ids: Iterable[int]) -> list[int]:
        """Return the ids after exactly one BOS, however many they had in front."""
        ids = _whole(ids)
        start = next((at for at, token in enumerate(ids) if token != self.bos_id), len(ids))
        return [self.bos_id, *ids[start:]]

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """Return the text of the ids, without control tokens unless told otherwise.

        Bytes that are no UTF-8 become U+FFFD. Raises GemkitError for an id outside the vocabulary.
        """
        return b"".join([self.token_bytes(token, skip_control) for token in _whole(ids)]).decode("utf-8", "replace")

    def token_bytes(self, token: int, skip_control: bool = True) -> bytes:
        """Return what one token adds to the text, in UTF-8: a part of a character for a byte token."""
        try:
            token = operator.index(token)
        except TypeError:
            raise GemkitError(f"{brief(token)} is no token id: give a whole number") from None
        if (byte := self._bytes.get(token)) is not None:
            return byte
        piece = self.id_to_piece(token).replace(COPY, "")
        if self.is_control(token):
            return b"" if skip_control else piece.encode()
        return piece.replace(SPACE, " ").encode()

    def id_to_piece(self, token: int) -> str:
        """Return a piece as the vocabulary has it, U+2581 for a space. Raises GemkitError for an id outside it."""
        try:
            return self._model.id_to_piece(operator.index(token))
        except (IndexError, OverflowError, TypeError):
            raise GemkitError(f"id {brief(token)} is not in the vocabulary of {self.vocab_size} pieces") from None

    def piece_to_id(self, piece: str) -> int:
        """Return the id of a whole piece, control tokens included. Raises GemkitError if there is none."""
        found = self.find(piece)
        if found is None:
            raise GemkitError(f"the vocabulary has no piece {brief(piece)}")
        return found

    def is_control(self, token: int) -> bool:
        """Return whether a token, <unk> among them, has no text. Raises GemkitError for an id outside."""
        try:
            return self._model.is_control(operator.index(token)) or token == self.unk_id
        except (IndexError, OverflowError, TypeError):
            raise GemkitError(f"id {brief(token)} is not in the vocabulary of {self.vocab_size} pieces") from None

    def find(self, piece: str) -> int | None:
        """Return the id of a whole piece, control tokens included, or None."""
        try:
            found = self._model.piece_to_id(piece)
        except (RuntimeError, TypeError):  # not Unicode
            return None
        # It answers with the id of <unk>, or −1, where there is none.
        return found if found >= 0 and self._model.id_to_piece(found) == piece else None


def _whole(ids: object) -> list[int]:
    try:
        if isinstance(ids, str | bytes):
            raise TypeError
        return [operator.index(token) for token in ids]
    except TypeError:
        raise GemkitError(f"ids are {brief(ids)}: give a list of whole numbers") from None


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise GemkitError(f"cannot encode {type(text).__name__}: give a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise GemkitError(
            f"character {error.start} of the text is half a surrogate pair (U+{code:04X}): read it again as UTF-8"
        ) from None


def _cached(key: str) -> Path | None:
    name = hashlib.sha256(_CACHE_FORMAT + key.encode()).hexdigest()
    try:
        return cache_dir() / "tokenizers" / f"{name}.bin"
    except GemkitError:
        return None


def _read_cached(path: Path) -> bytes | None:
    """Return the model kept at ``path``, or None if there is none or it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    start = len(_CACHE_FORMAT) + 32
    model = data[start:]
    intact = data[:start] == _CACHE_FORMAT + hashlib.sha256(model).digest()
    return model if intact else None
