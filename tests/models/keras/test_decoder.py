"""The Keras decoder on JAX, PyTorch and TensorFlow: its variables, training, files and generation.

One process a backend does all its checks (``worker.py``); the tests here judge what it found. Budget: 120 s.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.cases import CASES
from parity.tolerances import FRAMEWORK_FLOAT32, relative_error

from gemkit.models.torch import load_decoder
from gemkit.weights.checkpoint import Checkpoint

BACKENDS = ("jax", "torch", "tensorflow")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("keras")


@pytest.fixture(scope="module")
def found(folder):
    """Return the results of a backend's worker, which runs at the first call."""

    @functools.cache
    def run(backend: str) -> dict | str:
        environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        # Tiny models take longer to compile than to run
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        print(backend, done.stderr[-4000:])
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr[-4000:]

    def ask(backend: str) -> dict:
        result = run(backend)
        assert isinstance(result, dict), result
        return result

    return ask


@every_backend
def test_fused_attention_is_the_plain_one(found, backend):
    assert found(backend)["attention"] <= FRAMEWORK_FLOAT32


@every_backend
def test_variables_are_the_manifests(found, backend):
    assert found(backend)["names"]


@every_backend
def test_parameter_counts_without_memory(found, backend):
    assert found(backend)["counts"] == {
        "gemma-2b": 2_506_172_416,
        "gemma-7b": 8_537_680_896,
        "gemma-3-270m": 268_098_176,
    }


@every_backend
def test_fit_learns(found, backend):
    for policy, (first, last) in found(backend)["fit"].items():
        assert last < first / 2, policy


@every_backend
@pytest.mark.parametrize("name", ["attention_softcap", "qk_norm"])
def test_gradients_equal_those_of_the_torch_decoder(found, folder, backend, name):
    found(backend)
    ours = np.load(folder / f"gradients_{name}_{backend}.npz")
    theirs = torch_gradients(name)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert relative_error(ours[key], value) <= 5 * FRAMEWORK_FLOAT32, key


@functools.cache
def torch_gradients(name: str) -> dict[str, np.ndarray]:
    case = CASES[name]
    decoder = load_decoder(case.config, Checkpoint.from_params(case.config, case.params()).tensors)
    tokens = torch.from_numpy(case.tokens())[None]
    decoder.requires_grad_(True)
    torch.nn.functional.cross_entropy(decoder(tokens)[0, :-1], tokens[0, 1:]).backward()
    return {key: parameter.grad.numpy() for key, parameter in decoder.named_parameters()}


@every_backend
def test_a_saved_model_is_the_same_on_every_backend(found, backend):
    """The first backend loads its own file, the last one those of all."""
    for earlier in BACKENDS[: BACKENDS.index(backend) + 1]:
        found(earlier)
    assert found(backend)["saved"].keys() >= set(BACKENDS[: BACKENDS.index(backend) + 1])
    assert set(found(backend)["saved"].values()) == {0}


@every_backend
def test_generation_is_the_choice_from_uncached_logits(found, backend):
    for what, (got, want) in found(backend)["generation"].items():
        assert got == want and got, what


def test_every_backend_draws_the_same_tokens(found):
    first, *others = (found(backend)["generation"] for backend in BACKENDS)
    assert all(other == first for other in others)
    assert first["gemma2 0"][0] != first["gemma2 0.9"][0]


@every_backend
def test_each_shape_is_compiled_once(found, backend):
    assert found(backend)["compilations"] == ([0, 0, 0, 0] if backend == "torch" else [5, 5, 7, 9])


@every_backend
def test_a_token_at_depth_1000_costs_little_more_than_at_depth_10(found, backend):
    shallow, deep = found(backend)["depth"]
    assert deep <= 2 * shallow  # without a cache it would be a hundred times as much


@every_backend
def test_refusals_name_the_fault(found, backend):
    starts = [
        "the tensor model.layers.1.mlp.up_proj.weight is missing",
        "the tensor model.layers.1.mlp.up_proj.weight has shape [96, 128], not [128, 96]",
        "float16 overflows in Gemma 2 and 3",
        "dtype is 'int3'; choose from",
        "the prompt has ids that the model lacks; they go from 0 to 511",
        "a prompt is a row of one or more token ids",
        "the prompt has 4096 tokens and the context holds 4096",
        "max_tokens is 0",
        "temperature is -1",
        "ids are None",
        "max_tokens is 'x'",
        "stop_ids are 5",
    ]
    messages = found(backend)["refusals"]
    assert len(messages) == len(starts)
    assert [m for m, start in zip(messages, starts) if not m.startswith(start)] == []
