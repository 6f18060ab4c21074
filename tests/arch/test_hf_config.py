"""config.json in and out: published files, transformers' own classes, both rope dialects, refusals. Budget: 15 s."""

import copy
import dataclasses
import json

import pytest
from parity import transformers_models as hf
from parity.cases import CASES

from gemkit.arch import hf_config
from gemkit.arch.config import LayerSpec, ModelConfig
from gemkit.arch.hf_config import from_hf, to_hf
from gemkit.arch.presets import PRESETS
from gemkit.errors import GemkitError

CONFIGS = {name: p.config for name, p in PRESETS.items()} | {name: case.config for name, case in CASES.items()}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

# What the published files say, without keys that are not about the model.
PUBLISHED = {
    "gemma-2b": {
        "model_type": "gemma",
        "attention_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    },
    "gemma-2-27b": {
        "model_type": "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma-3-1b-it": {
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "gemma-3-4b-it": {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"model_type": "siglip_vision_model"},
    },
    "gemma-3-27b-it": {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "model_type": "gemma3_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"model_type": "siglip_vision_model"},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_read_as_their_presets(name):
    before = copy.deepcopy(PUBLISHED[name])
    assert from_hf(PUBLISHED[name]) == PRESETS[name].config
    assert PUBLISHED[name] == before, "the caller's dictionary is left alone"


@pytest.mark.parametrize(("kind", "name"), [("gemma", "gemma-7b"), ("gemma2", "gemma-2-2b")])
def test_defaults_of_transformers_read_as_their_presets(kind, name):
    assert from_hf(hf.config_class(kind)().to_dict()) == PRESETS[name].config


def test_defaults_of_gemma3_are_those_of_transformers():
    """A file with the three sizes alone means the same in transformers and here."""
    short = {"model_type": "gemma3_text", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    assert from_hf(short) == from_hf(hf.config_class("gemma3_text")(**short).to_dict())


@every_config
def test_round_trip(config):
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


@every_config
def test_round_trip_through_transformers(config):
    theirs = hf.config_class(config.model_type)(**to_hf(config))
    assert from_hf(json.loads(theirs.to_json_string(use_diff=False))) == config
    assert from_hf(json.loads(theirs.to_json_string(use_diff=True))) == config


@every_config
def test_the_words_of_transformers_4_mean_the_same(config):
    """Flat rope keys and a pattern, without rope_parameters: here and in transformers' own reader."""
    old = to_hf(config)
    del old["rope_parameters"]
    if config.model_type == "gemma3_text" and old["layer_types"][:6].count("full_attention") < 2:
        del old["layer_types"]
        old["sliding_window_pattern"] = next(i for i, s in enumerate(config.layers) if s.sliding_window is None) + 1
    assert from_hf(old) == config
    theirs = hf.config_class(config.model_type)(**old)
    assert from_hf(theirs.to_dict()) == config


def test_new_rope_parameters_beside_flat_bases():
    """Published files may split the settings: factors in rope_parameters, bases in the flat keys."""
    data = to_hf(PRESETS["gemma-3-4b-it"].config)
    data["rope_parameters"] = {
        "full_attention": {"factor": 8.0, "rope_type": "linear"},
        "sliding_attention": {"rope_type": "default"},
    }
    data["rope_scaling"] = None
    assert from_hf(data) == PRESETS["gemma-3-4b-it"].config
    assert from_hf({**data, "rope_theta": 2e6}).layers[5] == LayerSpec(None, 2e6, 8.0)


def theirs(name: str, **changes) -> ModelConfig:
    """The configuration that transformers makes of the file, in its own form."""
    data = {**PUBLISHED[name], **changes}
    return from_hf(hf.config_class(data["model_type"])(**copy.deepcopy(data)).to_dict())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma-3-1b-it", {"sliding_window_pattern": 2}),
        ("gemma-3-1b-it", {"_sliding_window_pattern": 2}),
        ("gemma-2-27b", {"sliding_window_pattern": 3}),
        ("gemma-3-1b-it", {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}),
        ("gemma-3-1b-it", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}),
        ("gemma-3-1b-it", {"rope_scaling": {"type": "linear", "factor": 8.0}}),
        ("gemma-3-1b-it", {"rope_scaling": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}),
        ("gemma-2b", {"rope_scaling": {"type": "linear", "factor": 8.0}}),
        ("gemma-2b", {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}),
        ("gemma-2b", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}}),
        ("gemma-2b", {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}),
        ("gemma-2-27b", {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}),
        ("gemma-3-1b-it", {"rope_theta": 5e5, "rope_local_base_freq": 2e4}),
    ],
)
def test_keys_that_disagree_mean_what_they_mean_to_transformers(name, changes):
    assert from_hf({**PUBLISHED[name], **changes}) == theirs(name, **changes)


