"""Vocabularies and models, broken ones too; sentencepiece's own trainer makes real ones. Budget: 15 s."""

import io
import json
import random
import time

import numpy as np
import pytest
import sentencepiece

from gemkit.errors import GemkitError
from gemkit.text.spm_proto import read_model, write_model
from gemkit.text.tokenizer import Tokenizer
from gemkit.text.tokenizer_json import read_tokenizer_json
from gemkit.text.vocabulary import PieceType, Vocabulary

CORE = ["<pad>", "<eos>", "<bos>", "<unk>"]
TURNS = ["<start_of_turn>", "<end_of_turn>"]


def tiny(pieces=(*CORE, *TURNS), types=None, scores=None) -> Vocabulary:
    """Control tokens, 256 bytes, the letters."""
    rest = [f"<0x{byte:02X}>" for byte in range(256)] + list("abcdefghijklmnopqrstuvwxyz▁")
    kinds = [3] * len(pieces) + [6] * 256 + [1] * 27
    made = Vocabulary(
        pieces=[piece.encode() for piece in [*pieces, *rest]],
        scores=-np.arange(len(kinds), dtype=np.float32),
        types=np.array(kinds, np.int32),
    )
    if types:
        made.types[list(types)] = list(types.values())
    if scores:
        made.scores[list(scores)] = list(scores.values())
    return made


def test_vocabularies_with_and_without_turns():
    assert Tokenizer.from_vocabulary(tiny()).stop_ids == {1, 5}
    base = Tokenizer.from_vocabulary(tiny(CORE))
    assert base.stop_ids == {1} and base.start_of_turn_id is base.end_of_turn_id is None
    fim = "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|file_separator|>".split()
    code = Tokenizer.from_vocabulary(tiny([*CORE, *fim, *TURNS], dict.fromkeys(range(4, 10), 4)))
    special = code.special
    assert (special.fim_prefix, special.fim_middle, special.fim_suffix, special.file_separator) == (4, 5, 6, 7)
    assert code.stop_ids == {1, 4, 5, 6, 7, 9}
    assert not set(code.encode("".join([*fim, *TURNS]), bos=False)) & set(range(10))


UNIFORM = dict.fromkeys(range(4, 6), PieceType.NORMAL)


@pytest.mark.parametrize("types", [UNIFORM, dict.fromkeys(UNIFORM, 4), {3: 2, 4: 5}, {0: 1, 1: 1, 2: 1, 3: 1}])
def test_control_tokens_are_control_whatever_the_file_says(types):
    """Files differ: tokenizer.model has turns as USER_DEFINED, GGUF has <unk> as CONTROL, old ones have them NORMAL."""
    assert write_model(tiny(types=types)) == write_model(tiny())


@pytest.mark.parametrize(
    ("vocabulary", "words"),
    [
        (Vocabulary([], np.zeros(0, np.float32), np.zeros(0, np.int32)), "sentencepiece refuses"),
        (tiny([*CORE, ""]), "empty piece at 4"),
        (tiny([*CORE, "a\0b"]), "zero byte"),
        (tiny([*CORE, "zz", "zz"], {4: 1, 5: 1}), "already defined"),
        (tiny([*CORE, "  ", "▁▁"], {4: 4, 5: 4}), "already defined"),
        (tiny(types={7: 1}), "256 byte pieces"),
        (tiny(types={280: 6}), "sentencepiece refuses"),
        (tiny(types={9: 7}), "unknown type at 9"),
        (tiny(types={9: 259}), "unknown type at 9"),
        (tiny(types={9: -1}), "unknown type at 9"),
        (tiny(scores={9: np.nan}), "score at 9"),
        (tiny(scores={9: np.inf}), "score at 9"),
        (tiny(["<pad>", "<eos>", "<unk>", "<bos>"]), "<bos> is at 3, every Gemma has it at 2"),
        (tiny(["<pad>", "</s>", "<bos>", "<unk>"]), "<eos> is missing"),
        (tiny([*CORE, "<end_of_turn>"]), "no Gemma"),
        (tiny([*CORE, "<end_of_turn>", "<start_of_turn>"]), "no Gemma"),
    ],
)
def test_broken_vocabularies_are_refused(vocabulary, words):
    with pytest.raises(GemkitError, match=words) as caught:
        Tokenizer.from_vocabulary(vocabulary)
    assert "\n" not in str(caught.value)


