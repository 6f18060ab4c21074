"""ModelConfig: validation, layer patterns, parameter counts. Budget: 2 s."""

import dataclasses
import math

import pytest
from parity.cases import CASES

from gemkit.arch.config import STOP_TOKEN_IDS, LayerSpec, ModelConfig, layer_pattern
from gemkit.arch.presets import PRESETS
from gemkit.errors import GemkitError

GOOD = CASES["gemma3"].config


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model_type", "llama", "model_type"),
        ("vocab_size", 0, "vocab_size"),
        ("vocab_size", 2**31, "vocab_size"),
        ("hidden_size", -1, "hidden_size"),
        ("hidden_size", 96.0, "hidden_size"),
        ("intermediate_size", True, "intermediate_size"),
        ("num_attention_heads", None, "num_attention_heads"),
        ("num_key_value_heads", 3, "multiple"),
        ("num_hidden_layers", 5, "LayerSpec"),
        ("head_dim", 33, "even"),
        ("max_position_embeddings", 0, "max_position_embeddings"),
        ("rms_norm_eps", 0.0, "rms_norm_eps"),
        ("rms_norm_eps", "1e-6", "rms_norm_eps"),
        ("query_pre_attn_scalar", 10**400, "query_pre_attn_scalar"),
        ("query_pre_attn_scalar", math.inf, "query_pre_attn_scalar"),
        ("attn_logit_softcapping", 0.0, "attn_logit_softcapping"),
        ("final_logit_softcapping", math.nan, "final_logit_softcapping"),
        ("qk_norm", 1, "qk_norm"),
        ("post_norms", None, "post_norms"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings"),
        ("bos_token_id", 512, "bos|vocabulary"),
        ("stop_token_ids", (), "stop_token_ids"),
        ("stop_token_ids", [1], "stop_token_ids"),
        ("stop_token_ids", (1, 1), "repeats"),
        ("stop_token_ids", (1, -1), "vocabulary"),
        ("layers", GOOD.layers[:-1], "LayerSpec"),
        ("layers", (None,) * 4, "LayerSpec"),
        ("layers", (LayerSpec(0, 1e4),) * 4, "sliding_window"),
        ("layers", (LayerSpec(None, 0.0),) * 4, "rope_theta"),
        ("layers", (LayerSpec(None, 1e4, math.nan),) * 4, "rope_factor"),
    ],
)
def test_a_wrong_field_is_refused_by_name(field, value, words):
    with pytest.raises(GemkitError, match=words) as caught:
        dataclasses.replace(GOOD, **{field: value})
    assert "\n" not in str(caught.value)


def test_layer_pattern_places_full_layers():
    six = layer_pattern(18, period=6, sliding_window=512, rope_theta=1e6, rope_factor=8.0, local_rope_theta=1e4)
    assert [i for i, layer in enumerate(six) if layer.sliding_window is None] == [5, 11, 17]
    assert six[5] == LayerSpec(None, 1e6, 8.0) and six[0] == LayerSpec(512, 1e4, 1.0)
    two = layer_pattern(4, period=2, sliding_window=4096, rope_theta=1e4)
    assert [layer.sliding_window for layer in two] == [4096, None, 4096, None]
    assert layer_pattern(3, rope_theta=1e4) == (LayerSpec(None, 1e4),) * 3


@pytest.mark.parametrize("arguments", [{"period": 0}, {"period": 2}])
def test_layer_pattern_refuses(arguments):
    with pytest.raises(GemkitError, match="give"):
        layer_pattern(4, rope_theta=1e4, **arguments)


def test_table_2_of_the_gemma_report():
    """The report counts a vocabulary of 256,128 rows (arXiv 2403.08295, Table 2)."""
    for name, embedding, rest in (("gemma-2b", 524_550_144, 1_981_884_416), ("gemma-7b", 786_825_216, 7_751_248_896)):
        counts = dataclasses.replace(PRESETS[name].config, vocab_size=256_128).parameter_counts()
        assert (counts.embedding, counts.non_embedding) == (embedding, rest)


def test_untied_models_count_both_tables():
    untied: ModelConfig = dataclasses.replace(GOOD, tie_word_embeddings=False)
    assert untied.parameter_count() - GOOD.parameter_count() == GOOD.vocab_size * GOOD.hidden_size


def test_stop_ids():
    assert STOP_TOKEN_IDS == {"gemma": (1, 107), "gemma2": (1, 107), "gemma3_text": (1, 106)}
