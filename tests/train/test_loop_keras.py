"""The training loop in Keras on JAX, PyTorch and TensorFlow against that in PyTorch; ``fit``. Budget: 240 s.

One process a backend does all its checks (``keras_worker.py``); the tests here judge what it found.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parity.cases import CASES
from parity.tolerances import FRAMEWORK_FLOAT32, LOSS_CURVE
from train.curves import FALL, batches, curve, options_of, parts_of, shortened

from gemkit.models.torch import load_decoder
from gemkit.train.loop_torch import TorchLoop, adapt
from gemkit.weights.checkpoint import Checkpoint

every_backend = pytest.mark.parametrize("backend", ["jax", "torch", "tensorflow"])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the results of a backend's worker, which runs at the first call."""
    folder = tmp_path_factory.mktemp("keras")

    @functools.cache
    def run(backend: str) -> dict | str:
        environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        # Tiny models take longer to compile than to run
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        command = [sys.executable, str(Path(__file__).with_name("keras_worker.py")), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        print(backend, done.stderr[-4000:])
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr[-4000:]

    def ask(backend: str) -> dict:
        result = run(backend)
        assert isinstance(result, dict), result
        return result

    return ask


def torch_loop(name: str, method: str) -> TorchLoop:
    case = CASES[name]
    trainable = (lambda spec: True) if method == "full" else None
    decoder = load_decoder(case.config, Checkpoint.from_params(case.config, case.params()).tensors, trainable=trainable)
    if method != "full":
        adapt(decoder, parts_of(case))
    return TorchLoop(decoder, options_of(method))


@functools.cache
def torch_curve(method: str, shift: int = 0) -> tuple[np.ndarray, list[str]]:
    name, accumulate = ("gemma2", False) if method == "full" else ("gemma3", True)
    loop = torch_loop(name, method)
    return curve(loop, name, shift, accumulate), sorted(loop.parameters())


@every_backend
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_curve_is_that_of_torch(found, backend, method):
    """Step by step with all weights, and with an adapter over two batches that accumulate."""
    expected, _ = torch_curve(method)
    ours = np.array(found(backend)["curves"][method])
    assert expected[-1] < expected[0] - FALL
    assert np.abs(ours - expected).max() <= LOSS_CURVE
    assert np.abs(ours - torch_curve(method, shift=1)[0]).max() > 10 * LOSS_CURVE


@every_backend
def test_parameters_have_the_names_of_torch(found, backend):
    assert found(backend)["curves"]["names"] == [torch_curve(method)[1] for method in ("full", "lora")]


@every_backend
def test_evaluation_is_that_of_torch_for_every_length(found, backend):
    loop, batch = torch_loop("qk_norm", "lora"), batches(CASES["qk_norm"])[0]
    for (total, count), length in zip(found(backend)["evaluation"], (24, 16, 20, 18), strict=True):
        expected, number = loop.evaluate(shortened(batch, length))
        assert count == number and total == pytest.approx(expected, rel=FRAMEWORK_FLOAT32)


@every_backend
def test_a_restored_state_goes_on_bit_for_bit(found, backend):
    assert found(backend)["resume"] == []


@every_backend
def test_a_value_that_is_not_finite_is_named_and_changes_nothing(found, backend):
    loss, name, changed = found(backend)["not_finite"]
    assert loss == "nan" and name in torch_loop("qk_norm", "lora").parameters() and changed == []


@every_backend
def test_row_norms_are_those_of_the_matrix(found, backend):
    assert found(backend)["norms"] <= FRAMEWORK_FLOAT32


@every_backend
def test_fit_learns_and_a_saved_model_with_an_adapter_loads_again(found, backend):
    result, loop, data = found(backend)["fit"], torch_loop("qk_norm", "lora"), batches(CASES["qk_norm"])
    mean = sum(loop.evaluate(batch)[0] for batch in data) / 48
    assert result["first"] == pytest.approx(mean, rel=FRAMEWORK_FLOAT32)
    assert result["losses"][-1] < result["losses"][0] - FALL and len(result["losses"]) == 6
    assert result["logged"] == pytest.approx(result["losses"]) and result["difference"] == 0
    assert backend != "tensorflow" or result["events"] > 0