def test_pieces_that_are_no_utf8_are_refused():
    vocabulary = tiny()
    vocabulary.pieces[280] = b"\xe2\x82"
    with pytest.raises(GemkitError, match="piece at 280 that is not UTF-8"):
        Tokenizer.from_vocabulary(vocabulary)
    with pytest.raises(GemkitError, match="288 scores"):
        Tokenizer.from_vocabulary(Vocabulary(tiny().pieces, tiny().scores[1:], tiny().types))


@pytest.fixture(scope="module")
def trained():
    """A function that has sentencepiece itself train a model, with control tokens USER_DEFINED as Google has them."""

    def train(**options):
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdeé ", k=rng.randrange(1, 7))) for _ in range(300)]
        lines = [" ".join(rng.choices(words, k=8)) for _ in range(400)]
        out = io.BytesIO()
        settings = {
            "model_type": "bpe",
            "vocab_size": 500,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "pad_id": 0,
            "eos_id": 1,
            "bos_id": 2,
            "unk_id": 3,
            "pad_piece": "<pad>",
            "eos_piece": "<eos>",
            "bos_piece": "<bos>",
            "user_defined_symbols": ["<mask>", "<unused0>", *TURNS, "<b>", "</b>", "▁▁", "▁▁▁"],
            "minloglevel": 2,
        }
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, **{**settings, **options}
        )
        return out.getvalue()

    return train


def test_a_tokenizer_model_of_sentencepiece_itself(trained, tmp_path):
    model = trained()
    (tmp_path / "tokenizer.model").write_bytes(model)
    own, theirs = Tokenizer.from_file(tmp_path / "tokenizer.model"), sentencepiece.SentencePieceProcessor()
    theirs.LoadFromSerializedProto(model)
    start = own.start_of_turn_id
    assert own.vocab_size == 500 and own.stop_ids == {1, start + 1}
    assert theirs.encode("<start_of_turn>") == [start] and own.is_control(start) and not theirs.is_control(start)
    rng = random.Random(1)
    parts = ["ab", "cé", " ", "   ", "<b>", "</b>", "\n", "€", "de a", "▁"]
    for _ in range(500):
        text = "".join(rng.choices(parts, k=rng.randrange(12)))
        assert own.encode(text, bos=False) == theirs.encode(text), text
        text += rng.choice(TURNS)
        assert not any(map(own.is_control, own.encode(text, bos=False)))
        assert own.decode(own.encode(text)) == text.replace("▁", " ")


def test_the_library_reads_a_written_model_as_it_was_meant(trained):
    """The library serialises a handwritten model again; read by hand, it is equal."""
    vocabulary = read_model(trained())
    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(write_model(vocabulary))
    again = read_model(library.serialized_model_proto())
    assert again.pieces == vocabulary.pieces
    np.testing.assert_array_equal(again.scores, vocabulary.scores)
    changed = [again.pieces[at] for at in np.flatnonzero(again.types != vocabulary.types)]
    assert changed == [b"<mask>", b"<unused0>", *(turn.encode() for turn in TURNS)]
    assert [library.pad_id(), library.eos_id(), library.bos_id(), library.unk_id()] == [0, 1, 2, 3]


def test_a_field_that_is_longer_than_its_message_is_refused():
    model = bytearray(write_model(tiny()))
    at = model.index(b"<pad>") - 1
    assert model[at] == 5
    model[at] = 100
    with pytest.raises(GemkitError, match="model is broken"):
        read_model(bytes(model))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "unigram"}, "byte-pair merges"),
        ({"byte_fallback": False}, "byte fallback"),
        ({"add_dummy_prefix": True}, "no space put in front"),
        ({"remove_extra_whitespaces": True}, "spaces kept"),
        ({"normalization_rule_name": "nmt_nfkc"}, "no normalisation"),
        ({"treat_whitespace_as_suffix": True}, "spaces before words"),
    ],
)
def test_models_that_split_otherwise_are_refused(trained, tmp_path, options, words):
    path = tmp_path / "other.model"
    path.write_bytes(trained(**{"vocab_size": 300, **options}))
    with pytest.raises(GemkitError, match=f"other.model: .*{words}"):
        Tokenizer.from_file(path)


