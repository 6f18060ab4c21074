"""Text that must not become control tokens, marked before a chat template mixes it with text that may.

In every string of the messages, the first character of a control token's name is replaced by a character of Unicode's
private use that occurs nowhere else. What a template makes of such strings has no such name any more, whether it
trims, splits or searches them; then the characters are put back, and the text between control tokens is plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from gemkit.errors import GemkitError
from gemkit.text.control import ControlNames
from gemkit.text.special import is_control_piece
from gemkit.text.tokenizer import Tokenizer

# Control tokens wherever a template writes them, and possible control tokens.
_CERTAIN = re.compile(r"<\|[^<>|\s]{1,64}\|>")
_POSSIBLE = re.compile(r"[<\[][^<>\[\]\s]{1,64}[>\]]")
_BRACKETS = frozenset("<>[]|&;")  # without them no name can be put together, HTML's escapes included
_PRIVATE = range(0xE000, 0xF900)
_MISSING = -1


class Marks:
    """Placeholder characters, none of which occurs in the texts."""

    def __init__(self, texts: Iterable[str]) -> None:
        used = set().union(*texts)
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        self._by_character: dict[str, str] = {}
        self.characters: dict[int, str] = {}

    def of(self, character: str) -> str:
        mark = self._by_character.get(character)
        if mark is None:
            mark = self._by_character[character] = self.new()
            self.characters[ord(mark)] = character
        return mark

    def new(self) -> str:
        """Return an unused character that occurs in none of the texts."""
        try:
            return next(self._free)
        except StopIteration:
            raise GemkitError("the messages use every character of private use: remove some of them") from None


class ControlTokens:
    """The control tokens that a template's own text may name, and how text between them is encoded.

    They are the vocabulary's, and whole pieces in brackets that the template names though they are words there.
    A control token that the vocabulary lacks is plain text, as in transformers and llama.cpp. texts: the strings of the
    template and of its variables.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        written = {name for text in texts for shape in (_POSSIBLE, _CERTAIN) for name in shape.findall(text)}
        found = {name: tokenizer.find(name) for name in written}
        ids = tokenizer.control_names | {name: token for name, token in found.items() if token is not None}
        absent = {name for name, token in found.items() if token is None}
        missing = {name for name in absent if _CERTAIN.fullmatch(name) or is_control_piece(name.encode())}
        self._names = ControlNames(ids)
        self._marked = ControlNames(ids | dict.fromkeys(missing, _MISSING))

    def marked(self, value: Any, marks: Marks, brackets: bool = False) -> Any:
        """Return a copy of plain data, its strings marked where they name control tokens.

        brackets: mark every bracket instead, so that no change of the text can make a name either.
        """
        if isinstance(value, dict):
            return {self._key(key, marks): self._value(key, item, marks, brackets) for key, item in value.items()}
        if isinstance(value, list):
            return [self.marked(item, marks, brackets) for item in value]
        return self._mark(value, marks, brackets) if isinstance(value, str) else value

    def _key(self, key: str, marks: Marks) -> str:
        # Templates look values up by their keys, and compare roles: a word stays, whatever a vocabulary calls control
        return key if _BRACKETS.isdisjoint(key) else self._mark(key, marks, False)

    def _value(self, key: str, item: Any, marks: Marks, brackets: bool) -> Any:
        if key == "role" and isinstance(item, str) and _BRACKETS.isdisjoint(item):
            return item
        return self.marked(item, marks, brackets)

    def _mark(self, text: str, marks: Marks, brackets: bool) -> str:
        if brackets:
            return "".join(marks.of(character) if character in _BRACKETS else character for character in text)
        while starts := [start for start, _, _ in self._marked.find(text)]:
            text = _marked_at(text, starts, marks)
        return _marked_at(text, [found.start() for found in _CERTAIN.finditer(text)], marks)

    def tokens(self, text: str) -> list[int]:
        """Return the control tokens of a rendered text, in order."""
        return [token for _, _, token in self._names.find(text)]

    def encode(self, text: str, marks: Marks) -> list[int]:
        """Return the ids of a rendered text, with the marked characters put back."""
        ids: list[int] = []
        end = 0
        for start, stop, token in self._names.find(text):
            ids += [*self._encode(text[end:start], marks), token]
            end = stop
        return ids + self._encode(text[end:], marks)

    def missing(self, text: str) -> list[str]:
        """Return the names in a rendered text that look like control tokens and are none in this vocabulary."""
        names = [text[start:stop] for start, stop, token in self._marked.find(text) if token == _MISSING]
        names += [name for name in _CERTAIN.findall(text) if self._tokenizer.find(name) is None]
        return list(dict.fromkeys(names))

    def _encode(self, text: str, marks: Marks) -> list[int]:
        """Return the ids of text without names that were known beforehand; a template may build others of parts."""
        ids: list[int] = []
        end = 0
        for found in _CERTAIN.finditer(text):
            token = self._tokenizer.find(found[0])
            if token is not None:
                ids += [*self._encode_plain(text[end : found.start()], marks), token]
                end = found.end()
        return ids + self._encode_plain(text[end:], marks)

    def _encode_plain(self, text: str, marks: Marks) -> list[int]:
        # Plain text makes a word that is in brackets: where a message names one, it is cut after its first character
        plain = text.translate(marks.characters)
        cuts = [0]
        for at, character in enumerate(text):
            if ord(character) in marks.characters and self._is_word(plain, at):
                cuts.append(at + 1)
        parts = [plain[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(plain)])]
        return [token for part in parts for token in self._tokenizer.encode(part, bos=False)]

    def _is_word(self, text: str, at: int) -> bool:
        named = _POSSIBLE.match(text, at)
        token = self._tokenizer.find(named[0]) if named else None
        return token is not None and not self._tokenizer.is_control(token)


def _marked_at(text: str, starts: list[int], marks: Marks) -> str:
    parts, end = [], 0
    for start in starts:
        parts += [text[end:start], marks.of(text[start])]
        end = start + 1
    return "".join([*parts, text[end:]])
