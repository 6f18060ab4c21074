"""Flax/Orbax folders: what orbax and the official layout say is what gemkit reads and writes. Budget: 30 s."""

import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from engine.vocabulary import vocabulary
from parity.cases import CASES
from parity.tolerances import REFERENCE_VS_TRANSFORMERS_F64, relative_error
from weights.files import tiny_checkpoint, tiny_config, tiny_params

from gemkit.arch import reference
from gemkit.arch.presets import PRESETS, Preset
from gemkit.errors import GemkitError
from gemkit.text.tokenizer import Tokenizer
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.google import flax_names, official
from gemkit.weights.google.orbax import read_orbax
from gemkit.weights.google.orbax_write import write_orbax
from gemkit.weights.open import open_checkpoint
from gemkit.weights.quant import GGMLType

from . import official_files as make

GENERATIONS = ("gemma1_2b", "gemma1_7b", "gemma2", "gemma3", "gemma3_27b")


def params_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: tensor.to_float32() for name, tensor in checkpoint.tensors.items()}


def refusal(path) -> str:
    with pytest.raises(GemkitError) as error, open_checkpoint(path) as checkpoint:
        params_of(checkpoint)
    assert "\n" not in str(error.value) and str(path) in str(error.value), error.value
    return str(error.value)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_official_arrays_mean_what_the_official_einsums_say(tmp_path, name):
    """Saved by orbax as released; the gating matrices in the orders in which that generation has them."""
    case = CASES[name]
    orders = {"gemma": (False,), "gemma2": (False, True), "gemma3_text": (True,)}[case.config.model_type]
    for transposed in orders:
        arrays = make.flax_arrays(case.config, transposed=transposed)
        folder = make.save_orbax(tmp_path / str(transposed), make.flax_flat(arrays), case.config)
        tokens = case.tokens()[:40]
        with open_checkpoint(folder) as checkpoint:
            assert checkpoint.config == case.config
            logits = reference.forward(checkpoint.config, params_of(checkpoint), tokens)
        expected = make.flax_logits(case.config, arrays, tokens, transposed=transposed)
        assert relative_error(logits, expected) < REFERENCE_VS_TRANSFORMERS_F64


def test_every_tree_and_storage_of_the_same_arrays_is_the_same_model(tmp_path):
    import jax

    config = CASES["qk_norm"].config
    arrays = make.flax_arrays(config, transposed=True)
    nested, flat = make.flax_nested(arrays), make.flax_flat(arrays)
    folders = [
        make.save_orbax(tmp_path / "flat", flat, config),
        make.save_orbax(tmp_path / "files", flat, config, use_ocdbt=False),
        make.save_orbax(tmp_path / "zarr3", flat, config, use_zarr3=True),
        make.save_orbax(tmp_path / "jax", jax.tree.map(jax.numpy.asarray, flat), config),
        make.save_orbax(tmp_path / "nested", nested, config),
        make.save_orbax(tmp_path / "inner", {"transformer": nested}, config),
        make.save_orbax(tmp_path / "training", {"params": nested, "opt_state": {"mu": nested}, "step": 3}, config),
    ]
    asked = ("model.embed_tokens.weight", "self_attn.v_proj.weight", "mlp.up_proj.weight", "self_attn.q_norm.weight")
    with read_orbax(folders[0]) as first:
        expected = {key: tensor.to_float32() for key, tensor in first.tensors.items() if key.endswith(asked)}
    for folder in folders[1:]:
        with open_checkpoint(folder) as checkpoint:
            for key, value in expected.items():
                assert np.array_equal(checkpoint.tensors[key].to_float32(), value), (folder, key)


def test_images_are_left_out(tmp_path):
    config = CASES["gemma3"].config
    tree = make.flax_flat(make.flax_arrays(config, transposed=True))
    tree["SigLiPFromPatches_0/siglip_encoder/embedding"] = {"kernel": np.zeros((2, 2), np.float32)}
    tree["transformer/embedder/mm_input_projection"] = {"w": np.zeros((2, 96), np.float32)}
    with open_checkpoint(make.save_orbax(tmp_path / "model", tree, config)) as checkpoint:
        assert "SigLiPFromPatches_0" in checkpoint.metadata["ignored"]
        assert "mm_input_projection" in checkpoint.metadata["ignored"]