def test_caps_that_the_class_does_not_apply():
    """The attention cap of Gemma 3, and the final one in the multimodal class."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    config = from_hf({**PUBLISHED["gemma-3-1b-it"], **caps})
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (None, 30.0)
    data = PUBLISHED["gemma-3-4b-it"]
    config = from_hf({**data, "text_config": data["text_config"] | caps})
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (None, None)


@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True), (None, False)])
def test_the_outer_level_decides_about_tying(outer, inner):
    data = copy.deepcopy(PUBLISHED["gemma-3-4b-it"])
    data["text_config"]["tie_word_embeddings"] = inner
    assert from_hf({**data, "tie_word_embeddings": outer}).tie_word_embeddings == (outer is not False)


def test_sizes_that_are_left_out_are_the_defaults():
    for kind in ("gemma", "gemma2", "gemma3_text"):
        theirs = hf.config_class(kind)().to_dict()
        assert from_hf({"model_type": kind}) == from_hf(theirs)
    assert hf_config.left_out({"model_type": "gemma", "hidden_size": 8}) == ["intermediate_size", "num_hidden_layers"]
    assert hf_config.left_out({"hidden_size": 8, "text_config": {"num_hidden_layers": 1, "intermediate_size": 2}}) == [
        "hidden_size"
    ]


@pytest.mark.parametrize("act", ["gelu_new", "gelu_fast"])
def test_other_spellings_of_the_activation(act):
    assert from_hf({**PUBLISHED["gemma-2-27b"], "hidden_activation": act}) == PRESETS["gemma-2-27b"].config


def test_stop_ids_outside_the_vocabulary_are_left_out():
    small = {**PUBLISHED["gemma-3-1b-it"], "vocab_size": 64}
    assert from_hf({**small, "eos_token_id": [1, 5, 64, -1]}).stop_token_ids == (1, 5)


@pytest.mark.parametrize("eos", [1, [1], [1, 106], None])
def test_stop_ids_always_hold_the_end_of_a_turn(eos):
    assert from_hf({**PUBLISHED["gemma-3-1b-it"], "eos_token_id": eos}).stop_token_ids == (1, 106)


@pytest.mark.parametrize("name", ["gemma-2-27b", "gemma-2b"])
def test_a_null_cap_is_no_cap(name):
    config = from_hf({**PUBLISHED[name], "attn_logit_softcapping": None})
    assert config.attn_logit_softcapping is None


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma-2b", {"model_type": "llama"}, "llama.*gemma, gemma2"),
        ("gemma-2b", {"model_type": None}, "model_type"),
        ("gemma-2b", {"hidden_size": None}, "hidden_size"),
        ("gemma-2b", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("gemma-2b", {"num_hidden_layers": "18"}, "num_hidden_layers"),
        ("gemma-2b", {"attention_bias": True}, "attention_bias"),
        ("gemma-2b", {"hidden_activation": "silu"}, "hidden_activation"),
        ("gemma-2b", {"eos_token_id": "1"}, "eos_token_id"),
        ("gemma-2b", {"eos_token_id": [[1]]}, "eos_token_id"),
        ("gemma-2b", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ("gemma-2b", {"rope_scaling": {"type": "linear"}}, "factor"),
        ("gemma-2b", {"rope_scaling": [8]}, "rope_scaling"),
        ("gemma-2b", {"rope_theta": "ten"}, "rope_theta"),
        ("gemma-2-27b", {"hidden_activation": "gelu"}, "gelu_pytorch_tanh"),
        ("gemma-2-27b", {"vocab_size": "many"}, "vocab_size"),
        ("gemma-2-27b", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "flatten"),
        ("gemma-2b", {"model_type": "gemma3n"}, "gemma3n.*another Gemma"),
        ("gemma-3-1b-it", {"use_bidirectional_attention": True}, "embedding model"),
        ("gemma-3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma-3-1b-it", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma-3-1b-it", {"sliding_window": -5}, "sliding_window"),
        ("gemma-3-1b-it", {"layer_types": ["full_attention"]}, "26 layers"),
        ("gemma-3-1b-it", {"layer_types": ["chunked_attention"] * 26}, "chunked_attention"),
        ("gemma-3-1b-it", {"partial_rotary_factor": 0.5}, "partial_rotary"),
        ("gemma-3-1b-it", {"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
        ("gemma-3-4b-it", {"text_config": None}, "text_config"),
    ],
)
def test_refused_files(name, changes, words):
    with pytest.raises(GemkitError, match=words) as caught:
        from_hf({**PUBLISHED[name], **changes})
    assert "\n" not in str(caught.value)


JUNK = [None, True, "x", "", -1, 0, 1.5, 2**70, float("inf"), float("nan"), [], [None], {}, {"x": 1}, [[]], [{}]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_junk_in_any_place_is_refused_or_harmless(name):
    """Never another error: a wrong value raises GemkitError with the name of the key, or belongs to a key not read."""
    places = [(PUBLISHED[name], key) for key in PUBLISHED[name]]
    extra = ("rope_parameters", "layer_types", "sliding_window_pattern", "tie_word_embeddings", "rms_norm_eps")
    places += [(PUBLISHED[name], key) for key in extra]
    for _, key in places:
        for junk in JUNK:
            for data in (
                {**PUBLISHED[name], key: junk},
                {**PUBLISHED[name], "text_config": {**PUBLISHED[name].get("text_config", {}), key: junk}},
                {**PUBLISHED[name], "rope_scaling": {"rope_type": "linear", "factor": junk, key: junk}},
                {**PUBLISHED[name], "rope_parameters": {"full_attention": junk, "sliding_attention": {key: junk}}},
            ):
                try:
                    config = from_hf(data)
                except GemkitError as error:
                    assert "\n" not in str(error) and len(str(error)) < 400
                else:
                    assert config.parameter_count() > 0


def test_refused_things():
    for thing in ([], "gemma", None, {}):
        with pytest.raises(GemkitError, match=r"config\.json"):
            from_hf(thing)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma1_2b", {"post_norms": True}),
        ("gemma1_2b", {"query_pre_attn_scalar": 16.0}),
        ("gemma1_2b", {"final_logit_softcapping": 30.0}),
        ("gemma1_2b", {"layers": CASES["window"].config.layers[:2]}),
        ("gemma2", {"qk_norm": True}),
        ("gemma2", {"layers": CASES["gemma3"].config.layers}),
        ("gemma3", {"attn_logit_softcapping": 50.0}),
        ("gemma3", {"layers": (LayerSpec(8, 1e4), LayerSpec(16, 1e4), LayerSpec(None, 1e6), LayerSpec(None, 1e6))}),
        ("gemma3", {"layers": (LayerSpec(8, 1e4), LayerSpec(8, 1e5), LayerSpec(None, 1e6), LayerSpec(None, 1e6))}),
    ],
)
def test_facts_that_a_model_type_cannot_express(name, changes):
    with pytest.raises(GemkitError, match="cannot express"):
        to_hf(dataclasses.replace(CASES[name].config, **changes))
