"""Control tokens: which pieces are, where a vocabulary has them, and at which of them generation stops.

    piece                     Gemma 1, 2   Gemma 3
    <pad> <eos> <bos> <unk>   0 1 2 3      0 1 2 3
    <start_of_turn>           106          105
    <end_of_turn>             107          106
    stop ids                  {1, 107}     {1, 106}

CodeGemma gives four unused pieces of Gemma 1 to filling in the middle: <|fim_prefix|> 67, <|fim_middle|> 68,
<|fim_suffix|> 69 and <|file_separator|> 70. All are found by their piece in the vocabulary at hand, never by a model's
name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from gemkit.errors import GemkitError

SPACE = "▁"  # U+2581 stands for the space in every piece
COPY = "\ufdd0\U0010fffe"  # noncharacters behind a piece that repeats an earlier one; no part of the text
START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"

CORE = {"pad": ("<pad>", 0), "eos": ("<eos>", 1), "bos": ("<bos>", 2), "unk": ("<unk>", 3)}
OPTIONAL = {
    "start_of_turn": START_OF_TURN,
    "end_of_turn": END_OF_TURN,
    "fim_prefix": "<|fim_prefix|>",
    "fim_middle": "<|fim_middle|>",
    "fim_suffix": "<|fim_suffix|>",
    "file_separator": "<|file_separator|>",
}
# tokenizer.model and older files call most of these USER_DEFINED or NORMAL.
_CONTROL = re.compile(
    rb"<(pad|eos|bos|unk|mask|2mass|unused\d+|start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token)>"
    rb"|<\|(fim_prefix|fim_middle|fim_suffix|file_separator)\|>|\[@BOS@\]|\[multimodal\]"
)


def is_control_piece(piece: bytes) -> bool:
    """Return whether a piece is a control token of some Gemma, whatever type its file gives it."""
    return piece[:1] in (b"<", b"[") and _CONTROL.fullmatch(piece) is not None


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the control tokens; None where the vocabulary lacks the piece."""

    pad: int
    eos: int
    bos: int
    unk: int
    start_of_turn: int | None = None
    end_of_turn: int | None = None
    fim_prefix: int | None = None
    fim_middle: int | None = None
    fim_suffix: int | None = None
    file_separator: int | None = None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: end of sequence, end of turn, and CodeGemma's four, where they exist."""
        four = (self.fim_prefix, self.fim_middle, self.fim_suffix, self.file_separator)
        return frozenset(token for token in (self.eos, self.end_of_turn, *four) if token is not None)


def find_special(find: Callable[[str], int | None]) -> SpecialTokens:
    """Return the control tokens of a vocabulary; ``find`` gives a piece's id or None.

    Raises GemkitError unless pad, eos, bos and unk have the ids that every Gemma gives them and the turn tokens come in
    a pair, start before end.
    """
    for piece, expected in CORE.values():
        if (found := find(piece)) != expected:
            where = "missing" if found is None else f"at {found}"
            raise GemkitError(f"{piece} is {where}, every Gemma has it at {expected}: this is no Gemma vocabulary")
    ids = {name: expected for name, (_, expected) in CORE.items()} | {name: find(p) for name, p in OPTIONAL.items()}
    start, end = ids["start_of_turn"], ids["end_of_turn"]
    if (start is None) != (end is None) or (start is not None and end != start + 1):
        raise GemkitError(f"{START_OF_TURN} is at {start} and {END_OF_TURN} at {end}: this is no Gemma vocabulary")
    return SpecialTokens(**ids)