def test_all_presets_are_known_by_their_sizes(tmp_path):
    for preset in PRESETS.values():
        c = preset.config
        for rows in {c.vocab_size, flax_names.PADDED_ROWS.get(c.vocab_size, c.vocab_size)}:
            sizes = official.Sizes(
                rows,
                c.hidden_size,
                c.intermediate_size,
                c.num_hidden_layers,
                c.num_attention_heads * c.head_dim,
                c.num_key_value_heads * c.head_dim,
                c.qk_norm,
                c.post_norms,
            )
            assert official.find_config(tmp_path, sizes, tmp_path, flax_names.PADDED_ROWS) == c, preset.name


def test_a_released_archive_needs_no_config(tmp_path, monkeypatch):
    """The arrays in a folder, the tokenizer next to it; the embedding has rows behind the vocabulary's end."""
    config = CASES["gemma1_2b"].config
    arrays = make.flax_arrays(config, transposed=False)
    table = arrays["embedder/input_embedding"]
    padded = np.concatenate([table, np.ones((8, table.shape[1]), np.float32)])
    make.save_orbax(tmp_path / "2b-it", make.flax_flat(arrays | {"embedder/input_embedding": padded}))
    write_orbax(tmp_path / "other", tiny("gemma"))
    (tmp_path / "other" / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    with pytest.raises(GemkitError, match=r"no published Gemma has 2 layers .*config\.json"):
        read_orbax(tmp_path / "2b-it")
    monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", "google/tiny", True, config))
    monkeypatch.setitem(flax_names.PADDED_ROWS, 512, 520)
    with read_orbax(tmp_path / "2b-it") as checkpoint:
        assert checkpoint.config == config and checkpoint.name == "2b-it" and checkpoint.instruction_tuned
        assert np.array_equal(checkpoint.tensors["model.embed_tokens.weight"].to_float32(), table)
        assert checkpoint.metadata["ignored"] == "8 rows behind the vocabulary"
        assert len(checkpoint.vocabulary) == len(vocabulary().pieces) and checkpoint.vocabulary_key
    with pytest.raises(GemkitError, match="several"):
        read_orbax(tmp_path)
    os.rename(tmp_path / "other", tmp_path.parent / f"{tmp_path.name}-other")
    with open_checkpoint(tmp_path) as checkpoint:  # the archive's top
        assert checkpoint.name == "2b-it"


# --- what is written -------------------------------------------------------------------------------------------------


def tiny(model_type: str = "gemma3_text", kind: GGMLType = GGMLType.F32) -> Checkpoint:
    config = tiny_config(model_type, vocab_size=len(vocabulary().pieces))
    return Checkpoint.from_params(config, tiny_params(config), kind, vocabulary(), name="Tiny", chat_template="{{ x }}")


def distinct_cases() -> list[str]:
    """Cases that the layout can state, one for each configuration."""
    stated = [c for c in CASES.values() if c.config.tie_word_embeddings and c.config.rms_norm_eps == 1e-6]
    return list({case.config: case.name for case in stated}.values())


@pytest.mark.parametrize("name", distinct_cases())
def test_there_and_back_is_the_same_to_the_bit(tmp_path, name):
    case = CASES[name]
    params = case.params()
    folder = write_orbax(tmp_path / "model", Checkpoint.from_params(case.config, params))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == case.config
        for key, value in params.items():
            assert np.array_equal(checkpoint.tensors[key].to_float32(), value), key


def test_bfloat16_stays_and_other_types_become_float32(tmp_path):
    for kind, expected in ((GGMLType.BF16, "BF16"), (GGMLType.F16, "F32"), (GGMLType.Q8_0, "F32")):
        start = tiny_checkpoint("gemma", kind)
        with read_orbax(write_orbax(tmp_path / kind.name, start)) as checkpoint:
            for key, tensor in start.tensors.items():
                assert np.array_equal(checkpoint.tensors[key].to_float32(), tensor.to_float32())
                assert checkpoint.tensors[key].type.name == ("F32" if len(tensor.shape) == 1 else expected)


def test_orbax_itself_reads_the_released_keys(tmp_path):
    """The arrays by the official paths, shapes and types, in the form that the official loader asks for."""
    import jax
    import orbax.checkpoint as ocp

    for name, transposed in (("gemma1_2b", False), ("gemma1_7b", False), ("qk_norm", True)):
        config = CASES[name].config
        arrays = make.flax_arrays(config, transposed=transposed)
        source = make.save_orbax(tmp_path / f"{name}-theirs", make.flax_flat(arrays), config)
        with read_orbax(source) as checkpoint:
            folder = write_orbax(tmp_path / name, checkpoint)
        with ocp.StandardCheckpointer() as reader:
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), reader.metadata(folder).item_metadata.tree
            )
            found = reader.restore(folder, shapes)
        expected = make.flax_flat(arrays)
        assert found.keys() == expected.keys()
        for key, leaves in expected.items():
            assert found[key].keys() == leaves.keys()
            for leaf, array in leaves.items():
                assert np.array_equal(found[key][leaf], array), key


