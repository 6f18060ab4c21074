"""The tensor manifest against parameter counts and the state dict of transformers. Budget: 15 s."""

import math

import pytest
import torch
from parity import transformers_models as hf
from parity.cases import CASES

from gemkit.arch.presets import PRESETS
from gemkit.arch.tensors import manifest


@pytest.mark.parametrize("config", [p.config for p in PRESETS.values()], ids=PRESETS)
def test_manifest_and_parameter_counts_agree(config):
    specs = manifest(config)
    assert sum(math.prod(spec.shape) for spec in specs.values()) == config.parameter_count()
    tables = sum(math.prod(s.shape) for s in specs.values() if "V" in s.letters)
    assert tables == config.parameter_counts().embedding


@pytest.mark.parametrize("name", ["gemma1_2b", "gemma2", "gemma3", "untied_embedding"])
def test_names_and_shapes_are_those_of_transformers(name):
    config = CASES[name].config
    with torch.device("meta"):
        model = hf.new_model(config)
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        theirs.pop("lm_head.weight")
    assert {key: spec.shape for key, spec in manifest(config).items()} == theirs


def test_rules():
    specs = manifest(CASES["gemma3"].config)
    assert all(key == spec.name and len(spec.shape) == len(spec.letters) for key, spec in specs.items())
    norms = {key for key in specs if "norm" in key}
    assert {key for key, spec in specs.items() if spec.dtype_floor == "float32"} == norms
    assert {key for key, spec in specs.items() if spec.init == 0.0} == norms
    assert {key for key, spec in specs.items() if not spec.quantise} == norms
    adapted = {key.split(".")[-2] for key, spec in specs.items() if spec.lora}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    # Tensor parallelism: what the first matrix of a pair splits by rows, the second splits by columns.
    split = {key.split(".")[-2]: spec.letters[spec.shard] for key, spec in specs.items() if spec.shard is not None}
    assert split == {
        "embed_tokens": "V",
        "q_proj": "NH",
        "k_proj": "KH",
        "v_proj": "KH",
        "o_proj": "NH",
        "gate_proj": "F",
        "up_proj": "F",
        "down_proj": "F",
    }
    assert all(spec.shard is None for key, spec in specs.items() if key in norms)
