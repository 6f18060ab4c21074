"""Tokenizer files: sentencepiece's model, tokenizer.json, the cache; broken ones. Budget: 15 s."""

import gzip
import json
import random

import numpy as np
import pytest
from engine.vocabulary import vocabulary as small
from text.fuzz import CONTROL_LITERALS, strings

from gemkit.errors import GemkitError
from gemkit.text.spm_proto import read_model, write_model
from gemkit.text.tokenizer import Tokenizer
from gemkit.text.tokenizer_json import read_tokenizer_json
from gemkit.text.vocabulary import PieceType, Vocabulary


def test_a_written_model_reads_back(gemma):
    v = gemma.vocabulary
    back = read_model(write_model(v))
    assert back.pieces == v.pieces and np.array_equal(back.scores, v.scores)
    unk = v.pieces.index(b"<unk>")
    assert back.types[unk] == PieceType.UNKNOWN
    assert np.array_equal(np.delete(back.types, unk), np.delete(v.types, unk))


def test_files_of_both_kinds(gemma3, tmp_path):
    texts = strings(200, seed=9)
    wanted = [gemma3.tokenizer.encode(text) for text in texts]
    for name, data in (("tokenizer.json", gemma3.data), ("tokenizer.model", write_model(gemma3.vocabulary))):
        (tmp_path / name).write_bytes(data)
        t = Tokenizer.from_file(tmp_path / name)
        assert [t.encode(text) for text in texts] == wanted


def test_a_model_that_marks_control_tokens_as_text_is_patched(gemma3, tmp_path):
    """Google's tokenizer.model has the turn tokens as user-defined pieces; the type is in the last byte of a piece."""
    data = bytearray(write_model(gemma3.vocabulary))
    for name in (b"<start_of_turn>", b"<end_of_turn>", b"<mask>"):
        at = data.index(name) + len(name) + 6
        assert data[at] == PieceType.CONTROL
        data[at] = PieceType.USER_DEFINED
    (tmp_path / "tokenizer.model").write_bytes(data)
    t = Tokenizer.from_file(tmp_path / "tokenizer.model")
    assert not any(map(t.is_control, t.encode("".join(CONTROL_LITERALS), bos=False)))


def test_spaces_in_pieces_count_as_lower_blocks(gemma3):
    v = gemma3.vocabulary
    spaced = [piece.replace("\N{LOWER ONE EIGHTH BLOCK}".encode(), b" ") for piece in v.pieces]
    t = Tokenizer.from_vocabulary(Vocabulary(spaced, v.scores, v.types))
    texts = strings(300, seed=10)
    assert [t.encode(text) for text in texts] == [gemma3.tokenizer.encode(text) for text in texts]


def test_the_cache_saves_the_vocabulary_and_mends_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "new"))
    calls = []

    def make() -> Vocabulary:
        calls.append(1)
        return small()

    wanted = Tokenizer.from_cached("key", make).encode("hello")
    assert Tokenizer.from_cached("key", make).encode("hello") == wanted and len(calls) == 1
    Tokenizer.from_cached("other key", make)
    assert len(calls) == 2
    files = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert len(files) == 2
    whole = {path: path.read_bytes() for path in files}
    rng = random.Random(6)
    for _ in range(20):
        for path, data in whole.items():
            at = rng.randrange(len(data))
            damaged = data[:at] if rng.random() < 0.5 else data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            path.write_bytes(damaged)
        before = len(calls)
        assert Tokenizer.from_cached("key", make).encode("hello") == wanted and len(calls) == before + 1
    assert sum(path.read_bytes() == whole[path] for path in files) >= 1


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "file" / "below"))
    assert Tokenizer.from_vocabulary(small()).encode("a")[0] == 2


def broken_vocabularies():
    v = small()
    yield "piece less", Vocabulary(v.pieces[:-1], v.scores, v.types)
    yield "no pieces", Vocabulary([], v.scores[:0], v.types[:0])
    yield "no <bos>", Vocabulary([b"x" if p == b"<bos>" else p for p in v.pieces], v.scores, v.types)
    yield "twice", Vocabulary([*v.pieces[:-1], v.pieces[20]], v.scores, v.types)
    yield "empty", Vocabulary([*v.pieces[:-1], b""], v.scores, v.types)
    yield "not UTF-8", Vocabulary([*v.pieces[:-1], b"\xff"], v.scores, v.types)
    yield "one byte less", Vocabulary([b"q9" if p == b"<0x41>" else p for p in v.pieces], v.scores, v.types)


@pytest.mark.parametrize("vocabulary", [pytest.param(v, id=name) for name, v in broken_vocabularies()])
def test_broken_vocabularies(vocabulary: Vocabulary):
    with pytest.raises(GemkitError) as error:
        Tokenizer.from_vocabulary(vocabulary)
    assert "\n" not in str(error.value)


def test_damaged_models_give_an_error_or_a_vocabulary():
    data, rng, errors = write_model(small()), random.Random(11), 0
    for number in range(1500):
        at = rng.randrange(len(data))
        damaged = data[:at] if number % 2 else data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        try:
            read_model(damaged)
        except GemkitError as error:
            assert "\n" not in str(error)
            errors += 1
    assert errors > 500


def test_files_that_are_no_tokenizer(tmp_path):
    cases = [b"", b"{}", b"[1]", b"{", b"hello", gzip.compress(b"x"), b"\xff" * 100]
    cases.append(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}).encode())
    for data in cases:
        (tmp_path / "tokenizer.json").write_bytes(data)
        with pytest.raises(GemkitError) as error:
            Tokenizer.from_file(tmp_path / "tokenizer.json")
        assert "\n" not in str(error.value) and "tokenizer.json" in str(error.value)
    with pytest.raises(GemkitError, match="cannot read"):
        Tokenizer.from_file(tmp_path / "absent.model")


def test_merges_written_as_strings_or_pairs_are_the_same():
    base = {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\N{LOWER ONE EIGHTH BLOCK}"},
        "added_tokens": [],
        "model": {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0, "b": 1, "ab": 2, "abb": 3}},
    }
    for merges in (["ab b", "a b"], [["ab", "b"], ["a", "b"]]):
        v = read_tokenizer_json(json.dumps(base | {"model": base["model"] | {"merges": merges}}).encode())
        assert v.scores.tolist() == [-2, -2, -1, 0] and v.pieces == [b"a", b"b", b"ab", b"abb"]
