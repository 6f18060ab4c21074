"""Ids against the `tokenizers` library for Gemma 1, 2 and 3; control tokens stay out of text. Budget: 40 s."""

import random
import re

import numpy as np
import pytest
from text.fuzz import CONTROL_LITERALS, strings

from gemkit.errors import GemkitError
from gemkit.text.tokenizer import Tokenizer
from gemkit.text.vocabulary import PieceType

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
STRINGS = strings(2500, seed=1)


def usual(gemma, texts: list[str]) -> list[str]:
    """Cuts runs of spaces for Gemma 1.

    Its export merges runs of more than 31 pairwise; tokenizer.model, as the export of Gemma 2 with the same pieces,
    takes 31 at a time. `test_long_runs` has those.
    """
    return [re.sub(" {32,}", " " * 31, text) for text in texts] if gemma.name == "gemma" else texts


def test_plain_text_gives_the_ids_of_tokenizers(gemma):
    texts = usual(gemma, STRINGS)
    wanted = [encoding.ids for encoding in gemma.plain.encode_batch(texts, add_special_tokens=False)]
    wrong = [(t, w) for t, w in zip(texts, wanted) if gemma.tokenizer.encode(t, bos=False) != w]
    assert not wrong, (len(wrong), wrong[:3])
    assert sum(map(len, wanted)) > 40_000 and len(set(texts)) > 2000


