"""Folders that gemkit writes, read and run by KerasHub's classes for Gemma, Gemma 2 and Gemma 3. Budget: 90 s.

KerasHub takes half a minute to import, so one process runs all models.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parity.cases import CASES, random_params, tokens
from parity.tolerances import FRAMEWORK_FLOAT32, relative_error

from gemkit.arch import reference
from gemkit.arch.config import ModelConfig, layer_pattern
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.hf.write import write_hf

LENGTH = 72


def config_of(name: str) -> ModelConfig:
    """A case's configuration as far as KerasHub has it: its pattern of layers in Gemma 3, and queries scaled by the
    head's width, which KerasHub 0.32 does whatever the configuration says."""
    config = dataclasses.replace(CASES[name].config, query_pre_attn_scalar=CASES[name].config.head_dim)
    if config.model_type != "gemma3_text":
        return config
    layers = layer_pattern(7, period=6, sliding_window=12, rope_theta=1e6, rope_factor=8.0, local_rope_theta=10_000.0)
    return dataclasses.replace(config, num_hidden_layers=len(layers), layers=layers)


MODELS = {
    "gemma1_2b": "GemmaBackbone",
    "gemma1_7b": "GemmaBackbone",
    "gemma2": "GemmaBackbone",
    "gemma3": "Gemma3Backbone",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders with KerasHub's logits in them."""
    root = tmp_path_factory.mktemp("keras_hub")
    found = {}
    for name in MODELS:
        config = config_of(name)
        found[name] = write_hf(root / name, Checkpoint.from_params(config, random_params(config)))
        np.save(found[name] / "tokens.npy", tokens(config, LENGTH))
    command = [sys.executable, str(Path(__file__).with_name("keras_hub_worker.py")), *map(str, found.values())]
    environment = {**os.environ, "KERAS_BACKEND": "torch", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split()[-len(MODELS) :] == list(MODELS.values())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_keras_hub_gives_the_references_logits(folders, name):
    config = config_of(name)
    expected = reference.forward(config, random_params(config), tokens(config, LENGTH))
    assert relative_error(np.load(folders[name] / "logits.npy"), expected) <= FRAMEWORK_FLOAT32
