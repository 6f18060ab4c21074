"""Log-probabilities by chunks of rows in Keras against the plain form: values and gradients. Budget: 60 s.

One process a backend compares them (``logprobs_worker.py``).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from parity.tolerances import FRAMEWORK_FLOAT32


@pytest.mark.parametrize("backend", ["jax", "torch", "tensorflow"])
def test_values_and_gradients_are_those_of_the_plain_form(backend):
    """With a trained and a frozen head; on TensorFlow also with rows that are counted when it runs."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).with_name("logprobs_worker.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if backend == "jax":
        assert not found.pop("logprobs") and found.pop("logprobs_plain"), "logits of all rows are in memory"
    assert len(found) == (10 if backend == "tensorflow" else 6)
    assert all(error <= FRAMEWORK_FLOAT32 for error in found.values()), found
