"""The published models: parameter counts, layer patterns, names. Budget: 2 s."""

import re

import pytest

from gemkit.arch.presets import PRESETS, preset
from gemkit.errors import GemkitError

# Published numbers of parameters, by size as it stands in the name (Gemma 3: of the text model).
PUBLISHED = {
    ("gemma", "2b"): 2_506_172_416,
    ("gemma", "7b"): 8_537_680_896,
    ("gemma2", "2b"): 2_614_341_888,
    ("gemma2", "9b"): 9_241_705_984,
    ("gemma2", "27b"): 27_227_128_320,
    ("gemma3_text", "270m"): 268_098_176,
    ("gemma3_text", "1b"): 999_885_952,
    ("gemma3_text", "4b"): 3_880_263_168,
    ("gemma3_text", "12b"): 11_766_034_176,
    ("gemma3_text", "27b"): 27_009_346_304,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
    size = re.search(r"-(\d+[bm])(-|$)", name)[1]
    assert PRESETS[name].config.parameter_count() == PUBLISHED[PRESETS[name].config.model_type, size]


def test_every_published_size_has_a_base_and_a_tuned_model():
    seen = {(p.config.model_type, p.config.parameter_count(), p.instruction_tuned) for p in PRESETS.values()}
    assert seen == {(kind, count, tuned) for (kind, _), count in PUBLISHED.items() for tuned in (True, False)}


@pytest.mark.parametrize(
    ("name", "full", "window"),
    [
        ("gemma-7b", list(range(28)), None),
        ("gemma-2-2b", list(range(1, 26, 2)), 4096),
        ("gemma-2-27b-it", list(range(1, 46, 2)), 4096),
        ("shieldgemma-9b", list(range(1, 42, 2)), 4096),
        ("gemma-3-270m", [5, 11, 17], 512),
        ("gemma-3-1b-it", [5, 11, 17, 23], 512),
        ("gemma-3-4b-it", [5, 11, 17, 23, 29], 1024),
        ("gemma-3-12b-pt", list(range(5, 48, 6)), 1024),
        ("gemma-3-27b-it", list(range(5, 62, 6)), 1024),
    ],
)
def test_layer_patterns(name, full, window):
    layers = PRESETS[name].config.layers
    assert [i for i, layer in enumerate(layers) if layer.sliding_window is None] == full
    assert {layer.sliding_window for layer in layers} - {None} == ({window} if window else set())


def test_rope():
    def ropes(name):
        return {(s.sliding_window is None, s.rope_theta, s.rope_factor) for s in PRESETS[name].config.layers}

    assert ropes("gemma-2b") == {(True, 1e4, 1.0)}
    assert ropes("gemma-2-9b") == {(True, 1e4, 1.0), (False, 1e4, 1.0)}
    for name in ("gemma-3-270m", "gemma-3-1b-pt"):
        assert ropes(name) == {(True, 1e6, 1.0), (False, 1e4, 1.0)}
    for name in ("gemma-3-4b-pt", "gemma-3-12b-it", "gemma-3-27b-it"):
        assert ropes(name) == {(True, 1e6, 8.0), (False, 1e4, 1.0)}


def test_query_scales():
    """hidden_size / num_attention_heads in the 27B models, the head width in all others."""
    odd = {n: p.config.query_pre_attn_scalar for n, p in PRESETS.items() if "27b" in n}
    assert odd == {
        "gemma-2-27b": 144,
        "gemma-2-27b-it": 144,
        "shieldgemma-27b": 144,
        "gemma-3-27b-pt": 168,
        "gemma-3-27b-it": 168,
    }
    for name, p in PRESETS.items():
        if name in odd:
            assert odd[name] == p.config.hidden_size / p.config.num_attention_heads
        else:
            assert p.config.query_pre_attn_scalar == p.config.head_dim == 256


def test_names():
    assert preset("gemma-3-270m").hub_id == "google/gemma-3-270m"
    assert preset("google/Gemma-2-2B-it") is PRESETS["gemma-2-2b-it"]
    with pytest.raises(GemkitError, match="did you mean gemma-3-270m"):
        preset("gemma3-270m")
    with pytest.raises(GemkitError, match="known models: gemma-2b"):
        preset("xyz")
