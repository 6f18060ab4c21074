"""Hugging Face folders, made by transformers: equal tensors, equal logits, and clear refusals. Budget: 20 s."""

import gc
import json
import os
import shutil

import numpy as np
import pytest
import torch
from parity import transformers_models as hf
from parity.cases import CASES
from parity.tolerances import NATIVE_FLOAT32, REFERENCE_VS_TRANSFORMERS_F32, relative_error
from weights import hf_files
from weights.hf_files import TORCH, edit

from gemkit.arch import reference
from gemkit.errors import GemkitError, GemkitWarning
from gemkit.text.spm_proto import write_model
from gemkit.text.tokenizer import Tokenizer
from gemkit.text.tokenizer_json import write_tokenizer_json
from gemkit.text.vocabulary import PieceType, Vocabulary
from gemkit.weights.hf.read import read_hf
from gemkit.weights.hf.safetensors import INDEX, SINGLE
from gemkit.weights.open import open_checkpoint
from gemkit.weights.quant import GGMLType

GENERATIONS = ["gemma1_2b", "gemma2", "gemma3"]


def bits(value: torch.Tensor) -> bytes:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def logits(checkpoint, tokens) -> np.ndarray:
    return reference.forward(checkpoint.config, {k: t.to_float32() for k, t in checkpoint.tensors.items()}, tokens)