def test_broken_model_files_give_one_error(trained):
    model = trained()
    rng = random.Random(2)
    refused = 0
    for _ in range(1500):
        data = bytearray(model[: rng.randrange(len(model))] if rng.random() < 0.3 else model)
        for _ in range(rng.randrange(1, 4)):
            if data:
                data[min(int(rng.expovariate(0.002)), len(data) - 1)] = rng.randrange(256)
        try:
            Tokenizer(write_model(read_model(bytes(data))))
        except GemkitError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 700


def test_a_second_start_reads_the_cache_alone(gemma3, tmp_path, monkeypatch):
    def forbidden() -> Vocabulary:
        raise AssertionError("the vocabulary was asked for")

    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path))
    Tokenizer.from_cached("some key", lambda: gemma3.vocabulary)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert Tokenizer.from_cached("some key", forbidden).encode("hello there") == gemma3.tokenizer.encode(
            "hello there"
        )
        times.append(time.perf_counter() - start)
    assert min(times) < 1, "0.1 s on a quiet machine"
    with pytest.raises(AssertionError):
        Tokenizer.from_cached("another key", forbidden)


def test_the_key_is_the_content(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path))
    made = [tiny(), tiny(scores={270: 5}), tiny(types={270: 4}), tiny([*CORE[:4], "ab", "cd", *TURNS]), tiny()]
    made[-1].pieces[4:6] = [b"<start_of_tur", b"n><end_of_turn>"]
    for vocabulary in made:
        Tokenizer.from_vocabulary(vocabulary)
        Tokenizer.from_vocabulary(vocabulary)
    assert len(list((tmp_path / "tokenizers").iterdir())) == len(made)


def test_a_full_disk_costs_only_time(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path))
    monkeypatch.setattr("os.replace", full)
    assert Tokenizer.from_vocabulary(tiny()).vocab_size == 289
    assert list((tmp_path / "tokenizers").iterdir()) == []


ACCEPTED = {
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "added_tokens": [{"id": 1, "content": "<x>", "special": False}],
    "model": {"type": "BPE", "byte_fallback": True, "merges": [], "vocab": {"a": 0, "<x>": 1, "b": 2}},
}


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("model", {"type": "WordPiece"}, "byte-pair merges"),
        ("model", {"ignore_merges": True}, "merges of whole pieces"),
        ("model", {"byte_fallback": False}, "byte fallback"),
        ("normalizer", {"type": "Prepend"}, "spaces kept"),
        ("normalizer", {"content": "_"}, "spaces kept"),
        ("model", {"vocab": {"a": 0, "b": 0}}, "id 0 .* is used twice"),
        ("model", {"vocab": {"a": 0, "b": 3}}, "id 3 .* leaves a gap"),
        ("model", {"vocab": {"a": 0, "b": -1}}, "id -1"),
        ("model", {"vocab": {"a": 0, "b": "2"}}, "no tokenizer.json"),
        ("model", {"vocab": {"a": 0, "\ud800": 1}}, "no tokenizer.json"),
        ("model", {"vocab": {"a": 0, "b": 2}}, "id 2 .* leaves a gap"),
        ("model", {"merges": [5]}, "no tokenizer.json"),
    ],
)
def test_other_json_tokenizers_are_refused(part, changes, words):
    assert read_tokenizer_json(json.dumps(ACCEPTED).encode()).types.tolist() == [1, 4, 1]
    with pytest.raises(GemkitError, match=words) as caught:
        read_tokenizer_json(json.dumps(ACCEPTED | {part: ACCEPTED[part] | changes}).encode())
    assert "\n" not in str(caught.value)


def test_the_first_merge_that_makes_a_piece_counts():
    vocab = {"a": 0, "<x>": 1, "b": 2, "ab": 3, "ba": 4, "aba": 5}
    merges = [["a", "ba"], ["a", "b"], ["b", "a"], ["ab", "a"]]
    file = ACCEPTED | {"model": ACCEPTED["model"] | {"vocab": vocab, "merges": merges}}
    assert read_tokenizer_json(json.dumps(file).encode()).scores.tolist() == [-4, -4, -4, -1, -2, 0]
