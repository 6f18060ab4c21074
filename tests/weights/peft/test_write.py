"""Adapters that gemkit writes, loaded by peft and read again; settings of new ones. Budget: 12 s."""

import dataclasses
import errno
import json
import warnings
from collections.abc import Mapping

import numpy as np
import peft
import pytest
import torch
from parity import transformers_models as hf
from parity.cases import CASES
from parity.tolerances import NATIVE_FLOAT32, REFERENCE_VS_TRANSFORMERS_F32, TRAIT_MARGIN, relative_error
from weights import hf_files
from weights.adapters import trained_parts

from gemkit.arch import reference
from gemkit.errors import GemkitError, UsageError
from gemkit.weights import lora
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.lora import LoraAdapter, LoraConfig, LoraPart
from gemkit.weights.peft import write
from gemkit.weights.peft.config import CONFIG, WEIGHTS
from gemkit.weights.peft.read import read_peft
from gemkit.weights.peft.write import write_peft
from gemkit.weights.quant import GGMLType

from .test_read import ALL, CONFIGS, make

CASE = CASES["gemma3"]
SETTINGS = {
    "lora": LoraConfig(4, 8),
    "some projections": LoraConfig(3, 1.5, 0.1, ("q_proj", "down_proj")),
    "rslora": LoraConfig(5, 3, rslora=True),
    "dora": LoraConfig(4, 2, dora=True),
    "dora and rslora": LoraConfig(2, 5, targets=("v_proj", "up_proj"), rslora=True, dora=True),
}


def trained(config: LoraConfig) -> dict[str, LoraPart]:
    return trained_parts(config, CASE.config, CASE.params(), 7)


def merged(parts: Mapping[str, LoraPart]) -> dict[str, np.ndarray]:
    weights = CASE.params()
    return weights | {name: lora.merge(weights[name], [part], slice(None)) for name, part in parts.items()}


def by_peft(folder) -> tuple[np.ndarray, peft.LoraConfig]:
    base = hf.build(CASE.config, CASE.params(), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of missing keys
        model = peft.PeftModel.from_pretrained(base, folder)
    return hf.logits(model, CASE.tokens()), model.peft_config["default"]


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_loads_what_is_written(tmp_path, name):
    config = SETTINGS[name]
    parts = trained(config)
    write_peft(tmp_path / "adapter", config, parts, base_model="google/gemma-3-270m")
    expected = reference.forward(CASE.config, merged(parts), CASE.tokens())
    base = reference.forward(CASE.config, CASE.params(), CASE.tokens())
    assert relative_error(base, expected) >= TRAIT_MARGIN * NATIVE_FLOAT32
    theirs, read = by_peft(tmp_path / "adapter")
    assert relative_error(theirs, expected) <= REFERENCE_VS_TRANSFORMERS_F32
    assert (read.r, read.lora_alpha, read.lora_dropout) == (config.rank, config.alpha, config.dropout)
    assert (read.use_rslora, read.use_dora, read.bias) == (config.rslora, config.dora, "none")
    assert (read.task_type, read.base_model_name_or_path) == ("CAUSAL_LM", "google/gemma-3-270m")
    assert set(read.target_modules) == set(config.targets or ALL)
    back = read_peft(tmp_path / "adapter")
    assert dataclasses.replace(back.config, targets=config.targets) == config
    assert_equal(back.parts, parts)
    weights = Checkpoint.from_params(CASE.config, CASE.params()).tensors
    ours = hf_files.native_logits(CASE.config, weights, CASE.tokens(), [back], 0)
    assert relative_error(ours, expected) <= NATIVE_FLOAT32


def assert_equal(parts: Mapping[str, LoraPart], others: Mapping[str, LoraPart]) -> None:
    assert parts.keys() == others.keys()
    for name, part in parts.items():
        for field in ("a", "b", "scale", "magnitude"):
            assert np.array_equal(getattr(part, field), getattr(others[name], field)), (name, field)


@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_own_are_written_back(tmp_path, name):
    """Also with patterns, and with modules in some layers only."""
    make(tmp_path / "theirs", **CONFIGS[name])
    adapter = read_peft(tmp_path / "theirs")
    write_peft(tmp_path / "ours", adapter.config, adapter.parts)
    back = read_peft(tmp_path / "ours")
    assert back.config == adapter.config
    assert_equal(back.parts, adapter.parts)
    assert np.array_equal(by_peft(tmp_path / "ours")[0], by_peft(tmp_path / "theirs")[0])
    assert by_peft(tmp_path / "ours")[1].base_model_name_or_path is None


def test_half_precision(tmp_path):
    config = SETTINGS["dora"]
    parts = trained(config)
    for dtype, error in ((GGMLType.BF16, 2**-8), (GGMLType.F16, 2**-10)):
        write_peft(tmp_path / dtype.name, config, parts, dtype=dtype)
        for name, part in read_peft(tmp_path / dtype.name).parts.items():
            assert 0 < np.abs(part.a - parts[name].a).max() <= error * np.abs(part.a).max()
        by_peft(tmp_path / dtype.name)
    assert (tmp_path / "BF16" / WEIGHTS).stat().st_size < 0.65 * sum(
        x.nbytes for part in parts.values() for x in (part.a, part.b, part.magnitude)
    )


def test_there_is_a_whole_adapter_or_none(tmp_path, monkeypatch):
    config = SETTINGS["lora"]
    parts = trained(config)
    folder = tmp_path / "adapter"
    name, part = next(iter(parts.items()))
    with pytest.raises(GemkitError, match=r"q_proj\.lora_B\.weight holds a value that is not finite"):
        write_peft(folder, config, parts | {name: dataclasses.replace(part, b=part.b * np.float32("nan"))})

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(write, "_raw_config", full)  # after the tensors
        with pytest.raises(GemkitError, match=r"cannot be written \(No space left on device\)"):
            write_peft(folder, config, parts)
    assert not list(tmp_path.iterdir())
    write_peft(folder, config, parts)
    assert sorted(path.name for path in folder.iterdir()) == ["NOTICE", CONFIG, WEIGHTS]
    before = (folder / WEIGHTS).read_bytes()
    with pytest.raises(GemkitError, match="exists: give another name"):
        write_peft(folder, config, trained(SETTINGS["rslora"]))
    assert (folder / WEIGHTS).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_an_embedding_is_never_written(tmp_path):
    name = "model.embed_tokens.weight"
    with pytest.raises(AssertionError, match="takes no adapter"):
        write_peft(tmp_path / "x", LoraConfig(1, 1), {name: LoraPart(np.ones((1, 2)), np.ones((2, 1)), 1.0)})
    write_peft(tmp_path / "y", LoraConfig(2, 1), trained(LoraConfig(2, 1)))
    assert "embed" not in str(list(read_peft(tmp_path / "y").parts)) + (tmp_path / "y" / CONFIG).read_text()
    assert json.loads((tmp_path / "y" / CONFIG).read_text())["modules_to_save"] is None


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rank": 0}, "the rank is 0"),
        ({"rank": 2.5}, "the rank is 2.5"),
        ({"rank": 2**16}, "65535"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1}, "the dropout is 1"),
        ({"dropout": -0.1}, "the dropout is -0.1"),
    ],
)
def test_settings_are_checked(options, words):
    with pytest.raises(UsageError, match=words):
        LoraConfig(**{"rank": 4, "alpha": 8} | options)


