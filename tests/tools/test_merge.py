"""Merged models: the logits of the adapter, unmerged, by the native engine, the reference and peft. Budget: 20 s."""

import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from engine.vocabulary import vocabulary
from parity import transformers_models as hf
from parity.tolerances import NATIVE_FLOAT32, REFERENCE_VS_TRANSFORMERS_F32, TRAIT_MARGIN, relative_error
from weights import hf_files
from weights.adapters import trained_parts
from weights.files import tiny_config, tiny_params

from gemkit.arch import reference
from gemkit.errors import GemkitError, UsageError
from gemkit.tools.merge import merge, merged_gguf
from gemkit.tools.quantize import measure, quantize
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.hf.write import write_hf
from gemkit.weights.lora import LoraAdapter, LoraConfig, LoraPart
from gemkit.weights.open import open_checkpoint
from gemkit.weights.peft.read import read_peft
from gemkit.weights.peft.write import write_peft
from gemkit.weights.quant import GGMLType, quantise

CONFIG = tiny_config("gemma3_text", hidden_size=64, head_dim=32, vocab_size=len(vocabulary().pieces))
PARAMS = {name: value * 0.3 for name, value in tiny_params(CONFIG).items()}
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, 50)
EMBEDDING = "model.embed_tokens.weight"
SETTINGS = {
    "lora": LoraConfig(4, 8),
    "dora": LoraConfig(3, 6, targets=("q_proj", "o_proj", "down_proj"), dora=True),
    "rslora": LoraConfig(2, 3, targets=("v_proj", "down_proj"), rslora=True),
}


