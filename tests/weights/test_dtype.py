"""Conversion of whole checkpoints: exact where it can be, bounded in memory, and described. Budget: 6 s."""

import tracemalloc

import numpy as np
import pytest
import torch

from gemkit.arch.tensors import manifest
from gemkit.errors import GemkitError, UsageError
from gemkit.weights import dtype as dtypes
from gemkit.weights.checkpoint import Checkpoint, Tensor
from gemkit.weights.dtype import Converted, convert, describe
from gemkit.weights.gguf.read import read_gguf
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.quant import GGMLType, nbytes, quantise

from . import files
from .hf_files import native_logits


def stored(kind: GGMLType = GGMLType.BF16, **changes) -> Checkpoint:
    """All tensors in one type, norms too, as in a Hugging Face file."""
    config = files.tiny_config("gemma3_text", **changes)
    return Checkpoint.from_params(config, files.tiny_params(config), lambda name: kind, name="Tiny")


def test_auto_is_the_checkpoint_itself():
    checkpoint = stored()
    assert convert(checkpoint, "auto") is checkpoint
    assert describe(checkpoint) == "weights: bfloat16 (BF16) as stored, 2.00 bytes a parameter"


@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.F16, GGMLType.BF16])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8"])
def test_equals_conversion_at_once(name, kind, monkeypatch):
    """In pieces of a few rows as in one go; what has the type already is not touched."""
    monkeypatch.setattr(dtypes, "_CHUNK_ELEMENTS", 70)
    checkpoint = stored(kind)
    converted = convert(checkpoint, name)
    target = {"float32": GGMLType.F32, "bfloat16": GGMLType.BF16, "int8": GGMLType.Q8_0}[name]
    for key, tensor in checkpoint.tensors.items():
        got = converted.tensors[key]
        wanted = target if len(tensor.shape) == 2 else GGMLType.F32
        assert got.type == wanted and got.shape == tensor.shape and got.nbytes == nbytes(wanted, got.shape)
        assert np.array_equal(got.data, quantise(wanted, tensor.to_float32()))
        assert (got is tensor) == (wanted == kind)
        if len(tensor.shape) == 1:
            assert np.array_equal(got.to_float32(), tensor.to_float32())
    assert converted.config == checkpoint.config and converted.name == "Tiny"


def test_bfloat16_equals_torch():
    checkpoint = stored(GGMLType.F32)
    for key, tensor in convert(checkpoint, "bfloat16").tensors.items():
        if len(tensor.shape) == 2:
            expected = torch.from_numpy(checkpoint.tensors[key].to_float32()).bfloat16()
            assert tensor.data.tobytes() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kind", [GGMLType.Q4_K, GGMLType.Q8_0])
def test_from_a_quantised_gguf(tmp_path, kind):
    """GGUF keeps norms as 1 + w: they must not be added to twice, nor lose bits."""
    changes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "query_pre_attn_scalar": 64}
    path = write_gguf(tmp_path / "x.gguf", files.tiny_checkpoint("gemma3_text", kind, **changes))
    tokens = np.arange(40) * 3 % files.ROWS
    with read_gguf(path) as checkpoint:
        exact = convert(checkpoint, "float32")
        for key, tensor in checkpoint.tensors.items():
            assert np.array_equal(exact.tensors[key].to_float32(), tensor.to_float32())
            assert exact.tensors[key].add_one == tensor.add_one
        expected = native_logits(checkpoint.config, checkpoint.tensors, tokens)
        assert np.array_equal(native_logits(exact.config, exact.tensors, tokens), expected)
        eight = convert(checkpoint, "int8")
        embedding = "model.embed_tokens.weight"
        assert (eight.tensors[embedding] is checkpoint.tensors[embedding]) == (kind == GGMLType.Q8_0)
        origin = "as stored" if kind == GGMLType.Q8_0 else "from Q4_K"
        assert describe(eight).startswith(f"weights: int8 (Q8_0) {origin}, 1.0")
        assert describe(exact) == f"weights: float32 (F32) from {kind.name}, 4.00 bytes a parameter"
        assert eight.vocabulary_key == checkpoint.vocabulary_key is not None
        assert eight.vocabulary.pieces == checkpoint.vocabulary.pieces


def test_mixed_types_are_all_named():
    config = files.tiny_config("gemma3_text", hidden_size=256)
    kinds = dict.fromkeys(manifest(config), GGMLType.F32)
    kinds |= {"model.embed_tokens.weight": GGMLType.Q6_K, "model.layers.0.mlp.up_proj.weight": GGMLType.Q4_K}
    checkpoint = Checkpoint.from_params(config, files.tiny_params(config), kinds)
    assert describe(checkpoint).startswith("weights: F32, Q6_K, Q4_K as stored, ")
    assert describe(convert(checkpoint, "int8")).startswith("weights: int8 (Q8_0) from F32, Q6_K, Q4_K, 1.0")


def test_nothing_is_converted_before_it_is_asked_for_and_nothing_is_kept():
    checkpoint = stored(GGMLType.F32, vocab_size=100_000, hidden_size=128, num_hidden_layers=1)
    size = checkpoint.tensors["model.embed_tokens.weight"].nbytes
    tracemalloc.start()
    try:
        converted = convert(checkpoint, "int8")
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
        tensor = converted.tensors["model.embed_tokens.weight"]
        assert isinstance(tensor, Converted)
        data = tensor.data
        now, peak = tracemalloc.get_traced_memory()
        assert data.nbytes <= now < data.nbytes + (1 << 20)
        assert peak < data.nbytes + (16 << 20) < size
        del data
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()


def test_closing_either_closes_both():
    for close in (0, 1):
        checkpoint = stored()
        converted = convert(checkpoint, "int8")
        (checkpoint, converted)[close].close()
        with pytest.raises(GemkitError, match="closed"):
            _ = converted.tensors["model.embed_tokens.weight"].data
        assert converted.tensors["model.embed_tokens.weight"].nbytes == files.ROWS * 34
    closed = []
    config = files.tiny_config("gemma")
    tensors = stored_tensors(config)
    convert(Checkpoint(config, tensors, close=lambda: closed.append(1)), "int8").close()
    assert closed == [1]


def stored_tensors(config) -> dict[str, Tensor]:
    params = files.tiny_params(config)
    return {name: Tensor(GGMLType.F32, value.shape, quantise(GGMLType.F32, value)) for name, value in params.items()}


def test_what_does_not_fit_is_named():
    config = files.tiny_config("gemma", hidden_size=48)
    checkpoint = Checkpoint.from_params(config, files.tiny_params(config))
    with pytest.raises(GemkitError, match=r"^model\.embed_tokens\.weight: rows of 48 numbers") as error:
        convert(checkpoint, "int8")
    assert "\n" not in str(error.value)
    convert(checkpoint, "bfloat16")
    with pytest.raises(UsageError, match="float32, bfloat16, float16, int8"):
        convert(checkpoint, "int4")
    params = files.tiny_params(config := files.tiny_config("gemma"))
    params["model.layers.1.mlp.up_proj.weight"][5, 7] = np.inf
    converted = convert(Checkpoint.from_params(config, params), "int8")
    with pytest.raises(GemkitError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: .*finite"):
        _ = converted.tensors["model.layers.1.mlp.up_proj.weight"].data
