"""The vocabularies of Gemma 1, 2 and 3, and the `tokenizers` library on the same files."""

import functools
import gzip
import json

import numpy as np
import pytest
import tokenizers
from testdata import data_file

from gemkit.text.tokenizer import Tokenizer
from gemkit.text.tokenizer_json import read_tokenizer_json
from gemkit.text.vocabulary import PieceType


class Gemma:
    def __init__(self, **parts):
        self.__dict__.update(parts)

    def __repr__(self) -> str:  # pytest shows it when a test fails
        return self.name


GENERATIONS = ["gemma", "gemma2", "gemma3"]


def oracle(text: str, listed: dict[int, bool], vocabulary, with_control: bool) -> tokenizers.Tokenizer:
    """`tokenizers` on a tokenizer.json whose added tokens are the user-defined pieces, and the control tokens if asked.

    text: the file with "ADDED" for the added tokens. listed: which of those the file lists are special.
    The export of Gemma 1 adds four tokens only; the other user-defined pieces of its tokenizer.model are added here.
    """
    kinds = {int(PieceType.USER_DEFINED)} | (
        {int(PieceType.CONTROL), int(PieceType.UNKNOWN)} if with_control else set()
    )
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    chosen = [int(i) for i in np.flatnonzero(np.isin(vocabulary.types, list(kinds)))]
    added = [
        {"id": i, "content": vocabulary.pieces[i].decode(), "special": listed.get(i, False), **flags} for i in chosen
    ]
    return tokenizers.Tokenizer.from_str(text.replace('"ADDED"', json.dumps(added), 1))


@functools.cache
def _made(name: str) -> Gemma:
    path = data_file("tokenizers", f"{name}.tokenizer.json.gz")
    data = gzip.decompress(path.read_bytes())
    vocabulary = read_tokenizer_json(data)
    text = data.decode()
    start = text.index("[", text.index('"added_tokens"'))
    added, end = json.JSONDecoder().raw_decode(text, start)
    listed = {token["id"]: token["special"] for token in added}
    text = text[:start] + '"ADDED"' + text[end:]
    return Gemma(
        name=name,
        data=data,
        added=added,
        vocabulary=vocabulary,
        tokenizer=Tokenizer.from_vocabulary(vocabulary),
        plain=oracle(text, listed, vocabulary, with_control=False),
        templated=oracle(text, listed, vocabulary, with_control=True),
    )


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Tests neither read nor fill the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMKIT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", params=GENERATIONS)
def gemma(request, cache_folder) -> Gemma:
    """name, data (tokenizer.json), added tokens, vocabulary, tokenizer; oracles: plain, templated (control tokens)."""
    return _made(request.param)


@pytest.fixture(scope="session")
def gemma3(cache_folder) -> Gemma:
    return _made("gemma3")