def checkpoint(kind: GGMLType = GGMLType.F32) -> Checkpoint:
    return Checkpoint.from_params(CONFIG, PARAMS, kind, vocabulary(), name="Tiny", instruction_tuned=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Folders of a model and of adapters, and the model in bfloat16 and in blocks."""
    root = tmp_path_factory.mktemp("world")
    write_hf(root / "model", checkpoint())
    write_hf(root / "half", checkpoint(GGMLType.BF16))
    write_gguf(root / "q8.gguf", checkpoint(GGMLType.Q8_0))
    for seed, (name, config) in enumerate(SETTINGS.items()):
        write_peft(root / name, config, trained_parts(config, CONFIG, PARAMS, seed))
    return root


def adapters(world: Path, *names: str) -> list[LoraAdapter]:
    return [read_peft(world / name) for name in names]


def native(path: Path, *use: LoraAdapter) -> np.ndarray:
    with open_checkpoint(path) as opened:
        return hf_files.native_logits(CONFIG, opened.tensors, IDS, use, 0 if use else -1)


def by_peft(world: Path, *names: str) -> dict[str, np.ndarray]:
    """The parameters after peft's own merge."""
    model = hf.build(CONFIG, PARAMS, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(model, world / names[0], names[0])
        for name in names[1:]:
            model.load_adapter(world / name, name)
        model = model.merge_and_unload(adapter_names=list(names))
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_logits_are_the_adapters(world, tmp_path, name):
    """From a folder with gemkit and with transformers; the embedding is the same bytes, and stays tied."""
    from transformers import AutoModelForCausalLM

    [adapter] = adapters(world, name)
    target = merge(world / "model", [adapter], tmp_path / "merged")
    unmerged, base = native(world / "model", adapter), native(world / "model")
    assert relative_error(base, unmerged) >= TRAIT_MARGIN * NATIVE_FLOAT32
    assert relative_error(native(target), unmerged) <= NATIVE_FLOAT32
    theirs = hf.logits(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32), IDS)
    assert relative_error(theirs, unmerged) <= NATIVE_FLOAT32
    expected = by_peft(world, name)
    with open_checkpoint(target) as opened:
        params = {key: tensor.to_float32() for key, tensor in opened.tensors.items()}
    assert relative_error(theirs, reference.forward(CONFIG, params, IDS)) <= REFERENCE_VS_TRANSFORMERS_F32
    for key, value in params.items():
        assert relative_error(value, expected[key]) < 1e-6
        assert np.array_equal(value, PARAMS[key]) == (key not in adapter.parts), key
    stored = safetensors.torch.load_file(target / "model.safetensors")
    assert "lm_head.weight" not in stored and np.array_equal(stored[EMBEDDING].numpy(), PARAMS[EMBEDDING])
    assert {path.name for path in target.iterdir()} == {path.name for path in (world / "model").iterdir()}


def test_several_are_merged_in_turn_as_in_peft(world, tmp_path):
    names = "lora", "dora", "rslora"
    target = merge(world / "model", adapters(world, *names), tmp_path / "merged")
    expected = by_peft(world, *names)
    with open_checkpoint(target) as opened:
        for key, tensor in opened.tensors.items():
            assert relative_error(tensor.to_float32(), expected[key]) < 1e-6, key


@pytest.mark.parametrize("source", ["half", "q8.gguf"])
def test_types(world, tmp_path, source):
    """The sum is rounded once. auto keeps bfloat16; blocks become what --dtype says."""
    use = adapters(world, "dora")
    exact = merge(world / source, use, tmp_path / "exact", "float32")
    half = merge(world / source, use, tmp_path / "half", "auto" if source == "half" else "bfloat16")
    with open_checkpoint(exact) as one, open_checkpoint(half) as other, open_checkpoint(world / source) as before:
        for name, tensor in one.tensors.items():
            if len(tensor.shape) > 1:
                assert (tensor.type, other.tensors[name].type) == (GGMLType.F32, GGMLType.BF16)
                assert np.array_equal(
                    other.tensors[name].data, quantise(GGMLType.BF16, tensor.to_float32()).reshape(-1)
                )
            if name not in use[0].parts:
                assert np.array_equal(tensor.to_float32(), before.tensors[name].to_float32())
    assert relative_error(native(exact), native(world / source, *use)) <= NATIVE_FLOAT32


def test_blocks_are_refused_or_written_again(world, tmp_path):
    use = adapters(world, "rslora")
    with pytest.raises(GemkitError, match=r"q8.gguf is quantised \(Q8_0\), and merging into blocks rounds"):
        merge(world / "q8.gguf", use, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    target = tmp_path / "end.gguf"
    found = []
    with merged_gguf(world / "q8.gguf", use, target) as whole:
        assert relative_error(native(whole), native(world / "q8.gguf", *use)) <= NATIVE_FLOAT32
        quantize(whole, target, "q8_0", check=lambda path: found.append(measure(whole, path, "the sea was calm " * 30)))
    assert [path.name for path in tmp_path.iterdir()] == ["end.gguf"]
    assert 0 < abs(found[0].rise) < 0.05 and found[0].compared.kl > 0
    with open_checkpoint(target) as one, open_checkpoint(world / "q8.gguf") as before:
        for name, tensor in one.tensors.items():
            same = np.array_equal(tensor.data, before.tensors[name].data)
            assert tensor.type == before.tensors[name].type and same == (name not in use[0].parts), name
    assert relative_error(native(target), native(world / "q8.gguf", *use)) < 0.1


def test_refusals_leave_nothing(world, tmp_path):
    [adapter] = adapters(world, "lora")
    other = tiny_config("gemma3_text", hidden_size=96, head_dim=32, vocab_size=len(vocabulary().pieces))
    foreign = write_gguf(tmp_path / "foreign.gguf", Checkpoint.from_params(other, tiny_params(other)))
    huge = {name: LoraPart(part.a * np.float32(1e38), part.b, 1e6) for name, part in adapter.parts.items()}
    broken = LoraAdapter("huge", adapter.config, huge, Path("huge"))
    for source, use, dtype, words in (
        (foreign, adapter, "float32", "load it with the model it was trained on"),
        (world / "model", broken, "auto", "q_proj.weight: merging gives values that are not finite"),
        (world / "model", broken, "bfloat16", "not finite"),
        (world / "none", adapter, "auto", "none"),
    ):
        with pytest.raises(GemkitError, match=words), np.errstate(all="ignore"):
            merge(source, [use], tmp_path / "merged", dtype)
    with pytest.raises(GemkitError, match="not finite"), np.errstate(all="ignore"):
        with merged_gguf(world / "model", [broken], tmp_path / "merged.gguf"):
            pass
    with pytest.raises(GemkitError, match="absent"), merged_gguf(world / "model", [], tmp_path / "absent" / "x.gguf"):
        pass
    with pytest.raises(UsageError, match="dtype is 'int8'"):
        merge(world / "model", [adapter], tmp_path / "merged", "int8")
    with pytest.raises(GemkitError, match="exists"):
        merge(world / "model", [adapter], world / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.gguf"]
