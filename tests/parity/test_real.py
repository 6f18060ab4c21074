"""Google's real weights, dequantised, on every implementation: 512 tokens in float32. Budget: 4 minutes.

Each is compared with transformers, whose logits are computed once. Two that are each within half a tolerance of it are
within the tolerance of each other.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.grid import BACKENDS
from parity.test_native_real import transformers_hidden
from parity.tolerances import REAL_FLOAT32_PAIR
from testdata import data_file

from gemkit.hub.demo import demo_path
from gemkit.text.tokenizer import Tokenizer
from gemkit.weights.gguf.read import read_gguf

TOKENS = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``ids.npy`` and transformers' ``logits.npy``, half a gigabyte, deleted at the end."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = Tokenizer.from_vocabulary(read_gguf(demo_path()).vocabulary)
    text = data_file("text_wikitext2", "valid.txt").read_text(encoding="utf-8")[:6_000]
    ids = np.array(tokenizer.encode(text)[:TOKENS], np.int32)
    assert len(ids) == TOKENS and ids[0] == tokenizer.bos_id
    np.save(folder / "ids.npy", ids)
    hidden, head = transformers_hidden(demo_path(), ids)
    logits = np.lib.format.open_memmap(folder / "logits.npy", "w+", np.float32, (TOKENS, len(head)))
    with torch.inference_mode():
        for first in range(0, TOKENS, 64):
            logits[first : first + 64] = (hidden[first : first + 64] @ head.T).numpy()
    logits.flush()
    del logits, hidden, head
    yield folder
    (folder / "logits.npy").unlink()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "transformers"])
def test_real_weights_give_the_logits_of_transformers(folder, backend, capsys):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if backend.startswith("keras-"):
        environment["KERAS_BACKEND"] = backend.removeprefix("keras-")
    command = [sys.executable, str(Path(__file__).with_name("real_worker.py")), backend, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    told = f"{found['error']:.1e} of the largest logit, {len(found['changed'])} argmax tokens differ"
    with capsys.disabled():
        print(f"\n{backend}: {told}; {found['load']} s to load, {found['run']} s to run", end="")
    assert found["error"] <= REAL_FLOAT32_PAIR / 2
    assert all(margin <= REAL_FLOAT32_PAIR * found["scale"] for margin in found["changed"])
