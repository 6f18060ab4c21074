"""Loading a folder of shards holds the model and one shard more at most, in every implementation. Budget: 40 s."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from weights.files import tiny_config

from gemkit.arch.hf_config import to_hf
from gemkit.arch.tensors import manifest

SHARDS = 8

# The memory of a process is what it owns: pages of a mapped file are the system's, which takes them back as it likes
CODE = """
import sys, threading, time
from gemkit.weights.open import open_checkpoint
backend, folder = sys.argv[1:]
if backend == "torch":
    from gemkit.models.torch import load_runner
elif backend == "jax":
    from gemkit.models.jax import load_runner
else:
    from gemkit.models.native import NativeRunner as load_runner
options = {} if backend == "native" else {"device": "cpu", "dtype": "bfloat16"}
def owned():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * sum(int(l.split()[1]) for l in lines if l.startswith(("RssAnon", "RssShmem")))
before, peak, done = owned(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, owned())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
with open_checkpoint(folder) as checkpoint:
    runner = load_runner(checkpoint.config, checkpoint.tensors, **options)
done = True
watcher.join()
print(max(peak, owned()) - before, owned() - before, runner.info.weight_bytes)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> tuple[Path, int]:
    """A model of 8 shards of about 40 MB in bfloat16, written by safetensors' own code, and the size of the largest."""
    path = tmp_path_factory.mktemp("shards")
    config = tiny_config("gemma", vocab_size=32_768, hidden_size=1024, intermediate_size=8192, head_dim=64)
    specs = manifest(config)
    draw = torch.Generator().manual_seed(0)
    total = sum(torch.Size(spec.shape).numel() for spec in specs.values()) * 2
    shards, sizes, index = [{}], [0], {}
    for name, spec in specs.items():
        value = (torch.randn(spec.shape, generator=draw) * 0.02).bfloat16()
        if sizes[-1] and sizes[-1] + value.nbytes > total / SHARDS * 1.2:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = value
        sizes[-1] += value.nbytes
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        safetensors.torch.save_file(shard, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    described = {"metadata": {"total_size": total}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(described))
    (path / "config.json").write_text(json.dumps(to_hf(config)))
    assert len(shards) >= 4 and total > 100e6
    return path, max(sizes)


@pytest.mark.parametrize("backend", ["torch", "jax", "native"])
def test_the_model_and_one_shard(backend, folder):
    path, largest = folder
    source = str(Path(sys.modules["gemkit"].__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([source, *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-c", CODE, backend, str(path)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    peak, kept, weights = map(int, done.stdout.split())
    print(f"{backend}: peak {peak / 1e6:.0f} MB, kept {kept / 1e6:.0f} MB, weights {weights / 1e6:.0f} MB")
    assert peak <= weights + largest + 60e6  # threads, the cache's first page, the framework's own
