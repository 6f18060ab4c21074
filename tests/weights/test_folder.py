"""The model's file in a folder: the same for loading, the hubs, check and the converters. Budget: 5 s."""

import json

import pytest
from weights.files import tiny_checkpoint

from gemkit.errors import GemkitError, UsageError
from gemkit.hub.names import select
from gemkit.tools import check
from gemkit.weights import folder as rules
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.hf.write import write_hf
from gemkit.weights.open import open_checkpoint

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A GGUF file and a Hugging Face folder of two models."""
    root = tmp_path_factory.mktemp("models")
    write_gguf(root / "x.gguf", tiny_checkpoint("gemma2"))
    write_hf(root / "hf", tiny_checkpoint("gemma3_text"))
    return root


def kind(path) -> str:
    """The type of the model that is loaded; check reads the same file."""
    with open_checkpoint(path) as checkpoint:
        subject = check.read(path)
        assert subject.kind == ("gguf" if checkpoint.source.suffix == ".gguf" else "hf")
        assert subject.family == checkpoint.config.model_type
        return checkpoint.config.model_type


def refusal(path) -> str:
    with pytest.raises(GemkitError) as error:
        open_checkpoint(path).close()
    assert "\n" not in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


COMPANIONS = {
    "alone": {},
    "a type alone": {"config.json": '{"model_type": "gemma3_text"}'},
    "a stub of a multimodal model": {"config.json": '{"model_type": "gemma3"}'},
    "another project's": {"config.json": '{"architectures": ["x"]}'},
    "image encoder": {"mmproj-F16.gguf": "GGUF" + "\0" * 60},
    "image encoder by another name": {"x-mmproj.gguf": "", "config.json": "{}"},
    "importance matrix": {"imatrix.gguf": "GGUF", "x.imatrix": "x"},
    "adapter": {"my-lora-f16.gguf": "GGUF", "adapter_config.json": "{}", "adapter_model.safetensors": ""},
    "pickles": {"pytorch_model.bin": "x", "config.json": '{"model_type": "gemma2"}'},
    "macOS's attributes": {"._gemma-Q8_0.gguf": "\0\5\x16\7"},
    "tokenizer": {"tokenizer.json": "{}", "config.json": '{"model_type": "gemma2"}', "README.md": ""},
}


@pytest.mark.parametrize("case", COMPANIONS)
def test_one_gguf_and_its_companions(models, tmp_path, case):
    (tmp_path / "gemma-Q8_0.gguf").symlink_to(models / "x.gguf")
    for name, text in COMPANIONS[case].items():
        (tmp_path / name).write_text(text)
    assert kind(tmp_path) == "gemma2"
    assert select([path.name for path in tmp_path.iterdir()], None, "org/name") == ["gemma-Q8_0.gguf"]


def test_safetensors_go_before_gguf(models, tmp_path):
    for path in (models / "hf").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "a.gguf").symlink_to(models / "x.gguf")
    (tmp_path / "b.gguf").symlink_to(models / "x.gguf")
    assert kind(tmp_path) == "gemma3_text"
    assert "model.safetensors" in select([path.name for path in tmp_path.iterdir()], None, "org/name")
    (tmp_path / "config.json").unlink()
    (tmp_path / "b.gguf").unlink()
    assert kind(tmp_path) == "gemma2"


def test_several_ggufs_are_listed(models, tmp_path):
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf"):
        (tmp_path / name).symlink_to(models / "x.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert "2 GGUF models: give the path of one of a-Q4_0.gguf, a-Q8_0.gguf" in refusal(tmp_path)
    with pytest.raises(UsageError, match=r"a-Q4_0\.gguf, a-Q8_0\.gguf"):
        check.read(tmp_path)
    for number in range(40):
        (tmp_path / f"b{number:02}.gguf").touch()
    assert "and 34 more" in refusal(tmp_path)


def test_the_parts_of_a_gguf_are_one_model(models, tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"a-{number:05}-of-00003.gguf").touch()
    assert "a-00001-of-00003.gguf" in refusal(tmp_path)  # which is empty
    (tmp_path / "b.gguf").symlink_to(models / "x.gguf")
    assert "2 GGUF models: give the path of one of a-00001-of-00003.gguf, b.gguf" in refusal(tmp_path)


def test_folders_that_hold_no_model(tmp_path):
    assert "no GGUF files and no config.json" in refusal(tmp_path)
    (tmp_path / "mmproj.gguf").touch()
    assert "no model, only mmproj.gguf" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "google/gemma-2b"}))
    assert "an adapter of 'google/gemma-2b'" in refusal(tmp_path) and "--adapter-path" in refusal(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert "adapter" in refusal(tmp_path)


def test_a_run_with_models_in_it(tmp_path):
    (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / "checkpoint-100" / "config.json").write_text("{}")
    assert "such as checkpoint-100" in refusal(tmp_path)


def test_pickles_of_transformers_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma", **SIZES}))
    shard = "pytorch_model-00001-of-00002.bin"
    weight_map = {"model.layers.0.self_attn.q_proj.weight": shard}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / shard).write_bytes(b"x")
    assert "pickled" in refusal(tmp_path) and "safetensors" in refusal(tmp_path)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


@pytest.mark.parametrize("name", ["x.gguf", "x.ckpt", "model.safetensors", "config.json"])
def test_git_lfs_pointers(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma", **SIZES}))
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(GemkitError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        open_checkpoint(tmp_path / name)


def test_the_tokenizer():
    assert rules.tokenizer(["tokenizer.model", "tokenizer.json"]) == "tokenizer.json"
    assert rules.tokenizer(["tokenizer.model"]) == "tokenizer.model"
    assert rules.tokenizer(["tokenizer_config.json"]) is None


def test_a_repository_with_one_file_and_shards():
    """transformers takes model.safetensors, so the shards are not fetched."""
    files = ["config.json", "model.safetensors", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    assert select(files, None, "org/name") == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["x.bin", "x", "x.gguf.part", "x.safetensors", "x.ckpt", "X.GGUF"])
def test_a_gguf_file_of_another_name(models, tmp_path, name):
    (tmp_path / name).write_bytes((models / "x.gguf").read_bytes())
    with open_checkpoint(tmp_path / name) as checkpoint:
        subject = check.read(tmp_path / name)
        assert (subject.kind, subject.family, subject.refusal) == ("gguf", checkpoint.config.model_type, None)