def test_gating_is_written_as_the_official_class_of_that_size_has_it():
    expected = {"gemma-2-2b": False, "gemma-2-9b": True, "gemma-2-27b": True, "gemma-7b": False, "gemma-3-1b-pt": True}
    assert {name: flax_names.is_transposed(PRESETS[name].config) for name in expected} == expected


def test_tokenizer_template_and_notice_go_along(tmp_path):
    start = tiny()
    folder = write_orbax(tmp_path / "model", start)
    text = "the sea was calm\nand 42"
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.chat_template == "{{ x }}" and checkpoint.instruction_tuned
        ids = Tokenizer.from_vocabulary(checkpoint.vocabulary).encode(text)
    assert ids == Tokenizer.from_vocabulary(start.vocabulary).encode(text)
    assert "Gemma Terms of Use" in (folder / "NOTICE").read_text()


def test_writing_holds_one_array_and_reports_progress(tmp_path):
    config = tiny_config("gemma", num_hidden_layers=8, hidden_size=256, intermediate_size=1024)
    start = Checkpoint.from_params(config, tiny_params(config), GGMLType.BF16)
    write_orbax(tmp_path / "imports", tiny())
    seen = []
    tracemalloc.start()
    try:
        write_orbax(tmp_path / "model", start, progress=lambda done, total: seen.append((done, total)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    total = seen[-1][1]
    largest = 2 * config.hidden_size * config.intermediate_size * 2
    assert seen[-1][0] == total and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert peak < 6 * largest < total, (peak, largest, total)


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    start = tiny("gemma")
    folder = write_orbax(tmp_path / "model", start)
    with pytest.raises(GemkitError, match="exists"):
        write_orbax(folder, start)
    monkeypatch.setattr("gemkit.weights.google.orbax_write.NOTICE", None)
    with pytest.raises(TypeError):
        write_orbax(tmp_path / "half", start)
    monkeypatch.undo()
    start.tensors["model.layers.1.mlp.up_proj.weight"]._data = None  # fails when half of the arrays are written
    with pytest.raises(GemkitError, match="closed"):
        write_orbax(tmp_path / "half", start)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_the_layout_cannot_state_is_refused(tmp_path):
    for name, word in (("untied_embedding", "output matrix"), ("norm_eps", "epsilon")):
        case = CASES[name]
        with pytest.raises(GemkitError, match=word):
            write_orbax(tmp_path / name, Checkpoint.from_params(case.config, case.params()))
    assert not list(tmp_path.iterdir())


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    folder = write_orbax(tmp_path / "model", tiny("gemma"))
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(GemkitError, match="orbax-checkpoint: pip install"):
        open_checkpoint(folder)
    with pytest.raises(GemkitError, match="orbax-checkpoint: pip install"):
        write_orbax(tmp_path / "other", tiny("gemma"))


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def arrays():
    return make.flax_arrays(CASES["gemma2"].config, transposed=True)


def saved(tmp_path, arrays, **options):
    return make.save_orbax(tmp_path / "model", make.flax_flat(arrays), CASES["gemma2"].config, **options)


def test_missing_transposed_foreign_and_quantised_arrays_are_named(tmp_path, arrays):
    del arrays["layer_2/mlp/linear"]
    arrays["layer_1/attn/q_einsum/w"] = arrays["layer_1/attn/q_einsum/w"].swapaxes(1, 2).copy()
    arrays["layer_0/attn/attn_vec_einsum/w"] = arrays["layer_0/attn/attn_vec_einsum/w"].astype(np.int8)
    arrays["layer_3/attn/lora/a"] = np.zeros(3, np.float32)
    text = refusal(saved(tmp_path, arrays))
    assert "missing layer_2/mlp/linear" in text and "unknown 'layer_3/attn/lora/a'" in text
    assert "layer_1/attn/q_einsum/w is [4, 32, 96] but must be [4, 96, 32]" in text
    assert "layer_0/attn/attn_vec_einsum/w is 'int8'" in text


@pytest.mark.parametrize("name", ["embedder/input_embedding", "layer_0/mlp/linear", "layer_0/attn/kv_einsum/w"])
def test_without_the_arrays_that_tell_the_sizes_one_is_named(tmp_path, arrays, name):
    del arrays[name]
    assert name in refusal(saved(tmp_path, arrays))


def test_other_trees_are_no_gemma(tmp_path):
    text = refusal(make.save_orbax(tmp_path / "other", {"encoder": {"w": np.zeros(3, np.float32)}}))
    assert "'encoder/w' and no layer_0" in text
    text = refusal(
        make.save_orbax(tmp_path / "far", {"layer_999999": {"mlp": {"linear": np.zeros((3, 3), np.float32)}}})
    )
    assert "layer 999999" in text


def test_a_lost_or_damaged_piece_names_its_array(tmp_path, arrays):
    """Without a database, an array is a folder with one file for each piece."""
    folder = saved(tmp_path, arrays, use_ocdbt=False)
    piece = next(path for path in folder.rglob("layer_1/mlp/linear.w/*") if not path.name.startswith("."))
    data = piece.read_bytes()
    piece.write_bytes(data[: len(data) // 2])
    assert "layer_1/mlp/linear cannot be read" in refusal(folder)
    piece.unlink()
    piece.symlink_to(piece)
    assert "layer_1/mlp/linear cannot be read" in refusal(folder)
    piece.unlink()
    assert "layer_1/mlp/linear cannot be read" in refusal(folder)


def test_a_damaged_database_is_one_line(tmp_path, arrays):
    folder = saved(tmp_path, arrays)
    for path in sorted(folder.rglob("d/*")):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    assert "damaged" in refusal(folder)
    (folder / "manifest.ocdbt").write_bytes(b"")
    assert "damaged" in refusal(folder)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"{}", b'{"tree_metadata": 3}', b"\xff\xfe", b"[" * 100_000, b'{"tree_metadata": {"a": 1}}'],
)
def test_broken_metadata_is_one_line(tmp_path, arrays, text):
    folder = saved(tmp_path, arrays)
    (folder / "_METADATA").write_bytes(text)
    refusal(folder)


def test_a_loop_of_links_is_no_folder(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refusal(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "_METADATA").symlink_to(tmp_path / "inner" / "_METADATA")
    refusal(tmp_path)


def test_a_config_of_another_model_is_refused(tmp_path, arrays):
    folder = saved(tmp_path, arrays)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"intermediate_size": 192}))
    assert "layer_0/mlp/linear is [128, 96] but must be [192, 96]" in refusal(folder)


def test_a_closed_checkpoint_says_so(tmp_path):
    checkpoint = read_orbax(write_orbax(tmp_path / "model", tiny("gemma")))
    checkpoint.close()
    with pytest.raises(GemkitError, match="closed"):
        _ = checkpoint.tensors["model.norm.weight"].data


def test_damage_prints_nothing_else(tmp_path, arrays):
    """The library's threads come back after a failure, and would complain on the terminal."""
    folder = saved(tmp_path, arrays)
    for path in sorted(folder.rglob("d/*")):
        path.write_bytes(path.read_bytes()[:-40])
    code = (
        "from gemkit.errors import GemkitError\nfrom gemkit.weights.open import open_checkpoint\n"
        f"try: open_checkpoint({str(folder)!r})\nexcept GemkitError as error: print('damaged' in str(error))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr, run.returncode) == ("True\n", "", 0)
