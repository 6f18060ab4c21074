"""Tokenizers as transformers 4 and 5, trainers and users leave them, compared with transformers. Budget: 30 s."""

import copy
import gzip
import json
import random

import pytest
import transformers
from testdata import data_file
from text.texts import strings as real_strings
from weights import exports

from gemkit.errors import GemkitError
from gemkit.text.special import is_control_piece
from gemkit.text.spm_proto import read_model, write_model
from gemkit.text.tokenizer import Tokenizer
from gemkit.text.tokenizer_json import write_tokenizer_json
from gemkit.text.vocabulary import PieceType
from gemkit.weights.folder import top_level
from gemkit.weights.hf.tokenizer import find_tokenizer

MODEL = exports.vocabulary()
VOCABULARY = read_model(MODEL)
JSON = json.loads(write_tokenizer_json(VOCABULARY))
V = len(VOCABULARY)
TEXTS = ["hello world", "the cat\n\n\nsat", "a <think>b</think> c", "<h1>x</h1>", "café two words", "  \n x"]


def token(content: str, special: bool = False, **more) -> dict:
    return exports._plain_token(content, special, **more)


def write(folder, *, data=JSON, model=None, config=None, special=None, added=None) -> None:
    (folder / "config.json").write_text('{"model_type": "gemma3_text"}')
    for name, value in (
        ("tokenizer.json", data),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
        ("added_tokens.json", added),
    ):
        (folder / name).unlink(missing_ok=True)
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model)


def read(folder, rows: int = V + 64):
    return find_tokenizer(folder, top_level(folder)).vocabulary(rows)


