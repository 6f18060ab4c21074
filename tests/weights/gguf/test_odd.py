"""GGUF files as users have them: what llama.cpp or Ollama loads is read, others are refused by cause. Budget: 30 s."""

import dataclasses

import gguf as peer
import numpy as np
import pytest
from engine.vocabulary import vocabulary
from parity import llama_cpp
from weights import files

import gemkit
from gemkit.arch.presets import PRESETS
from gemkit.cli import main
from gemkit.errors import GemkitError, GemkitWarning
from gemkit.text.tokenizer import Tokenizer
from gemkit.text.vocabulary import Vocabulary
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.container import GGUFFile
from gemkit.weights.gguf.read import config_from_metadata, read_gguf
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.open import open_checkpoint
from gemkit.weights.quant import GGMLType

TEXTS = ("the sea was calm", "a\n\n  b é 金星", "[EMPTY_39]")
EPS, BASE = "gemma3.attention.layer_norm_rms_epsilon", "gemma3.rope.freq_base"


def model(**changes) -> Checkpoint:
    config = files.tiny_config("gemma3_text", head_dim=32, vocab_size=300, **changes)
    return Checkpoint.from_params(config, files.tiny_params(config), GGMLType.F32, vocabulary(), name="Tiny pt")


def rewrite(folder, drop=(), tokens=(), scores=(), types=(), tensors=(), **more):
    """A file of gguf-py's writer with the same model: keys dropped or added, elements of the arrays changed.

    more: keys, a dot written as two underscores. tokens, scores, types: (index, value); an index of None drops the key.
    """
    path = write_gguf(folder / "start.gguf", model())
    out = folder / "odd.gguf"
    writer = peer.GGUFWriter(out, "gemma3")
    lists = {"tokens": tokens, "scores": scores, "token_type": types}
    with GGUFFile.open(path) as file:
        pairs = dict(file.metadata) | {key.replace("__", "."): value for key, value in more.items()}
        for key, value in pairs.items():
            name = key.removeprefix("tokenizer.ggml.")
            if key in (*drop, "general.architecture") or (None, None) in lists.get(name, ()):
                continue
            if name in lists:
                values = value.strings() if name == "tokens" else value.numbers().tolist()
                for at, new in lists[name]:
                    values[at:] = [new] if at >= len(values) else [new, *values[at + 1 :]]
                writer.add_array(key, values)
            else:
                files.add_pair(writer, key, value)
        for name, tensor in file.tensors.items():
            writer.add_tensor(name, tensor.data.view("<f4").reshape(tensor.shape).copy())
        for name in tensors:
            writer.add_tensor(name, np.ones((8, 8), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


def encode(path) -> list[list[int]]:
    with open_checkpoint(path) as checkpoint:
        tokenizer = Tokenizer.from_vocabulary(checkpoint.vocabulary)
        return [tokenizer.encode(text, bos=False) for text in TEXTS]


def test_the_rewritten_file_is_the_same_model(tmp_path):
    path = rewrite(tmp_path)
    with open_checkpoint(path) as odd, open_checkpoint(tmp_path / "start.gguf") as start:
        assert odd.config == start.config and odd.vocabulary.pieces == start.vocabulary.pieces


@pytest.mark.parametrize("key", ["eos", "bos", "eot", "eom"])
@pytest.mark.parametrize("value", [2**32 - 1, 300])
def test_a_special_id_outside_the_vocabulary_is_passed_over(tmp_path, key, value):
    name = f"tokenizer.ggml.{key}_token_id"
    path = rewrite(tmp_path, **{name.replace(".", "__"): value})
    with pytest.warns(GemkitWarning, match=f"odd.gguf: {name} is {value}") as caught, open_checkpoint(path) as odd:
        assert dataclasses.replace(odd.config, stop_token_ids=(1, 106)) == model().config
        assert set(odd.config.stop_token_ids) == {1, 106} - {{"eos": 1, "eot": 106}.get(key)}
    assert len(caught) == 1
    with llama_cpp.opened(path) as theirs:
        assert {1, 107} <= theirs.ends()


def test_the_warning_is_one_line_on_the_terminal(tmp_path, capsys, recwarn):
    path = rewrite(tmp_path, tokenizer__ggml__eos_token_id=2**32 - 1)
    with pytest.raises(SystemExit) as exit_, pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [("default", None, Warning, None, 0)])
        main(["generate", str(path), "--prompt", "the", "--max-tokens", "1", "--threads", "1"])
    error = capsys.readouterr().err
    assert not exit_.value.code and error.count("\n") == 1, error
    assert error.startswith(f"gemkit: {path}: tokenizer.ggml.eos_token_id is 4294967295")


def test_all_stop_ids(tmp_path):
    """llama.cpp's three keys, Ollama's list, and gemkit's own list, which alone is the whole truth."""
    path = rewrite(tmp_path, tokenizer__ggml__eot_token_id=20, tokenizer__ggml__eom_token_id=21)
    with open_checkpoint(path) as odd, llama_cpp.opened(path) as theirs:
        assert set(odd.config.stop_token_ids) == {1, 20, 21} and theirs.ends() == {1, 107, 20, 21}
    path = rewrite(tmp_path, tokenizer__ggml__eos_token_ids=[1, 30, 31])
    with open_checkpoint(path) as odd:
        assert set(odd.config.stop_token_ids) == {1, 106, 30, 31}
    for ends in ((1, 106), (1, 106, 20), (1, 20), (20,), (1, 106, 20, 21, 22), (22, 106, 1)):
        start = model(stop_token_ids=ends)
        with read_gguf(write_gguf(tmp_path / "x.gguf", start)) as back, llama_cpp.opened(back.source) as theirs:
            assert back.config == start.config and set(ends[:3]) <= theirs.ends()


def test_ollamas_keys(tmp_path):
    """No epsilon, images in the file, other names of the rotary bases, or none."""
    with open_checkpoint(rewrite(tmp_path, drop=[EPS])) as odd:
        assert odd.config == model().config
    images = [*(f"v.blk.{i}.attn_q.weight" for i in range(27)), "mm.mm_input_projection.weight"]
    with open_checkpoint(rewrite(tmp_path, tensors=images)) as odd:
        assert odd.config == model().config
        assert odd.metadata["ignored"] == "27 tensors of v, 1 tensors of mm: images are not read"
    more = {"gemma3__rope__global__freq_base": 5e5, "gemma3__rope__local__freq_base": 2e4}
    with open_checkpoint(rewrite(tmp_path, drop=[BASE, "gemma3.rope.freq_base_swa"], **more)) as odd:
        assert {layer.rope_theta for layer in odd.config.layers if layer.sliding_window} == {2e4}
        assert odd.config.layers[5].rope_theta == 5e5
    with open_checkpoint(rewrite(tmp_path, drop=[BASE])) as odd:
        assert odd.config == model().config


@pytest.mark.parametrize("name", ["gemma-3-270m", "gemma-3-1b-pt", "gemma-3-4b-it", "gemma-3-12b-it", "gemma-3-27b-it"])
def test_a_gemma_3_without_a_rotary_base_has_the_published_one(name):
    config = PRESETS[name].config
    full = write_pairs(config)
    without = {key: value for key, value in full.items() if ".rope." not in key and key != EPS}
    shapes = dict.fromkeys(map(str, range(config.num_hidden_layers)), (1,))
    shapes["token_embd.weight"] = (config.vocab_size, config.hidden_size)
    assert config_from_metadata(without, shapes) == config_from_metadata(full, shapes) == config
    # With the base in its usual place, a missing factor is 1, as in llama.cpp
    one = config_from_metadata(without | {BASE: 1e6}, shapes)
    assert {layer.rope_factor for layer in one.layers} == {1} and one.layers[5].rope_theta == 1e6


def write_pairs(config) -> dict[str, object]:
    from gemkit.weights.gguf.write import _model_pairs

    return {key: value for key, (_, value) in _model_pairs(config).items()}


def test_a_piece_twice(tmp_path):
    path = rewrite(tmp_path, tokens=[(39, b"t"), (38, b"t"), (37, b"<unused7>"), (36, b"<unused7>")])
    with open_checkpoint(path) as odd:
        with pytest.warns(GemkitWarning, match="odd.gguf: pieces of its vocabulary occur twice: 37 '<unused7>'"):
            tokenizer = Tokenizer.from_vocabulary(odd.vocabulary)
        first = tokenizer.encode("t", bos=False)
        assert len(first) == 1 and first[0] < 30
        assert [tokenizer.decode([token]) for token in (*first, 38, 39)] == ["t"] * 3
        assert tokenizer.decode([36, 37]) == "" and tokenizer.decode([36, 37], False) == "<unused7>" * 2
        again = write_gguf(tmp_path / "again.gguf", odd)
    with open_checkpoint(again) as back, llama_cpp.opened(again) as theirs:
        assert Tokenizer.from_vocabulary(back.vocabulary).encode("the tt", bos=False) == theirs.tokenize("the tt")


def test_an_empty_piece_is_named_as_in_llama_cpp(tmp_path):
    path = rewrite(tmp_path, tokens=[(39, b"")])
    with llama_cpp.opened(path) as theirs:
        assert [theirs.tokenize(text) for text in TEXTS] == encode(path)


@pytest.mark.parametrize("key", ["scores", "types"])
def test_missing_scores_or_types_are_what_llama_cpp_takes(tmp_path, key):
    path = rewrite(tmp_path, **{key: [(None, None)]})
    name = {"scores": "scores", "types": "token_type"}[key]
    with pytest.warns(GemkitWarning, match=f"odd.gguf: tokenizer.ggml.{name} is missing"):
        ids = encode(path)
    with llama_cpp.opened(path) as theirs:
        assert [theirs.tokenize(text) for text in TEXTS] == ids


@pytest.mark.parametrize(
    ("piece", "kind", "fault"),
    [(b"<image_soft_token>", 3, None), (b"<image_soft_token>", 1, None), (b"[PAD300]", 5, None),
     (b"extra", 1, "the piece 300 b'extra' has no row"), (b"extra", 4, "the piece 300 b'extra' has no row")],
)  # fmt: skip
def test_more_pieces_than_rows(tmp_path, piece, kind, fault):
    """Ollama writes such files; llama.cpp refuses them all."""
    path = rewrite(tmp_path, tokens=[(300, piece)], scores=[(300, 0.0)], types=[(300, kind)])
    if fault is None:
        with open_checkpoint(path) as odd, open_checkpoint(tmp_path / "start.gguf") as start:
            assert odd.config == start.config
        assert encode(path) == encode(tmp_path / "start.gguf")
    else:
        with open_checkpoint(path) as odd, pytest.raises(GemkitError, match=fault):
            _ = odd.vocabulary


def test_fewer_pieces_than_rows_are_refused_as_in_llama_cpp(tmp_path):
    start = model()
    pieces = vocabulary()
    short = Vocabulary(pieces.pieces[:-3], pieces.scores[:-3], pieces.types[:-3])
    patched = Checkpoint(start.config, start.tensors, vocabulary=short)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gemkit.weights.gguf.write.fit_to_rows", lambda vocabulary, rows: vocabulary)
        patch.setattr("gemkit.weights.gguf.write.check_readable", lambda *_: None)
        path = write_gguf(tmp_path / "x.gguf", patched)
    with pytest.raises(GemkitError, match=r"tokens has 297 entries and token_embd\.weight 300 rows: llama\.cpp"):
        read_gguf(path)
    with llama_cpp.opened(path) as theirs:
        assert theirs is None


@pytest.mark.parametrize(
    ("more", "message"),
    [({"general__type": "mmproj"}, r"image part \(mmproj\) of a model"), ({"general__type": "adapter"}, "LoRA adapter"),
     ({"general__type": "imatrix"}, "importance matrix"), ({"tokenizer__ggml__model": "spm"}, "'spm', not sentence"),
     ({"tokenizer__ggml__model": "gpt2"}, "'gpt2', not sentencepiece")],
)  # fmt: skip
def test_what_is_no_model_says_what_it_is(tmp_path, more, message):
    with pytest.raises(GemkitError, match=f"odd.gguf: .*{message}"):
        open_checkpoint(rewrite(tmp_path, **more))


def test_an_image_encoder_of_llama_cpp(tmp_path):
    writer = peer.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.add_tensor("v.blk.0.attn_q.weight", np.ones((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GemkitError, match="image part"):
        open_checkpoint(tmp_path / "mmproj.gguf")


def test_a_download_that_broke_off_says_so(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", model())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(GemkitError, match=rf"{len(data) // 2:,} of at least {len(data):,} bytes.* downloaded whole"):
        open_checkpoint(path)


def test_long_lists_are_cut(tmp_path):
    start = model()
    write_gguf(tmp_path / "x.gguf", start)
    data = (tmp_path / "x.gguf").read_bytes().replace(b"blk.", b"bxk.")
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(GemkitError) as caught:
        open_checkpoint(tmp_path / "x.gguf")
    assert len(str(caught.value)) < 500 and " more" in str(caught.value)


@pytest.mark.filterwarnings("ignore::gemkit.errors.GemkitWarning")
def test_a_model_of_duplicates_generates(tmp_path):
    with gemkit.load(rewrite(tmp_path, tokens=[(39, b"t")]), threads=1) as loaded:
        assert len(loaded.generate("the", max_tokens=3, temperature=0).ids) > 0


@pytest.mark.parametrize(
    ("piece", "fault"), [(b"\xff\xfe", "not UTF-8"), (b"a\0b", "a zero byte")], ids=["not UTF-8", "zero byte"]
)
def test_a_broken_piece_names_the_file(tmp_path, piece, fault):
    path = rewrite(tmp_path, tokens=[(39, piece)])
    with pytest.raises(GemkitError, match=f"odd.gguf: .*{fault}"):
        gemkit.load(path, threads=1)
