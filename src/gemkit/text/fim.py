"""Filling in the middle, as CodeGemma was trained to:

    <bos><|fim_prefix|>text before the cursor<|fim_suffix|>text after it<|fim_middle|>

The answer goes between the two; it ends at a stop id or at one of these tokens or <|file_separator|>. There is no white
space between the tokens and the texts. Source: Google's page on CodeGemma's formatting.
"""

from __future__ import annotations

from gemkit.errors import GemkitError
from gemkit.text.tokenizer import Tokenizer


def render(tokenizer: Tokenizer, prefix: str, suffix: str, parse_special: bool = False) -> list[int]:
    """Return the ids of a text with a gap; either part may be empty.

    parse_special: read the names of control tokens in both as those tokens, such as <|file_separator|>.
    Raises GemkitError if the vocabulary has no such tokens.
    """
    special = tokenizer.special
    if special.fim_prefix is None or special.fim_suffix is None or special.fim_middle is None:
        raise GemkitError("this model cannot fill in the middle: use CodeGemma, such as codegemma-2b")
    before, after = (tokenizer.encode(text, False, parse_special) for text in (prefix, suffix))
    before = tokenizer.with_bos(before)[1:]  # a BOS of the text's own is the one in front
    return [tokenizer.bos_id, special.fim_prefix, *before, special.fim_suffix, *after, special.fim_middle]
