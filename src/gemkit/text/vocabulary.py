"""The pieces of a tokenizer, as a file holds them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class PieceType(IntEnum):
    """Types of pieces; the values are those of sentencepiece and GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # never made from text
    USER_DEFINED = 4  # found in text before all others, longest first
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """V pieces in the order of their ids.

    pieces: UTF-8, a space written as such or as U+2581. scores: float32 [V], the pair with the higher one merges first.
    types: int32 [V], see `PieceType`.
    """

    pieces: list[bytes]
    scores: np.ndarray
    types: np.ndarray

    def __len__(self) -> int:
        return len(self.pieces)