def same(folder, rows: int = V + 64) -> Tokenizer:
    """gemkit's tokenizer, which has transformers' ids."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_vocabulary(read(folder, rows))
    special = {str(t) for t in theirs.added_tokens_decoder.values() if t.special}
    for text in TEXTS:
        if not any(name in text for name in special):
            assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False).input_ids, text
    for number, added in theirs.added_tokens_decoder.items():
        if number < ours.vocab_size:
            assert ours.id_to_piece(number) == str(added).replace(" ", "▁")
    return ours


def with_tokens(*rows: tuple[int, dict]) -> dict:
    data = copy.deepcopy(JSON)
    data["added_tokens"] += [{"id": number, **row} for number, row in rows]
    return data


def test_tokenizer_json_goes_before_a_stale_model(tmp_path):
    write(tmp_path, data=with_tokens((V, token("<think>")), (V + 1, token("</think>"))), model=MODEL)
    assert same(tmp_path).encode("<think>hello", bos=False)[0] == V


@pytest.mark.parametrize("kind", [None, "GemmaTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "Mine"])
def test_the_numbers_of_the_file_give_the_order_alone(tmp_path, kind):
    """An id is the next one, whatever the file says; which order, depends on the class."""
    config = kind and {"tokenizer_class": kind}
    write(tmp_path, data=with_tokens((V + 5, token("<think>")), (V + 2, token("</think>"))), config=config)
    first = "<think>" if kind in ("PreTrainedTokenizerFast", "TokenizersBackend", "Mine") else "</think>"
    assert same(tmp_path).piece_to_id(first) == V


def test_a_list_in_the_configuration_replaces_that_of_the_tokenizer(tmp_path):
    listed = {str(V): token("<think>"), "2": token("<bos>", True)}
    write(tmp_path, data=with_tokens((V, token("</think>"))), config={"added_tokens_decoder": listed})
    ours = same(tmp_path)
    assert ours.piece_to_id("<think>") == V and V not in ours.encode("</think>", bos=False)


def test_files_of_transformers_4(tmp_path):
    """tokenizer.model with the tokens that the other files add: by number, else in added_tokens.json."""
    listed = {str(V + 1): token("<think>"), str(V): token("<call>", True)}
    write(tmp_path, data=None, model=MODEL, config={"added_tokens_decoder": listed})
    ours = same(tmp_path)
    assert ours.encode("a<think>b")[2] == V + 1 and ours.is_control(V) and V not in ours.encode("<call>")
    special = {"additional_special_tokens": ["<call>"], "eos_token": token("<eos>", True)}
    write(tmp_path, data=None, config={}, special=special, added={"<call>": V + 1, "<think>": V})
    ours = same(tmp_path)
    assert ours.encode("a<think>b")[2] == V and ours.is_control(V + 1)


def test_tokens_by_name_and_extra_ones(tmp_path):
    config = {"eos_token": "<|im_end|>", "image_token": "<image>", "extra_special_tokens": ["<think>"]}
    write(tmp_path, config=config)
    ours = same(tmp_path)
    assert [ours.piece_to_id(name) for name in ("<|im_end|>", "<image>", "<think>")] == [V, V + 1, V + 2]
    assert all(map(ours.is_control, range(V, V + 3)))
    write(tmp_path, config={"extra_special_tokens": {"image_token": "<image>"}, "additional_special_tokens": ["<x>"]})
    assert same(tmp_path).piece_to_id("<image>") == V
    # A token that no file names gets no id unless others follow: <mask> is missing in this vocabulary
    other = copy.deepcopy(JSON)
    vocab = other["model"]["vocab"]
    vocab["<other>"] = vocab.pop("<mask>")
    other["added_tokens"] = [row for row in other["added_tokens"] if row["content"] != "<mask>"]
    write(tmp_path, data=other)
    assert same(tmp_path).vocab_size == V
    write(tmp_path, data=other, config={"extra_special_tokens": ["<think>"]})
    assert same(tmp_path).piece_to_id("<think>") == V + 1


def test_a_token_in_the_place_of_another(tmp_path):
    """transformers 5 adds it at the end; where the model has no row for that, the place is what is meant."""
    listed = {"4": token("<|im_start|>", True)}
    write(tmp_path, config={"added_tokens_decoder": listed})
    ours = same(tmp_path)
    assert ours.piece_to_id("<|im_start|>") == V and ours.id_to_piece(4) == "<mask>"
    ours = Tokenizer.from_vocabulary(read(tmp_path, V))
    assert ours.id_to_piece(4) == "<|im_start|>" and ours.is_control(4) and ours.vocab_size == V
    write(tmp_path, data=None, model=MODEL, config={"added_tokens_decoder": listed, "tokenizer_class": "Mine"})
    assert same(tmp_path).id_to_piece(4) == "<|im_start|>"


def test_pieces_that_became_added_tokens(tmp_path):
    ids = JSON["model"]["vocab"]
    write(tmp_path, data=with_tokens((ids["▁the"], token("▁the")), (ids["thenin"], token("thenin", True))))
    ours = same(tmp_path)
    assert ours.is_control(ids["thenin"]) and ids["thenin"] not in ours.encode("thenin")


def test_a_normalised_token_around_another_is_never_found(tmp_path):
    write(tmp_path, data=with_tokens((V, token("<think>")), (V + 1, token("a <think>b", normalized=True))))
    assert read(tmp_path).types[V + 1] == PieceType.UNUSED
    assert same(tmp_path).encode("a <think>b", bos=False).count(V) == 1
    # "\n\n" is a token of the model's own
    write(tmp_path, data=None, model=MODEL, added={"\n\n\n": V})
    assert V not in same(tmp_path).encode("the\n\n\ncat")


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_look_around_are_refused(tmp_path, flag):
    write(tmp_path, data=with_tokens((V, token("<think>", **{flag: True}))))
    with pytest.raises(GemkitError, match=rf"tokenizer\.json: the added token '<think>' has {flag}"):
        read(tmp_path)
    write(tmp_path, data=with_tokens((V, token("<think>", True, **{flag: True}))))  # text never gives it
    same(tmp_path)


def test_tokenizers_that_gemkit_cannot_follow(tmp_path):
    def refusal(change, config=None) -> str:
        data = copy.deepcopy(JSON)
        change(data)
        write(tmp_path, data=data, config=config)
        with pytest.raises(GemkitError) as error:
            read(tmp_path)
        assert "\n" not in str(error.value) and "tokenizer.json" in str(error.value)
        return str(error.value)

    mine = {"tokenizer_class": "PreTrainedTokenizerFast"}
    cut = {"type": "Digits", "individual_digits": True}
    assert "text in one piece" in refusal(lambda d: d.update(pre_tokenizer=cut), mine)
    assert "spaces kept" in refusal(lambda d: d.update(normalizer={"type": "NFC"}), mine)
    assert "whole pieces" in refusal(lambda d: d["model"].update(ignore_merges=True), mine)
    # As the tokenizers library trains them: one way to make each piece
    single = list({"".join(pair): pair for pair in JSON["model"]["merges"]}.values())
    assert len(single) < len(JSON["model"]["merges"])
    assert "merges all" in refusal(lambda d: d["model"].update(merges=single))
    # The class for Gemma takes pieces and merges alone from the file
    data = copy.deepcopy(JSON) | {"pre_tokenizer": cut, "normalizer": None}
    write(tmp_path, data=data)
    same(tmp_path)


def test_broken_settings(tmp_path):
    for broken in (7, {"a": {}}, {"7": {"content": 7, "special": True}}, {"7": []}, []):
        write(tmp_path, config={"added_tokens_decoder": broken})
        with pytest.raises(GemkitError, match=r"tokenizer_config\.json: its added_tokens_decoder is broken"):
            read(tmp_path)
    write(tmp_path, added={"<x>": "many"})
    with pytest.raises(GemkitError, match=r"added_tokens\.json.*broken"):
        read(tmp_path)
    # What other programs put where tokens are expected is left alone
    write(tmp_path, config={"extra_special_tokens": 7, "eos_token": 3, "bos_token": {"x": 1}, "model_max_length": 1e30})
    read(tmp_path)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_published_tokenizers(tmp_path, name):
    """With the settings next to them, the ids of transformers.

    Gemma 1's file lists neither tags nor runs of white space as tokens; gemkit reads them as its tokenizer.model has
    them (`tests/text/test_tokenizer.py`).
    """
    data = gzip.decompress(data_file("tokenizers", f"{name}.tokenizer.json.gz").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(data)
    config = data_file("tokenizers", f"{name}.tokenizer_config.json").read_bytes()
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    rows = 262208 if name == "gemma3" else 256000
    vocabulary = read(tmp_path, rows)
    assert len(vocabulary) == (262145 if name == "gemma3" else 256000)
    ours, theirs = Tokenizer.from_vocabulary(vocabulary), transformers.AutoTokenizer.from_pretrained(tmp_path)
    pieces = [piece.decode() for piece in vocabulary.pieces]
    text = real_strings(400, 3, random.Random(1).sample(pieces, 500), control=False)
    control = [str(t) for t in theirs.added_tokens_decoder.values() if is_control_piece(str(t).encode())]
    for one in text:
        if not any(name in one for name in control):
            assert ours.encode(one, bos=False) == theirs(one, add_special_tokens=False).input_ids, one


def test_the_key_names_all_files(tmp_path):
    write(tmp_path, config={"eos_token": "<eos>"}, special={}, added={})

    def key(rows: int = V) -> str:
        return find_tokenizer(tmp_path, top_level(tmp_path)).key(rows)

    keys = {key(), key(V + 1)}
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes() + b" ")
        keys.add(key())
    assert len(keys) == 6 and all(len(key) == 64 for key in keys)
    (tmp_path / "tokenizer.model").write_bytes(write_model(VOCABULARY))  # is not read
    assert key() in keys
