"""Gemma models in GGUF: the demo file, configurations of all families, strictness. Budget: 20 s."""

import dataclasses
import time

import gguf as peer
import numpy as np
import pytest
from weights import files

from gemkit.arch.config import ModelConfig
from gemkit.arch.presets import PRESETS, preset
from gemkit.errors import GemkitError
from gemkit.hub.demo import demo_path
from gemkit.weights.checkpoint import Checkpoint, Tensor
from gemkit.weights.gguf.read import GGUFFile, config_from_metadata, read_gguf
from gemkit.weights.gguf.write import _model_pairs, write_gguf
from gemkit.weights.quant import GGMLType, quantise

FAMILIES = ["gemma", "gemma2", "gemma3_text"]


@pytest.fixture(scope="module")
def demo():
    with read_gguf(demo_path()) as checkpoint:
        yield checkpoint


def test_the_demo_model(demo: Checkpoint):
    assert demo.config == preset("gemma-3-270m").config
    assert len(demo.tensors) == 236
    assert sum(int(np.prod(t.shape)) for t in demo.tensors.values()) == demo.config.parameter_count() == 268_098_176
    assert (demo.instruction_tuned, demo.chat_template, demo.name) == (False, None, "Gemma 3 270m")
    assert demo.source == demo_path()
    assert demo.metadata["general.file_type"] == 15
    assert len(demo.vocabulary_key) == 64
    norm = demo.tensors["model.norm.weight"]
    stored = norm.data.view("<f4")
    np.testing.assert_array_equal(norm.to_float32(), stored - np.float32(1))


def test_the_demo_model_as_gguf_py_reads_it(demo: Checkpoint):
    theirs = peer.GGUFReader(demo_path())
    field = theirs.fields["tokenizer.ggml.tokens"]
    assert demo.vocabulary.pieces == [field.parts[i].tobytes() for i in field.data]
    for key, mine in (("scores", demo.vocabulary.scores), ("token_type", demo.vocabulary.types)):
        field = theirs.fields[f"tokenizer.ggml.{key}"]
        np.testing.assert_array_equal(mine, np.concatenate([field.parts[i] for i in field.data]))
    with GGUFFile.open(demo_path()) as file:
        assert list(file.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            mine = file.tensors[tensor.name]
            assert (mine.shape, mine.type) == (tuple(tensor.shape[::-1].tolist()), tensor.tensor_type)
            assert mine.data.ctypes.data - file.tensors["output_norm.weight"].data.ctypes.data == (
                tensor.data_offset - theirs.get_tensor(0).data_offset
            )


def test_opening_is_fast(demo: Checkpoint):
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        read_gguf(demo.source).close()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.08


def round_trip(tmp_path, checkpoint: Checkpoint) -> Checkpoint:
    path = write_gguf(tmp_path / "model.gguf", checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    return read_gguf(path)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0, GGMLType.Q5_1])
def test_write_and_read_again(tmp_path, model_type: str, kind: GGMLType):
    before = files.tiny_checkpoint(model_type, kind)
    with round_trip(tmp_path, before) as after:
        assert after.config == before.config
        assert after.name == "Tiny"
        assert after.vocabulary.pieces == before.vocabulary.pieces
        np.testing.assert_array_equal(after.vocabulary.scores, before.vocabulary.scores)
        assert list(after.tensors) == list(before.tensors)
        for name, tensor in before.tensors.items():
            back = after.tensors[name]
            if back.add_one:  # the file holds float32(1 + w)
                np.testing.assert_array_equal(
                    back.data.view("<f4"), (1 + tensor.to_float32().astype(np.float64)).astype(np.float32)
                )
            else:
                assert back.type == tensor.type
                np.testing.assert_array_equal(back.data, tensor.data)
        again = write_gguf(tmp_path / "again.gguf", after)
        assert again.read_bytes() == after.source.read_bytes()


