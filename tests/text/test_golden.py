"""Ids of prose, code and a vocabulary's own pieces against the `tokenizers` library. Budget: 15 s."""

import re

import numpy as np
import pytest
from text.texts import strings

from gemkit.text.vocabulary import PieceType

COUNT = 2500
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
LONG_RUN = re.compile(f"[ {SPACE}]{{32}}")


@pytest.fixture
def own_pieces(gemma) -> list[str]:
    """Pieces that text may hold, with spaces for U+2581: a part, since all take seconds."""
    v = gemma.vocabulary
    kinds = np.isin(v.types, (PieceType.NORMAL, PieceType.USER_DEFINED))
    chosen = np.random.default_rng(0).choice(np.flatnonzero(kinds), 30_000, replace=False)
    return [v.pieces[at].decode().replace(SPACE, " ") for at in chosen]


def usual(gemma, texts: list[str]) -> list[str]:
    """Without runs of more than 31 spaces for Gemma 1, whose export merges them in another way than Gemma 2's."""
    left = [text for text in texts if gemma.name != "gemma" or not LONG_RUN.search(text)]
    assert len(left) >= 2000
    return left


def test_every_script_and_piece(gemma, own_pieces):
    for text in usual(gemma, strings(COUNT, 1, own_pieces)):
        ids = gemma.tokenizer.encode(text)
        assert ids == [2, *gemma.plain.encode(text, add_special_tokens=False).ids], text
        assert gemma.tokenizer.decode(ids) == text


def test_u2581_is_a_space_wherever_it_stands(gemma, own_pieces):
    """Sentencepiece takes the sign for a space; `tokenizers` does so too, but for runs of it.

    It finds those as added tokens before it turns spaces into the sign, so they never join adjacent spaces.
    """
    differ = 0
    texts = usual(gemma, strings(COUNT, 4, own_pieces, block=True))
    for text in texts:
        spaces = text.replace(SPACE, " ")
        ids = gemma.tokenizer.encode(text, bos=False)
        assert ids == gemma.tokenizer.encode(spaces, bos=False)
        assert ids == gemma.plain.encode(spaces, add_special_tokens=False).ids, text
        if ids != gemma.plain.encode(text, add_special_tokens=False).ids:
            differ += 1
            assert SPACE * 2 in text, text
    assert 0 < differ < len(texts) / 4
