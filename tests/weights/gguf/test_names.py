"""Tensor names: the table is a bijection and agrees with gguf-py. Budget: 2 s."""

import gguf
import pytest

from gemkit.arch.presets import preset
from gemkit.arch.tensors import manifest
from gemkit.weights.gguf import names

MODELS = [
    ("gemma-2b", gguf.MODEL_ARCH.GEMMA),
    ("gemma-2-2b", gguf.MODEL_ARCH.GEMMA2),
    ("gemma-3-270m", gguf.MODEL_ARCH.GEMMA3),
]


@pytest.mark.parametrize(("model", "arch"), MODELS)
def test_every_parameter_has_the_name_that_gguf_py_gives_it(model: str, arch):
    config = preset(model).config
    theirs = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name in manifest(config):
        row = names.from_canonical(name, config.post_norms)
        assert names.from_gguf(row.gguf, config.post_norms) == row
        assert row.canonical == name
        assert row.add_one == ("norm" in name)
        assert theirs.get_name(name, try_suffixes=(".weight",)) == row.gguf


@pytest.mark.parametrize("name", ["blk.{}.attn_q.weight", "blk.01.attn_q.weight", "blk.-1.attn_q.weight", "x", "", "."])
def test_unknown_names(name: str):
    assert names.from_gguf(name, True) is None