@pytest.mark.parametrize("name", PRESETS)
def test_every_published_configuration_survives(name: str):
    config = PRESETS[name].config
    pairs = {key: value for key, (_, value) in _model_pairs(config).items()}
    shapes = dict.fromkeys(map(str, range(config.num_hidden_layers)), (1,))
    shapes["token_embd.weight"] = (config.vocab_size, config.hidden_size)
    assert config_from_metadata(pairs, shapes) == config


def facts(architecture: str, **more: object) -> dict[str, object]:
    """The minimal key-values of a file."""
    return {
        "general.architecture": architecture,
        f"{architecture}.block_count": 7,
        f"{architecture}.embedding_length": 32,
        f"{architecture}.feed_forward_length": 64,
        f"{architecture}.context_length": 100,
        f"{architecture}.attention.head_count": 4,
        f"{architecture}.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    } | {f"{architecture}.{key.replace('__', '.')}": value for key, value in more.items()}


SHAPES = {f"t{i}": (1,) for i in range(7)} | {"token_embd.weight": (272, 32)}


def config(architecture: str, **more: object) -> ModelConfig:
    return config_from_metadata(facts(architecture, **more), SHAPES)


def test_what_llama_cpp_assumes():
    one, two = config("gemma"), config("gemma2")
    three = config("gemma3", attention__sliding_window=8, rope__freq_base=1e6)
    assert one.rms_norm_eps == 1e-6
    assert (one.num_key_value_heads, one.head_dim, one.query_pre_attn_scalar, one.bos_token_id) == (4, 8, 8, 2)
    assert {(x.sliding_window, x.rope_theta) for x in one.layers} == {(None, 10_000.0)}
    assert [x.sliding_window for x in two.layers] == [4096, None, 4096, None, 4096, None, 4096]
    assert (two.attn_logit_softcapping, two.final_logit_softcapping) == (50.0, 30.0)
    assert [x.sliding_window for x in three.layers] == [8, 8, 8, 8, 8, None, 8]
    assert [x.rope_theta for x in three.layers] == [1e4] * 5 + [1e6, 1e4]
    assert (three.qk_norm, two.qk_norm, one.post_norms, two.post_norms) == (True, False, False, True)
    assert {x.sliding_window for x in config("gemma3").layers} == {None}


def test_factors_patterns_and_query_scales():
    scaled = {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}
    three = config("gemma3", attention__sliding_window=8, **scaled)
    assert [x.rope_factor for x in three.layers] == [1, 1, 1, 1, 1, 8, 1]
    assert {x.rope_factor for x in config("gemma", **scaled).layers} == {8}
    three = config("gemma3", attention__sliding_window=8, attention__sliding_window_pattern=3)
    assert [x.sliding_window for x in three.layers] == [8, 8, None, 8, 8, None, 8]
    big = config("gemma2", attention__key_length=16, attention__value_length=16)
    assert big.query_pre_attn_scalar == 16
    shapes = SHAPES | {f"x{i}": (1,) for i in range(62)}
    for architecture, layers in (("gemma2", 46), ("gemma3", 62)):
        more = {"block_count": layers, "attention__key_length": 16, "attention__value_length": 16}
        assert config_from_metadata(facts(architecture, **more), shapes).query_pre_attn_scalar == 8


@pytest.mark.parametrize(
    ("message", "architecture", "changes"),
    [
        ("architecture is 'llama'", "llama", {}),
        ("yarn", "gemma3", {"rope__scaling__type": "yarn"}),
        ("values 8", "gemma", {"attention__key_length": 16, "attention__value_length": 8}),
        ("block_count is 0", "gemma", {"block_count": 0}),
        ("2147483647 layers", "gemma", {"block_count": 2**31 - 1}),
        ("block_count is 4294967295", "gemma", {"block_count": 2**32 - 1}),
        ("not of type int", "gemma", {"block_count": "7"}),
        ("not of type int", "gemma", {"block_count": True}),
        ("rms_norm_eps is nan", "gemma", {"attention__layer_norm_rms_epsilon": float("nan")}),
        ("rope_theta is inf", "gemma", {"rope__freq_base": 1e300}),
        ("head_count_kv is 0", "gemma", {"attention__head_count_kv": 0}),
        ("cannot share", "gemma", {"attention__head_count_kv": 3}),
        ("key_length is 0", "gemma", {"attention__head_count": 64}),
    ],
)
def test_bad_key_values(message: str, architecture: str, changes: dict):
    with pytest.raises(GemkitError, match=message):
        config(architecture, **changes)


@pytest.mark.parametrize("key", sorted(facts("gemma")))
def test_a_missing_key_is_named(key: str):
    with pytest.raises(GemkitError, match=f"{key} is missing"):
        config_from_metadata({k: v for k, v in facts("gemma").items() if k != key}, SHAPES)


def test_every_wrong_tensor_is_named(tmp_path):
    checkpoint = files.tiny_checkpoint()
    whole = write_gguf(tmp_path / "m.gguf", checkpoint).read_bytes()

    def broken(*swaps: tuple[bytes, bytes]) -> str:
        data = whole
        for old, new in swaps:
            assert data.count(old) == 1 and len(old) == len(new)
            data = data.replace(old, new)
        with pytest.raises(GemkitError) as caught:
            read_gguf(files.write(tmp_path / "broken.gguf", data))
        assert "\n" not in str(caught.value) and str(tmp_path / "broken.gguf") in str(caught.value)
        return str(caught.value)

    text = broken((b"blk.3.attn_q.weight", b"blk.3.attn_x.weight"), (b"blk.0.ffn_up.weight", b"blk.9.ffn_up.weight"))
    for name in ("missing", "unknown", "blk.3.attn_q.weight", "blk.3.attn_x.weight", "blk.0.ffn_up", "blk.9.ffn_up"):
        assert name in text
    shape = files.info("blk.1.ffn_norm.weight", (32,), 0, 0)[:-8]
    text = broken((shape, files.info("blk.1.ffn_norm.weight", (31,), 0, 0)[:-8]))
    assert "blk.1.ffn_norm.weight is [31] but must be [32]" in text
    assert "architecture is 'gemmaX'" in broken(
        (b"general.architecture\x08\0\0\0\x06\0\0\0\0\0\0\0gemma3",) * 1
        + (b"general.architecture\x08\0\0\0\x06\0\0\0\0\0\0\0gemmaX",)
    )


def test_instruction_tuned(tmp_path):
    for name, template, expected in [
        ("Gemma 3 270m It", None, True),
        ("gemma-2-2b-it", None, True),
        ("Gemma 3 4b Instruct", None, True),
        ("gemma-3-1b-pt", None, False),
        ("Gemma 7b", None, False),
        ("Gemma 7b", "{{ messages }}", True),
        ("Unity", None, False),
    ]:
        checkpoint = files.tiny_checkpoint()
        checkpoint.name, checkpoint.chat_template = name, template
        with read_gguf(write_gguf(tmp_path / "m.gguf", checkpoint)) as after:
            assert (after.instruction_tuned, after.chat_template) == (expected, template)


def test_an_untied_output_and_the_ignored_tensor(tmp_path):
    untied = files.tiny_checkpoint("gemma", tie_word_embeddings=False)
    with round_trip(tmp_path, untied) as after:
        assert not after.config.tie_word_embeddings and "lm_head.weight" in after.tensors


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_file_of_gguf_pys_writer(tmp_path, model_type: str):
    mine = files.tiny_checkpoint(model_type, GGMLType.F32, vocab_size=269)
    c = mine.config
    architecture = model_type.removesuffix("_text")
    writer = peer.GGUFWriter(tmp_path / "peer.gguf", architecture)
    writer.add_name("Tiny it")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(1e6 if model_type == "gemma3_text" else 1e4)
    if model_type != "gemma":
        writer.add_sliding_window(8)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(mine.vocabulary.pieces)
    writer.add_token_scores(mine.vocabulary.scores.tolist())
    writer.add_token_types(mine.vocabulary.types.tolist())
    writer.add_bos_token_id(2)
    path = write_gguf(tmp_path / "mine.gguf", mine)
    values = {}
    with GGUFFile.open(path) as file:
        for name, tensor in file.tensors.items():
            values[name] = tensor.data.view("<f4").reshape(tensor.shape).copy()
            big = len(tensor.shape) > 1
            raw = quantise(GGMLType.Q8_0, values[name]).reshape(len(values[name]), -1) if big else values[name]
            writer.add_tensor(name, raw, raw_dtype=peer.GGMLQuantizationType.Q8_0 if big else None)
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with read_gguf(tmp_path / "peer.gguf") as theirs, read_gguf(path) as ours:
        assert theirs.config == c
        assert theirs.instruction_tuned
        assert theirs.vocabulary.pieces == mine.vocabulary.pieces
        assert "rope_freqs.weight" not in theirs.tensors
        for name, tensor in ours.tensors.items():
            if tensor.add_one:
                np.testing.assert_array_equal(theirs.tensors[name].to_float32(), tensor.to_float32())
            else:
                np.testing.assert_array_equal(theirs.tensors[name].data, quantise(GGMLType.Q8_0, tensor.to_float32()))


def test_closing_lets_the_file_go(tmp_path):
    checkpoint = round_trip(tmp_path, files.tiny_checkpoint())
    tensor = checkpoint.tensors["model.norm.weight"]
    key = checkpoint.vocabulary_key
    checkpoint.close()
    checkpoint.close()
    assert tensor.nbytes == 128 and checkpoint.vocabulary_key == key
    for use in (lambda: tensor.data, tensor.to_float32, lambda: checkpoint.vocabulary):
        with pytest.raises(GemkitError, match="closed"):
            use()
    try:
        maps = open("/proc/self/maps").read()
    except OSError:
        maps = ""
    assert str(tmp_path / "model.gguf") not in maps


def test_the_vocabulary_key_follows_the_vocabulary(tmp_path):
    keys = []
    for change in (None, "name", "pieces", "scores"):
        checkpoint = files.tiny_checkpoint()
        if change == "name":
            checkpoint.name = "Other"
        elif change == "pieces":
            checkpoint.vocabulary.pieces[-1] = b"q7"
        elif change == "scores":
            checkpoint.vocabulary.scores[7] = -1
        with read_gguf(write_gguf(tmp_path / "m.gguf", checkpoint)) as after:
            keys.append(after.vocabulary_key)
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_from_params_checks_its_tensors():
    config = files.tiny_config("gemma")
    params = files.tiny_params(config)
    with pytest.raises(GemkitError, match=r"missing model\.norm\.weight"):
        Checkpoint.from_params(config, {k: v for k, v in params.items() if k != "model.norm.weight"})
    mixed = Checkpoint.from_params(config, params, {"model.embed_tokens.weight": GGMLType.Q4_0})
    assert mixed.tensors["model.embed_tokens.weight"].type == GGMLType.Q4_0
    assert mixed.tensors["model.layers.0.mlp.up_proj.weight"].type == GGMLType.F32
    with pytest.raises(GemkitError, match="bytes are not"):
        Tensor(GGMLType.F32, (3,), np.zeros(11, np.uint8))


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    checkpoint = files.tiny_checkpoint()
    old = files.write(tmp_path / "m.gguf", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemkit.cache.os.replace", full)
    with pytest.raises(GemkitError, match="No space left"):
        write_gguf(old, checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"] and old.read_bytes() == b"old"
    odd = dataclasses.replace(checkpoint.config, query_pre_attn_scalar=3)
    checkpoint.config = odd
    with pytest.raises(GemkitError, match="cannot state this query_pre_attn_scalar"):
        write_gguf(tmp_path / "odd.gguf", checkpoint)
