"""A vocabulary of 300 pieces: letters, digits, every byte, and Gemma's control tokens at Gemma 1's ids."""

import functools
import string

import numpy as np

from gemkit.text.tokenizer import Tokenizer
from gemkit.text.vocabulary import Vocabulary

STOP = frozenset({1, 107})
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


@functools.cache
def vocabulary() -> Vocabulary:
    letters = [*string.ascii_lowercase, *string.digits, "▁", "\n"]
    pieces = [(letter, NORMAL) for letter in letters] + [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    pieces = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN), *pieces]
    pieces[106:106] = [("<start_of_turn>", CONTROL), ("<end_of_turn>", CONTROL)]
    return Vocabulary(
        pieces=[piece.encode() for piece, _ in pieces],
        scores=np.arange(0, -len(pieces), -1, dtype=np.float32),
        types=np.array([kind for _, kind in pieces], np.int32),
    )


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_vocabulary(vocabulary())