def test_long_runs(gemma):
    t = gemma.tokenizer
    for letter, piece in ((" ", SPACE), ("\n", "\n"), ("\t", "\t")):
        # Gemma has runs of up to 31; a lone tab is a byte in Gemma 1 and 2.
        for count in range(2, 100):
            sizes = [31] * (count // 31) + [count % 31] * (count % 31 > 0)
            ids = t.encode(letter * count, bos=False)
            assert [len(t.decode([i])) for i in ids] == sizes, (letter, count)
            assert all(t.id_to_piece(i) == piece * n for i, n in zip(ids, sizes) if n > 1)


def test_decoding_gives_the_text_back(gemma):
    for text in STRINGS:
        ids = gemma.tokenizer.encode(text)
        assert gemma.tokenizer.decode(ids) == text
        assert not any(map(gemma.tokenizer.is_control, ids[1:]))


def test_a_lower_block_in_text_is_a_space_and_alone_has_the_ids_of_tokenizers(gemma):
    """Next to another or to a space, `tokenizers` finds runs only where they are written with U+2581 alone."""
    for text in (f"a{SPACE}b", f"{SPACE}hello", f"x{SPACE}", f"one{SPACE}two three{SPACE}four"):
        ids = gemma.tokenizer.encode(text, bos=False)
        assert ids == gemma.plain.encode(text, add_special_tokens=False).ids
        assert gemma.tokenizer.decode(ids) == text.replace(SPACE, " ")


@pytest.mark.parametrize("template", ["{}", "a{}b", "{}\n", " {} ", "{}{}"])
def test_no_text_gives_a_control_token(gemma, template: str):
    t = gemma.tokenizer
    names = {*CONTROL_LITERALS, *(token["content"] for token in gemma.added if token["special"])}
    names |= {t.id_to_piece(i) for i in range(300) if t.is_control(i)}
    for name in names:
        ids = t.encode(template.replace("{}", name))
        assert ids[0] == t.bos_id and not any(map(t.is_control, ids[1:])), name
        assert t.decode(ids) == template.replace("{}", name)


def test_the_name_of_every_control_token_is_text(gemma):
    t = gemma.tokenizer
    control = {i: t.id_to_piece(i) for i in range(t.vocab_size) if t.is_control(i)}
    assert len(control) > 100
    assert not control.keys() & {i for name in control.values() for i in t.encode(name, bos=False)}


def test_ids_of_the_special_tokens(gemma):
    t = gemma.tokenizer
    turn = 105 if gemma.name == "gemma3" else 106
    assert (t.pad_id, t.eos_id, t.bos_id, t.unk_id) == (0, 1, 2, 3)
    assert (t.start_of_turn_id, t.end_of_turn_id) == (turn, turn + 1)
    assert t.stop_ids == {1, turn + 1} and isinstance(t.stop_ids, frozenset)
    assert t.vocab_size == (262145 if gemma.name == "gemma3" else 256000)
    assert t.piece_to_id("<start_of_turn>") == turn and t.id_to_piece(turn) == "<start_of_turn>"
    for token in gemma.added:
        assert t.is_control(token["id"]) or not token["special"]
    assert not t.is_control(t.encode("hello", bos=False)[0])


def test_one_beginning_however_often_it_is_asked_for(gemma):
    t = gemma.tokenizer
    ids = t.encode("hello there")
    assert ids == [2, *t.encode("hello there", bos=False)] and ids.count(2) == 1
    assert t.with_bos(ids) == ids == t.with_bos(ids[1:]) == t.with_bos(t.with_bos([2, *ids]))
    assert t.with_bos([]) == [2] == t.encode("")
    assert t.with_bos(np.array(ids)) == ids
    assert t.encode("<bos>hi").count(2) == 1


def test_decoding_control_tokens_and_broken_bytes(gemma3):
    t = gemma3.tokenizer
    ids = [t.bos_id, *t.encode("hi", bos=False), t.end_of_turn_id]
    assert t.decode(ids) == "hi" and t.decode(ids, skip_control=False) == "<bos>hi<end_of_turn>"
    byte = [t.piece_to_id(f"<0x{b:02X}>") for b in range(256)]
    assert t.decode([byte[0xE2], byte[0x82], byte[0xAC]]) == "€"
    assert t.decode([byte[0xE2], byte[0x82], *t.encode("x", bos=False), byte[0xFF]]) == "\ufffdx\ufffd"
    assert t.decode(t.encode(" hi  there ")) == " hi  there "


def test_errors_are_one_line(gemma3):
    t = gemma3.tokenizer
    for call in (
        lambda: t.encode("a\ud800b"),
        lambda: t.encode("\udfff"),
        lambda: t.encode(b"a"),
        lambda: t.decode([t.vocab_size]),
        lambda: t.decode([-1]),
        lambda: t.id_to_piece(2**40),
        lambda: t.is_control(t.vocab_size),
        lambda: t.piece_to_id("no such piece"),
    ):
        with pytest.raises(GemkitError) as error:
            call()
        assert "\n" not in str(error.value) and len(str(error.value)) > 20


def test_the_bundled_model_has_the_ids_of_its_tokenizer_json(gemma3):
    """A GGUF file holds the same vocabulary, with other types and spaces for U+2581, and no merges."""
    from gemkit.hub.demo import demo_path
    from gemkit.weights.gguf.read import read_gguf

    vocabulary = read_gguf(demo_path()).vocabulary
    t = Tokenizer.from_vocabulary(vocabulary)
    assert t.vocab_size == 262144
    assert [text for text in STRINGS if t.encode(text) != gemma3.tokenizer.encode(text)] == []
    control = [i for i in range(t.vocab_size) if t.is_control(i)]
    assert control == [i for i in range(t.vocab_size) if gemma3.tokenizer.is_control(i)]


@pytest.mark.parametrize("kind", [PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.CONTROL])
def test_a_file_that_marks_control_tokens_otherwise_makes_no_difference(gemma3, kind: int):
    v = gemma3.vocabulary
    types = v.types.copy()
    names = {name.encode() for name in CONTROL_LITERALS}
    at = [i for i, piece in enumerate(v.pieces) if piece in names]
    assert len(at) >= 10
    types[at] = kind
    t = Tokenizer.from_vocabulary(type(v)(v.pieces, v.scores, types))
    assert all(map(t.is_control, at))
    texts = random.Random(2).sample(STRINGS, 300)
    assert [t.encode(text) for text in texts] == [gemma3.tokenizer.encode(text) for text in texts]