def refusal(folder) -> str:
    with pytest.raises(GemkitError) as error:
        read_hf(folder).close()
    assert "\n" not in str(error.value) and str(folder) in str(error.value), error.value
    return str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """transformers' folder of Gemma 3 in one file; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "gemma-3-tiny"
    hf_files.save(folder, "gemma3")
    return folder


@pytest.fixture(scope="module")
def saved_multimodal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "multimodal"
    model = hf_files.multimodal()
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / saved.name)


@pytest.mark.parametrize("name", [*GENERATIONS, "untied_embedding"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_equals_transformers(tmp_path, name, sharded):
    case = CASES[name]
    model = hf_files.save(tmp_path, name, **({"max_shard_size": "200KB"} if sharded else {}))
    assert (tmp_path / INDEX).exists() == sharded and (tmp_path / SINGLE).exists() != sharded
    with read_hf(tmp_path) as checkpoint:
        assert checkpoint.config == case.config and checkpoint.source == tmp_path
        assert checkpoint.metadata == {"format": "pt", "dtype": "float32"}
        state = model.state_dict()
        for key, tensor in checkpoint.tensors.items():
            assert tensor.type == GGMLType.F32 and not tensor.add_one
            assert tensor.data.tobytes() == bits(state[key]), key
        expected = hf.logits(model, case.tokens())
        assert relative_error(logits(checkpoint, case.tokens()), expected) <= REFERENCE_VS_TRANSFORMERS_F32
        actual = hf_files.native_logits(checkpoint.config, checkpoint.tensors, case.tokens())
        assert relative_error(actual, expected) <= NATIVE_FLOAT32


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_precision(tmp_path, dtype):
    case = CASES["gemma3"]
    model = hf_files.save(tmp_path, "gemma3", dtype)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.metadata["dtype"] == {"BF16": "bfloat16", "F16": "float16"}[dtype]
        params = {key: model.state_dict()[key].float().numpy() for key in checkpoint.tensors}
        for key, tensor in checkpoint.tensors.items():
            assert tensor.type.name == dtype and tensor.data.tobytes() == bits(model.state_dict()[key])
            assert np.array_equal(tensor.to_float32(), params[key])
        expected = hf.logits(hf.build(case.config, params, torch.float32), case.tokens())
        actual = hf_files.native_logits(checkpoint.config, checkpoint.tensors, case.tokens())
        assert relative_error(actual, expected) <= NATIVE_FLOAT32


def test_tensors_at_odd_addresses(folder):
    """Nothing in the format aligns tensors: a header of odd length moves them all by one."""
    case = CASES["gemma3"]
    data = (folder / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    with read_hf(folder) as checkpoint:
        expected = hf_files.native_logits(checkpoint.config, checkpoint.tensors, case.tokens())
    (folder / SINGLE).write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    with read_hf(folder) as checkpoint:
        assert all(tensor.data.ctypes.data % 2 for tensor in checkpoint.tensors.values())
        actual = hf_files.native_logits(checkpoint.config, checkpoint.tensors, case.tokens())
    assert np.array_equal(actual, expected)


def test_tensors_are_views_of_the_file(folder):
    with read_hf(folder) as checkpoint:
        tensor = checkpoint.tensors["model.norm.weight"]
        before = tensor.data.tobytes()
        data = (folder / SINGLE).read_bytes()
        with open(folder / SINGLE, "r+b") as file:
            file.seek(data.index(before))
            file.write(bytes(len(before)))
        assert not tensor.to_float32().any()
    with pytest.raises(GemkitError, match="closed"):
        _ = tensor.data
    gc.collect()
    maps = "/proc/self/maps"
    assert not os.path.exists(maps) or str(folder) not in open(maps).read()


# --- multimodal Gemma 3 ----------------------------------------------------------------------------------------------

RENAMED = {
    "as saved": lambda name: name,
    "in memory": lambda name: f"model.{name}".replace("model.language_model.model.", "model.language_model."),
    "text alone": lambda name: name.removeprefix("language_model."),
}


@pytest.mark.parametrize("names", RENAMED)
def test_multimodal_as_text(saved_multimodal, tmp_path, names):
    folder, model = saved_multimodal
    case = CASES["gemma3"]
    state = hf_files.tensors(folder)
    assert any(key.startswith("language_model.model.layers.0.") for key in state)
    if names == "in memory":
        assert {RENAMED[names](key) for key in state} | {"lm_head.weight"} == model.state_dict().keys()
    state = {RENAMED[names](key): value for key, value in state.items()}
    if names == "text alone":
        state = {key: value for key, value in state.items() if key.startswith("model.")}
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    hf_files.write(tmp_path, state)
    with read_hf(tmp_path) as checkpoint:
        assert checkpoint.config == case.config
        ignored = checkpoint.metadata.get("ignored")
        towers = sum("vision_tower" in key for key in state)
        assert ignored == (
            f"2 tensors of multi_modal_projector, {towers} tensors of vision_tower: images are not read"
            if names != "text alone"
            else None
        )
        for key, value in case.params().items():
            assert np.array_equal(checkpoint.tensors[key].to_float32(), value)
        assert relative_error(logits(checkpoint, case.tokens()), hf.logits(model, case.tokens())) <= NATIVE_FLOAT32


@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight"])
def test_heads_of_multimodal_files(saved_multimodal, tmp_path, head):
    """Tied, the head may be there if it is the embedding; untied, it is the head."""
    folder, _ = saved_multimodal
    state = hf_files.tensors(folder)
    embedding = state["language_model.model.embed_tokens.weight"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    hf_files.write(tmp_path, state | {head: embedding})
    read_hf(tmp_path).close()
    # Where both exist and differ, transformers does not tie them
    hf_files.write(tmp_path, state | {head: embedding + 1})
    with pytest.warns(GemkitWarning, match=f"{head} differs from"), read_hf(tmp_path) as checkpoint:
        assert not checkpoint.config.tie_word_embeddings
        assert np.array_equal(checkpoint.tensors["lm_head.weight"].to_float32(), (embedding + 1).numpy())
    facts = json.loads((tmp_path / "config.json").read_text())
    text = facts["text_config"] | {"tie_word_embeddings": False}
    edit(tmp_path / "config.json", tie_word_embeddings=False, text_config=text)
    with read_hf(tmp_path) as checkpoint:
        assert np.array_equal(checkpoint.tensors["lm_head.weight"].to_float32(), (embedding + 1).numpy())


def test_tensors_that_the_model_has_no_use_for(folder, recwarn):
    """Left out, as in transformers; all but frequencies and the image part are named."""
    state = hf_files.tensors(folder)
    extra = {"vision_tower.x.weight": torch.ones(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    hf_files.write(folder, state | extra)
    with read_hf(folder) as checkpoint:
        assert checkpoint.metadata["ignored"] == "1 tensors of vision_tower: images are not read"
    assert not recwarn.list
    more = {f"model.layers.{n}.mlp.up_proj.weight": torch.ones(2) for n in (7, 8, 9)}
    more |= {"model.layers.0.self_attn.q_proj.bias": torch.ones(4), "v_head.summary.weight": torch.ones(1)}
    hf_files.write(folder, state | extra | more)
    with pytest.warns(GemkitWarning, match="5 tensors the model has no use for.* and 1 more"):
        read_hf(folder).close()


# --- names -----------------------------------------------------------------------------------------------------------

AROUND = ["", "base_model.model.model.", "module.model.", "_orig_mod.model.", "language_model.", "model.model."]


@pytest.mark.parametrize("prefix", [*AROUND, "model.language_model.", "model.language_model.model."])
def test_names_of_the_text_model(folder, prefix):
    state = hf_files.tensors(folder)
    hf_files.write(folder, {prefix + key.removeprefix("model."): value for key, value in state.items()})
    with read_hf(folder) as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        for key, value in state.items():
            assert np.array_equal(checkpoint.tensors[key].to_float32(), value.numpy())


@pytest.mark.parametrize("head", ["lm_head.weight", "model.lm_head.weight", "base_model.model.lm_head.weight"])
def test_the_head_alone_is_the_embedding(folder, head):
    """safetensors.torch.save_model keeps one name of a shared tensor, the first."""
    state = hf_files.tensors(folder)
    embedding = state.pop("model.embed_tokens.weight")
    hf_files.write(folder, state | {head: embedding})
    with read_hf(folder) as checkpoint:
        assert checkpoint.config.tie_word_embeddings and "lm_head.weight" not in checkpoint.tensors
        assert np.array_equal(checkpoint.tensors["model.embed_tokens.weight"].to_float32(), embedding.numpy())
    edit(folder / "config.json", tie_word_embeddings=False)
    assert "missing model.embed_tokens.weight" in refusal(folder)
    hf_files.write(folder, state | {"model.embed_tokens.weight": embedding})
    assert "missing lm_head.weight" in refusal(folder) and "tie_word_embeddings" in refusal(folder)


# --- strictness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["number", "type", "same in another type", "same in two other types"])
def test_a_head_beside_the_embedding(folder, changed):
    state = hf_files.tensors(folder)
    embedding = state["model.embed_tokens.weight"].bfloat16().float()
    state["model.embed_tokens.weight"] = embedding
    other = embedding.clone()
    other[-1, -1] += 1
    head = {"number": other, "type": other.half()}.get(changed, embedding.double())
    if changed == "same in two other types":
        state["model.embed_tokens.weight"] = embedding.bfloat16()
    hf_files.write(folder, state | {"lm_head.weight": head})
    if changed.startswith("same"):
        with read_hf(folder) as checkpoint:
            assert checkpoint.config.tie_word_embeddings and "lm_head.weight" not in checkpoint.tensors
        return
    with pytest.warns(GemkitWarning, match="as transformers does"), read_hf(folder) as checkpoint:
        assert np.array_equal(checkpoint.tensors["lm_head.weight"].to_float32(), head.float().numpy())


def test_a_head_of_another_shape(folder):
    state = hf_files.tensors(folder)
    hf_files.write(folder, state | {"lm_head.weight": state["model.embed_tokens.weight"][:-1]})
    with pytest.warns(GemkitWarning):
        assert "lm_head.weight is [511, 96] but must be [512, 96]" in refusal(folder)


def test_wrong_tensors_are_named(saved_multimodal, folder, tmp_path):
    state = hf_files.tensors(folder)
    del state["model.layers.1.mlp.up_proj.weight"], state["model.norm.weight"]
    state["model.layers.0.self_attn.q_norm.weight"] = torch.ones(5)
    hf_files.write(folder, state)
    text = refusal(folder)
    assert "missing model.layers.1.mlp.up_proj.weight, model.norm.weight;" in text
    assert "model.layers.0.self_attn.q_norm.weight is [5] but must be [32]" in text
    # In a multimodal file the names are that file's
    multimodal, _ = saved_multimodal
    state = hf_files.tensors(multimodal)
    del state["language_model.model.layers.1.mlp.up_proj.weight"]
    other = shutil.copytree(multimodal, tmp_path / "other")
    hf_files.write(other, state)
    assert "missing language_model.model.layers.1.mlp.up_proj.weight;" in refusal(other)
    # Long lists are cut
    hf_files.write(folder, {key: value for key, value in state.items() if "embed" in key})
    assert "and 49 more;" in refusal(folder) and len(refusal(folder)) < 500


def test_sizes_that_are_wrong_or_left_out(folder):
    facts = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", vocab_size=500)
    assert "vocab_size 500, the embedding has 512 rows" in refusal(folder)
    edit(folder / "config.json", vocab_size=512, hidden_size=..., intermediate_size=...)
    assert "config.json has no hidden_size, intermediate_size" in refusal(folder) and len(refusal(folder)) < 700
    (folder / "config.json").write_text(json.dumps(facts))


def test_one_tensor_under_two_names(folder):
    state = hf_files.tensors(folder)
    hf_files.write(folder, state | {"language_model.model.norm.weight": state["model.norm.weight"]})
    read_hf(folder).close()
    hf_files.write(folder, state | {"language_model.model.norm.weight": state["model.norm.weight"] + 1})
    assert "one tensor and differ" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_other_types_become_float32(folder, dtype):
    state = hf_files.tensors(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    values = state[name].double() * (1 + 1e-12)
    hf_files.write(folder, state | {name: values.to(dtype)})
    with read_hf(folder) as checkpoint:
        tensor = checkpoint.tensors[name]
        assert tensor.type == GGMLType.F32
        assert np.array_equal(tensor.to_float32(), values.to(dtype).float().numpy())
    with pytest.raises(GemkitError, match="closed"):
        _ = tensor.data


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_code_of_eight_bits(folder, dtype):
    codes = torch.arange(256, dtype=torch.uint8).repeat(512 * 96 // 256).reshape(512, 96)
    state = hf_files.tensors(folder) | {"model.embed_tokens.weight": codes.view(dtype)}
    hf_files.write(folder, state)
    with read_hf(folder) as checkpoint:
        values = checkpoint.tensors["model.embed_tokens.weight"].to_float32()
    assert np.array_equal(values, codes.view(dtype).float().numpy(), equal_nan=True)


def test_integers_are_refused(folder):
    state = hf_files.tensors(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    hf_files.write(folder, state | {name: state[name].to(torch.int8)})
    text = refusal(folder)
    assert name in text and "is I8; gemkit reads F32, F16, BF16" in text and SINGLE in text


def test_a_deep_configuration(folder):
    edit(folder / "config.json", num_hidden_layers=60000, layer_types=None)
    assert "60000 layers" in refusal(folder)


def test_weights_that_the_configuration_names(folder):
    (folder / SINGLE).rename(folder / "mine.safetensors")
    (folder / "other.safetensors").write_bytes(b"x")
    edit(folder / "config.json", transformers_weights="mine.safetensors")
    read_hf(folder).close()
    edit(folder / "config.json", transformers_weights="../mine.safetensors")
    assert "no file of it" in refusal(folder)


def test_missing_and_broken_files(folder):
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.json", "config.json"):
        path = folder / name
        before = path.read_text() if path.exists() else None
        for broken in ("", "{", "[]", "null", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 99999, "\ud800", "\x00"):
            path.write_bytes(broken.encode("utf-8", "surrogatepass"))
            assert name in refusal(folder)
        path.unlink()
        path.mkdir()
        assert name in refusal(folder)
        path.rmdir()
        if before is not None:
            path.write_text(before)
    assert before is not None
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)
    assert "config.json" in refusal(folder / "nothing")
    edit(folder / "config.json", model_type="llama")
    assert "llama" in refusal(folder)


def test_changed_configurations_are_refused_or_read(folder):
    rng = np.random.default_rng(5)
    data = (folder / "config.json").read_bytes()
    refused = 0
    for _ in range(400):
        bad = bytearray(data)
        for at in rng.integers(0, len(data), 2).tolist():
            bad[at] = rng.choice(np.frombuffer(data, "u1"))
        (folder / "config.json").write_bytes(bad)
        try:
            read_hf(folder).close()
        except GemkitError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
            refused += 1
    assert 100 < refused < 400


# --- stop ids, names, chat -------------------------------------------------------------------------------------------


def test_stop_ids_of_both_files(folder):
    def stops(**generation) -> tuple[int, ...]:
        edit(folder / "generation_config.json", **generation)
        with read_hf(folder) as checkpoint:
            return checkpoint.config.stop_token_ids

    edit(folder / "config.json", eos_token_id=1)
    assert stops(eos_token_id=[1, 106]) == (1, 106)
    assert stops(eos_token_id=[50, 106, 50]) == (1, 50, 106)
    assert stops(eos_token_id=7) == (1, 7)
    assert stops(eos_token_id=None) == stops(eos_token_id=...) == (1,)
    edit(folder / "config.json", eos_token_id=[1, 49])
    assert stops(eos_token_id=50) == (1, 49, 50)
    (folder / "generation_config.json").unlink()
    with read_hf(folder) as checkpoint:
        assert checkpoint.config.stop_token_ids == (1, 49)
    assert stops(eos_token_id=[7, 512, -1]) == (1, 49, 7)  # ids that no token has
    for wrong in ("1", [1, None], True, 1.0, {}):
        edit(folder / "generation_config.json", eos_token_id=wrong)
        assert "generation_config.json" in refusal(folder)


def test_names(saved, tmp_path):
    def read(*parts: str):
        path = shutil.copytree(saved, tmp_path.joinpath(*parts))
        with read_hf(path) as checkpoint:
            return checkpoint.name, checkpoint.instruction_tuned

    assert read("gemma-3-1b-pt") == ("gemma-3-1b-pt", False)
    assert read("gemma-3-1b-it") == ("gemma-3-1b-it", True)
    assert read("models--google--gemma-3-1b-it", "snapshots", "0a1b") == ("google/gemma-3-1b-it", True)
    assert read("gemma-3", "transformers", "gemma-3-1b-pt", "1") == ("gemma-3-1b-pt", False)
    assert read("mine") == ("mine", False)


def test_chat_templates(folder):
    def template() -> str | None:
        with read_hf(folder) as checkpoint:
            assert checkpoint.instruction_tuned == (checkpoint.chat_template is not None)
            return checkpoint.chat_template

    assert template() is None
    edit(folder / "tokenizer_config.json", chat_template=None)
    assert template() is None
    edit(folder / "tokenizer_config.json", chat_template="one")
    assert template() == "one"
    edit(
        folder / "tokenizer_config.json", chat_template=[{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]
    )
    with pytest.warns(GemkitWarning, match="chat templates 'a', 'b' and none is the default: 'a' is used"):
        assert template() == "x"
    edit(folder / "tokenizer_config.json", chat_template={"default": "one", "tool_use": "no"})
    assert template() == "one"
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "default", "template": "two"}])
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("no")
    assert template() == "two"
    edit(folder / "chat_template.json", chat_template="three")
    assert template() == "three"
    (folder / "chat_template.jinja").write_text("four é")
    assert template() == "four é"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    assert "chat_template.jinja" in refusal(folder)
    (folder / "chat_template.jinja").unlink()
    edit(folder / "chat_template.json", chat_template=7)
    assert "chat_template.json" in refusal(folder)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def vocabulary(size: int) -> Vocabulary:
    """Control tokens, bytes, letters and their pairs."""
    pieces = [(p, PieceType.CONTROL) for p in ("<pad>", "<eos>", "<bos>")] + [("<unk>", PieceType.UNKNOWN)]
    pieces += [(f"<0x{byte:02X}>", PieceType.BYTE) for byte in range(256)]
    letters = "▁abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(a + b for a in letters for b in letters)]
    pieces += [(word, PieceType.NORMAL) for word in words]
    pieces[105:105] = [("<start_of_turn>", PieceType.CONTROL), ("<end_of_turn>", PieceType.CONTROL)]
    pieces = pieces[:size]
    scores = -np.arange(len(pieces), dtype=np.float32)
    return Vocabulary([p.encode() for p, _ in pieces], scores, np.array([kind for _, kind in pieces], np.int32))


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_tokenizer(folder, kind):
    """Read when asked for, keyed by its files; tokenizer.json goes first, as in transformers."""
    made = vocabulary(512)
    data = write_model(made) if kind == "tokenizer.model" else write_tokenizer_json(made)
    (folder / kind).write_bytes(data)
    if kind == "tokenizer.json":
        (folder / "tokenizer.model").write_bytes(b"never read")
    with read_hf(folder) as checkpoint:
        key = checkpoint.vocabulary_key
        assert checkpoint.vocabulary.pieces == made.pieces
        read = Tokenizer.from_vocabulary(checkpoint.vocabulary)
        expected = Tokenizer.from_vocabulary(made)
        assert read.encode("the dog bites <bos> é") == expected.encode("the dog bites <bos> é")
    edit(folder / "tokenizer_config.json", model_max_length=7)
    with read_hf(folder) as checkpoint:
        assert checkpoint.vocabulary_key != key
    for broken in (b"", b"\n", b"{}", data[:-9], b"\xff" * 99):
        (folder / kind).write_bytes(broken)
        with read_hf(folder) as checkpoint:  # generating from ids needs no vocabulary
            with pytest.raises(GemkitError, match=kind) as error:
                _ = checkpoint.vocabulary
            assert "\n" not in str(error.value)


def test_no_tokenizer(saved):
    with read_hf(saved) as checkpoint:
        assert checkpoint.vocabulary is None and checkpoint.vocabulary_key is None


def test_pieces_without_a_row(folder):
    """<image_soft_token> is the published tokenizers' last piece and has no row in text models; other pieces must."""
    control = vocabulary(512)
    more = Vocabulary(
        [*control.pieces, b"<image_soft_token>"], np.append(control.scores, 0), np.append(control.types, 3)
    )
    (folder / "tokenizer.model").write_bytes(write_model(more))
    with read_hf(folder) as checkpoint:
        assert len(checkpoint.vocabulary) == 513
    (folder / "tokenizer.model").write_bytes(write_model(vocabulary(514)))
    with read_hf(folder) as checkpoint, pytest.raises(GemkitError, match="piece 512"):
        _ = checkpoint.vocabulary
    # Multimodal towers have rows without pieces
    (folder / "tokenizer.model").write_bytes(write_model(vocabulary(480)))
    with read_hf(folder) as checkpoint:
        assert len(checkpoint.vocabulary) == 480


def test_dtypes_cover_what_is_read():
    assert set(TORCH) == {"F32", "F16", "BF16"}
