"""Models with other numbers of rows than pieces, as published, through every writer and in llama.cpp. Budget: 40 s."""

import dataclasses

import numpy as np
import pytest
from engine.vocabulary import vocabulary
from parity import llama_cpp
from weights.files import tiny_config, tiny_params

import gemkit
from gemkit.hub.demo import demo_path
from gemkit.text.tokenizer import Tokenizer
from gemkit.text.vocabulary import PieceType, Vocabulary
from gemkit.tools.convert import convert, verify
from gemkit.tools.quantize import quantize
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.container import GGUFFile
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.google.orbax_write import write_orbax
from gemkit.weights.hf.write import write_hf
from gemkit.weights.open import open_checkpoint
from gemkit.weights.quant import GGMLType

TEXTS = ("the sea was calm", "[PAD300] [PAD363] <image_soft_token>", "1 + 1 = 2\n\n  é 金星", "")
# Rows less pieces: 4B, 12B and 27B; 270M and 1B; a small surplus; none
RELATIONS = {"4b": 262_208 - 262_145, "270m": 262_144 - 262_145, "one more": 1, "round": 0}


def with_image_token(pieces: Vocabulary) -> Vocabulary:
    """<image_soft_token>, of which no text model of Gemma 3 needs a row, behind the others."""
    scores, types = np.append(pieces.scores, np.float32(0)), np.append(pieces.types, PieceType.CONTROL)
    return Vocabulary([*pieces.pieces, b"<image_soft_token>"], scores, types.astype(np.int32))


def tiny(surplus: int, model_type: str = "gemma3_text", **changes) -> Checkpoint:
    pieces = with_image_token(vocabulary())
    config = tiny_config(model_type, hidden_size=256, head_dim=32, vocab_size=len(pieces) + surplus, **changes)
    params = {name: value * 0.1 for name, value in tiny_params(config).items()}
    return Checkpoint.from_params(config, params, GGMLType.BF16, pieces, name="Tiny", instruction_tuned=False)


def ids(path) -> list[list[int]]:
    with open_checkpoint(path) as checkpoint:
        tokenizer = Tokenizer.from_vocabulary(checkpoint.vocabulary)
        return [tokenizer.encode(text, bos=False) for text in TEXTS]


def assert_llama_cpp_agrees(path) -> None:
    with open_checkpoint(path) as checkpoint, llama_cpp.opened(path) as theirs:
        assert theirs is not None, "llama.cpp refuses the file"
        assert theirs.rows == checkpoint.config.vocab_size
        assert [theirs.tokenize(text) for text in TEXTS] == ids(path)
        assert set(checkpoint.config.stop_token_ids) <= theirs.ends()


@pytest.mark.parametrize("relation", RELATIONS)
def test_every_format_and_back(tmp_path, relation):
    start = tiny(RELATIONS[relation])
    folder = write_hf(tmp_path / "folder", start)
    wanted = ids(folder)
    routes = [
        convert(folder, tmp_path / "a.gguf", "gguf"),
        convert(tmp_path / "a.gguf", tmp_path / "hf", "hf"),
        convert(tmp_path / "a.gguf", tmp_path / "flax", "orbax"),
        convert(tmp_path / "flax", tmp_path / "b.gguf", "gguf"),
        convert(tmp_path / "hf", tmp_path / "flax2", "orbax"),
        convert(tmp_path / "b.gguf", tmp_path / "c.gguf", "gguf"),
    ]
    rows, pieces = start.config.vocab_size, start.vocabulary.pieces
    for path in routes:
        with open_checkpoint(path) as back:
            assert back.config == start.config, path
            assert back.vocabulary.pieces == pieces[: min(rows, len(pieces))], path
        assert ids(path) == wanted, path
        found = verify(folder if path == routes[0] else routes[0], path, "the sea")
        assert found.same_ids and found.tensor is None, path
        if path.suffix == ".gguf":
            assert_llama_cpp_agrees(path)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m", "q4_0"])
def test_quantize(tmp_path, relation, kind):
    folder = write_hf(tmp_path / "folder", tiny(RELATIONS[relation]))
    quantize(folder, tmp_path / "q.gguf", kind)
    assert ids(tmp_path / "q.gguf") == ids(folder)
    assert_llama_cpp_agrees(tmp_path / "q.gguf")
    with gemkit.load(tmp_path / "q.gguf", threads=1) as model:
        assert len(model.generate("the sea", max_tokens=3, temperature=0).ids) > 0


def test_the_file_has_llama_cpps_padding(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", tiny(3))
    with GGUFFile.open(path) as file:
        tokens, types = (file.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
        assert tokens.strings()[300:] == [b"<image_soft_token>", b"[PAD301]", b"[PAD302]", b"[PAD303]"]
        assert types.numbers()[300:].tolist() == [3, 5, 5, 5]


def test_a_piece_that_looks_like_padding(tmp_path):
    """llama.cpp takes no piece twice."""
    start = tiny(3)
    pieces = list(start.vocabulary.pieces)
    pieces[39] = b"[PAD302]"
    changed = dataclasses.replace(start.vocabulary, pieces=pieces)
    path = write_gguf(tmp_path / "x.gguf", Checkpoint(start.config, start.tensors, vocabulary=changed))
    with open_checkpoint(path) as back, llama_cpp.opened(path) as theirs:
        assert back.vocabulary.pieces == pieces and theirs.rows == 304


def test_stop_ids_and_a_tokenizer_without_their_pieces(tmp_path):
    """A stop id may be a row without a piece; transformers' file names one that has a piece."""
    start = tiny(5)
    ends = (1, 106, 300, 303, 304)
    checkpoint = Checkpoint(
        dataclasses.replace(start.config, stop_token_ids=ends),
        start.tensors,
        vocabulary=start.vocabulary,
        instruction_tuned=True,
    )
    for write, name in ((write_gguf, "x.gguf"), (write_hf, "hf"), (write_orbax, "flax")):
        with open_checkpoint(write(tmp_path / name, checkpoint)) as back:
            assert back.config.stop_token_ids == ends and back.instruction_tuned
    back = convert(tmp_path / "x.gguf", tmp_path / "hf2", "hf")
    with open_checkpoint(convert(back, tmp_path / "y.gguf", "gguf")) as again:
        assert again.config.stop_token_ids == ends


def test_the_published_numbers(tmp_path):
    """262,208 rows and 262,145 pieces with Google's vocabulary and a tiny model."""
    with open_checkpoint(demo_path()) as demo:
        pieces = with_image_token(demo.vocabulary)
    assert len(pieces) == 262_145
    config = tiny_config("gemma3_text", num_hidden_layers=1, vocab_size=262_208)
    start = Checkpoint.from_params(config, tiny_params(config), GGMLType.Q8_0, pieces, name="Tiny")
    path = write_gguf(tmp_path / "x.gguf", start)
    texts = ["The planets, in order from the Sun:\n\n\tMercury, 金星, <b>Earth</b>", "[PAD262145]<image_soft_token>"]
    with open_checkpoint(path) as back, open_checkpoint(demo_path()) as demo, llama_cpp.opened(path) as theirs:
        assert back.vocabulary.pieces == pieces.pieces and theirs.rows == 262_208
        mine, plain = (Tokenizer.from_vocabulary(c.vocabulary) for c in (back, demo))
        for text in texts:
            assert mine.encode(text, bos=False) == plain.encode(text, bos=False) == theirs.tokenize(text)