def test_targets():
    every = LoraConfig(4, 8).weights(CASE.config)
    assert len(every) == 7 * CASE.config.num_hidden_layers
    some = LoraConfig(4, 8, targets=("o_proj",)).weights(CASE.config)
    assert some == {name: shape for name, shape in every.items() if "o_proj" in name}
    with pytest.raises(UsageError, match="'lm_head' is no projection of a layer: choose from q_proj, k_proj"):
        LoraConfig(4, 8, targets=("q_proj", "lm_head")).weights(CASE.config)


def test_several_are_merged_in_turn():
    """Each magnitude counts for the model's own rows plus its own addition, as in peft."""
    weight = CASE.params()["model.layers.0.mlp.up_proj.weight"].astype(np.float64)
    names = "dora", "lora", "dora and rslora"
    parts = [trained(SETTINGS[name])["model.layers.0.mlp.up_proj.weight"] for name in names]
    expected = weight
    for part in parts:
        addition = part.scale * part.b.astype(np.float64) @ part.a
        expected = expected + addition
        if part.magnitude is not None:
            expected = expected * (part.magnitude / np.linalg.norm(weight + addition, axis=1))[:, None]
    for rows in (slice(None), slice(3, 9)):
        found = lora.merge(weight[rows].astype(np.float32), parts, rows)
        assert found.dtype == np.float32 and relative_error(found, expected[rows]) < 1e-6
    zero = LoraPart(np.zeros((1, 2), "f4"), np.zeros((2, 1), "f4"), 1.0, np.ones(2, "f4"))
    with pytest.raises(GemkitError, match="row of zeros"):
        lora.merge(np.array([[1, 2], [0, 0]], np.float32), [zero], slice(None))


def test_the_adapters_rank_is_its_largest():
    parts = {str(rank): LoraPart(np.zeros((rank, 2)), np.zeros((2, rank)), 1.0) for rank in (2, 5, 3)}
    assert LoraAdapter("x", LoraConfig(4, 1), parts, None).rank == 5
