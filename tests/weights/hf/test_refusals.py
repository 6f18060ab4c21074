"""Folders with another kind of model in them: each is refused by what it is, in one short line. Budget: 10 s."""

import json

import pytest
import torch
from weights import hf_files
from weights.hf_files import edit

from gemkit.errors import GemkitError
from gemkit.weights.open import open_checkpoint


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    hf_files.save(folder, "gemma3")
    return folder / "config.json", hf_files.tensors(folder)


@pytest.fixture
def folder(state, tmp_path):
    """A folder with a configuration alone."""
    (tmp_path / "config.json").write_bytes(state[0].read_bytes())
    return tmp_path


def refusal(folder) -> str:
    with pytest.raises(GemkitError) as error:
        open_checkpoint(folder).close()
    text = str(error.value)
    assert "\n" not in text and len(text) < 500, text
    return text.replace(str(folder), "")


MATRIX = "model.layers.0.self_attn.q_proj."
NAMED = {
    "bitsandbytes 8": ({MATRIX + "SCB"}, "int8 of bitsandbytes (SCB)"),
    "bitsandbytes 4": ({MATRIX + "weight.absmax", MATRIX + "weight.quant_map"}, "4 bits of bitsandbytes (absmax)"),
    "bitsandbytes nf4": ({MATRIX + "weight.quant_state.bitsandbytes__nf4"}, "bitsandbytes"),
    "GPTQ": ({MATRIX + s for s in ("qweight", "qzeros", "scales", "g_idx")}, "GPTQ"),
    "AWQ": ({MATRIX + s for s in ("qweight", "qzeros", "scales")}, "AWQ"),
    "compressed-tensors": (
        {MATRIX + s for s in ("weight_packed", "weight_scale", "weight_shape")},
        "compressed-tensors",
    ),
    "FP8": ({MATRIX + "weight_scale_inv"}, "FP8"),
    "FP8 static": ({MATRIX + "weight_scale", MATRIX + "input_scale"}, "FP8"),
    "ModelOpt": ({MATRIX + "weight_scale", MATRIX + "weight_scale_2"}, "ModelOpt"),
    "torchao": ({MATRIX + "weight:qdata", MATRIX + "weight:scale"}, "torchao"),
    "HQQ": ({MATRIX + "W_q"}, "HQQ"),
    "MLX": ({MATRIX + "scales", MATRIX + "biases"}, "MLX"),
    "an adapter": ({MATRIX + "lora_A.default.weight", MATRIX + "base_layer.weight"}, "merge_and_unload"),
    "classifier": ({"score.weight"}, "classifier or reward model (score.weight)"),
    "classifier by PEFT's name": ({"base_model.model.score.weight"}, "classifier or reward model"),
}


@pytest.mark.parametrize("case", NAMED)
def test_by_the_names_of_tensors(folder, state, case):
    names, words = NAMED[case]
    for whole in (True, False):  # next to all weights, and in place of most of them
        rest = {k: v for k, v in state[1].items() if whole or not k.startswith("model.layers.")}
        hf_files.write(folder, rest | {name: torch.ones(2) for name in names})
        assert words in refusal(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8", "torchao", "hqq"])
def test_by_the_method_that_the_configuration_names(folder, method):
    edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    assert f"quantised by {method} (quantization_config)" in refusal(folder)


def test_by_other_words_of_the_configuration(folder, state):
    edit(folder / "config.json", quantization_config={"bits": 4})
    assert "quantization_config" in refusal(folder)
    edit(folder / "config.json", quantization_config=..., quantization={"group_size": 64, "bits": 4})
    assert "quantised by MLX (quantization in config.json, 4 bits)" in refusal(folder)
    edit(folder / "config.json", quantization=..., architectures=["Gemma3TextForSequenceClassification"])
    hf_files.write(folder, state[1])
    assert "classifier or reward model (Gemma3TextForSequenceClassification)" in refusal(folder)
    edit(folder / "config.json", architectures=["Gemma3TextModel"], use_bidirectional_attention=True)
    assert "embedding model" in refusal(folder)


@pytest.mark.parametrize(
    "kind", ["gemma3n", "gemma3n_text", "gemma4", "paligemma", "t5gemma", "recurrent_gemma", "llama"]
)
def test_other_architectures(folder, kind):
    edit(folder / "config.json", model_type=kind)
    assert f"model_type '{kind}'" in refusal(folder) and ("another Gemma" in refusal(folder)) == ("gemma" in kind)


def test_the_image_part_alone(folder):
    hf_files.write(folder, {"vision_tower.a.weight": torch.ones(1), "multi_modal_projector.b.weight": torch.ones(1)})
    edit(folder / "config.json", num_hidden_layers=2, layer_types=None)
    assert "the image part of a model (multi_modal_projector, vision_tower)" in refusal(folder)


def test_nothing_of_a_gemma(folder):
    edit(folder / "config.json", num_hidden_layers=2, layer_types=None)
    hf_files.write(folder, {f"transformer.h.{n}.attn.weight": torch.ones(1) for n in range(99)})
    assert "no tensor of a Gemma" in refusal(folder) and "and 95 more" in refusal(folder)


def test_git_lfs_pointers(folder, state):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n"
    hf_files.write(folder, state[1])
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).write_text(pointer)
        with open_checkpoint(folder) as checkpoint, pytest.raises(GemkitError, match=rf"{name} is a Git LFS pointer"):
            _ = checkpoint.vocabulary
        with open_checkpoint(folder) as checkpoint, pytest.raises(GemkitError, match=rf"{name} is a Git LFS pointer"):
            _ = checkpoint.vocabulary_key
        (folder / name).unlink()
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text(pointer)
        assert f"{name} is a Git LFS pointer" in refusal(folder)


def test_a_training_checkpoint_is_a_model(folder, state):
    hf_files.write(folder, state[1])
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"x")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    open_checkpoint(folder).close()
