"""benchmarks/cpu/shapes.py writes what gemkit reads. Budget: 5 s."""

import dataclasses
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "cpu"))

import shapes

import gemkit
from gemkit.arch.presets import preset
from gemkit.weights.open import open_checkpoint

SMALL = dataclasses.replace(
    preset("gemma-2b").config,
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=4,
    head_dim=64,
    query_pre_attn_scalar=64,
)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M"])
def test_a_small_shape_loads_and_generates(tmp_path, kind):
    path = shapes.write(tmp_path / "a.gguf", "gemma-2b", kind, layers=4, words=600, config=SMALL)
    with open_checkpoint(path) as checkpoint:
        types = {tensor.type.name for tensor in checkpoint.tensors.values()}
        assert types == {"F32", "Q6_K", kind.removesuffix("_M")}
        weights = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].to_float32()
        # Normal, with a deviation of 1/√256; four bits lose a little
        assert abs(weights.mean()) < 0.002 and weights.std() == pytest.approx(1 / 16, rel=0.05)
        other = checkpoint.tensors["model.layers.1.mlp.up_proj.weight"].to_float32()
        assert np.abs(np.corrcoef(weights.ravel(), other.ravel())[0, 1]) < 0.01
    with gemkit.load(path, threads=1) as model:
        assert len(model.generate([2, 5, 6], max_tokens=4, temperature=0, ignore_eos=True).ids) == 4


def test_the_same_seed_gives_the_same_file(tmp_path):
    sums = set()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = shapes.write(tmp_path / name, "gemma-2b", "q4_0", layers=1, words=600, seed=seed, config=SMALL)
        sums.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(sums) == 2
