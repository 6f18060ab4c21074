"""Adapters in PEFT's layout against peft itself, and clear refusals of all but LoRA and DoRA. Budget: 15 s."""

import dataclasses
import json
import shutil
import time
import warnings

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from parity import transformers_models as hf
from parity.cases import CASES
from parity.tolerances import NATIVE_FLOAT32, TRAIT_MARGIN, relative_error
from weights import hf_files
from weights.hf_files import edit

from gemkit.errors import GemkitError
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.lora import LoraConfig, check_fits
from gemkit.weights.peft.config import CONFIG, WEIGHTS
from gemkit.weights.peft.read import read_peft

CASE = CASES["gemma3"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 3, "target_modules": ALL},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "regular expression": {"r": 2, "target_modules": r".*\.layers\.[13]\.mlp\.(up|down)_proj"},
    "some layers": {"r": 2, "target_modules": ["o_proj"], "layers_to_transform": [0, 2]},
    "patterns": {
        "r": 4,
        "lora_alpha": 7,
        "target_modules": ALL,
        # Whole names, ends of names, expressions, dots that match anything, one that fits nothing; where two fit, the
        # first counts. In the order of the alphabet: peft sorts them when it saves.
        "rank_pattern": {
            "^model.layers.1.self_attn.k_proj": 5,
            "layers.0.mlp.up_proj": 9,
            r"model\.layers\.\d\.mlp\..*": 3,
            "proj": 11,
            "q_proj": 2,
        },
        "alpha_pattern": {r"layers\.(1|2)\.self_attn\.(k|q)_proj": 1.5, "o_proj": 32, "self_attn.v_proj": 13},
    },
    "patterns and rslora": {
        "r": 4,
        "lora_alpha": 2,
        "use_rslora": True,
        "target_modules": ["k_proj", "down_proj"],
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {r"layers\.2\.mlp\.down_proj": 6},
    },
    "dora": {"r": 4, "lora_alpha": 3, "use_dora": True, "target_modules": ALL},
    "dora, patterns and rslora": {
        "r": 4,
        "lora_alpha": 2,
        "use_dora": True,
        "use_rslora": True,
        "lora_dropout": 0.25,
        "target_modules": ["o_proj", "up_proj"],
        "rank_pattern": {"up_proj": 3},
        "alpha_pattern": {r"layers\.2\.mlp\.up_proj": 6},
    },
}


def randomise(model: torch.nn.Module) -> None:
    """Small whole numbers in both halves: peft starts with B = 0, and sums of these are exact."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randint(-3, 4, parameter.shape, generator=generator).to(parameter.dtype)


def make(folder, base: torch.nn.Module | None = None, *, adapter: str = "default", **options) -> torch.nn.Module:
    """An adapter of peft around a parity case (float64), saved; returns peft's model."""
    base = base or hf.build(CASE.config, CASE.params(), torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"task_type": "CAUSAL_LM"} | options)
        model = peft.get_peft_model(base, config, adapter, autocast_adapter_dtype=False)
        randomise(model)
        model.float().save_pretrained(folder)
    return model.double()


def state(folder) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in safetensors.torch.load_file(folder / WEIGHTS).items()}


def write(folder, tensors: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder) -> str:
    with pytest.raises(GemkitError) as error:
        read_peft(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value), error.value
    return str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    make(folder, r=4, lora_alpha=8, target_modules=ALL)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_weights_equal_pefts(tmp_path, name):
    """Bit for bit in float64, except for the rounding of DoRA's row lengths."""
    merged = {
        key: value.numpy() for key, value in make(tmp_path, **CONFIGS[name]).merge_and_unload().state_dict().items()
    }
    adapter = read_peft(tmp_path)
    check_fits(adapter, CASE.config)
    base, changed, dora = CASE.params(), set(), name.startswith("dora")
    for key, value in base.items():
        value = value.astype(np.float64)
        if key in adapter.parts:
            part = adapter.parts[key]
            assert part.a.dtype == part.b.dtype == np.float32 and (part.magnitude is not None) == dora
            value = value + part.b.astype(np.float64) @ part.a.astype(np.float64) * part.scale
            if dora:
                assert part.magnitude.dtype == np.float32 and part.magnitude.any()
                value *= part.magnitude[:, None] / np.linalg.norm(value, axis=1, keepdims=True)
        assert np.allclose(value, merged[key], 1e-14 * dora, 0), key
        changed |= {key} if not np.array_equal(merged[key], base[key].astype(np.float64)) else set()
    assert changed == set(adapter.parts) and adapter.name == tmp_path.name
    assert adapter.rank == max(len(part.a) for part in adapter.parts.values())
    if name == "patterns":
        assert {part.rank for part in adapter.parts.values()} == {2, 3, 4, 5, 9}
        assert len({part.scale for part in adapter.parts.values()}) >= 5
    if name == "dora, patterns and rslora":
        assert adapter.config == LoraConfig(4, 2, 0.25, ("o_proj", "up_proj"), rslora=True, dora=True)


@pytest.mark.parametrize("name", ["plain", "patterns and rslora", "dora", "dora, patterns and rslora"])
def test_logits_equal_pefts(tmp_path, name):
    """The core adds the adapter without merging."""
    model = make(tmp_path, **CONFIGS[name], init_lora_weights="gaussian")
    tensors = {
        key: 1 + value / 10 if "magnitude" in key else value / 30  # ordinary sizes
        for key, value in state(tmp_path).items()
    }
    write(tmp_path, tensors)
    model.load_adapter(tmp_path, "default", autocast_adapter_dtype=False)
    model.set_adapter("default")
    hf.exact_buffers(model.get_base_model(), CASE.config)
    expected = hf.logits(model, CASE.tokens())
    weights = Checkpoint.from_params(CASE.config, CASE.params()).tensors
    actual = hf_files.native_logits(CASE.config, weights, CASE.tokens(), [read_peft(tmp_path)], 0)
    assert relative_error(actual, expected) <= NATIVE_FLOAT32
    without = hf_files.native_logits(CASE.config, weights, CASE.tokens())
    assert relative_error(without, expected) >= TRAIT_MARGIN * NATIVE_FLOAT32


def test_multimodal_prefixes(tmp_path):
    """Trained on the multimodal class, "q_proj" is in the vision tower too; text never gets there."""
    make(tmp_path / "now", hf_files.multimodal().double(), r=2, target_modules=["q_proj", "down_proj"])
    make(tmp_path / "text", r=2, target_modules=["q_proj", "down_proj"])
    expected = read_peft(tmp_path / "text")
    tensors = state(tmp_path / "now")
    assert any(".model.language_model.layers." in key for key in tensors) and any("vision" in key for key in tensors)
    # As peft wrote them with transformers 4
    older = {
        key.replace(".model.language_model.", ".language_model.model.").replace(".model.vision", ".vision"): value
        for key, value in tensors.items()
    }
    shutil.copytree(tmp_path / "now", tmp_path / "older")
    write(tmp_path / "older", older)
    for name in ("now", "older"):
        adapter = read_peft(tmp_path / name)
        check_fits(adapter, CASE.config)
        assert adapter.parts.keys() == expected.parts.keys()
        assert len(adapter.ignored) == sum("vision" in key and "lora_A" in key for key in tensors) > 0
    write(tmp_path / "older", {key: value for key, value in older.items() if "vision" in key})
    assert "no layer of the text model" in refusal(tmp_path / "older")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder, dtype):
    write(folder, {key: value.to(dtype) for key, value in state(folder).items()})
    for key, part in read_peft(folder).parts.items():
        name = f"base_model.model.{key.removesuffix('.weight')}"
        assert part.a.dtype == part.b.dtype == np.float32
        assert np.array_equal(part.a, state(folder)[f"{name}.lora_A.weight"].float().numpy())
        assert np.array_equal(part.b, state(folder)[f"{name}.lora_B.weight"].float().numpy())


def test_where_the_adapter_is(saved, folder):
    expected = read_peft(saved).parts.keys()
    for path in (folder, folder / CONFIG, folder / WEIGHTS, str(folder)):
        assert read_peft(path).parts.keys() == expected and read_peft(path).name == "adapter"
    # Some programs keep the adapter's name in the tensors'
    write(folder, {key.replace(".weight", ".default.weight"): value for key, value in state(folder).items()})
    assert read_peft(folder).parts.keys() == expected
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "pickle" in refusal(folder)
    (folder / "adapter_model.bin").unlink()
    assert WEIGHTS in refusal(folder)
    (folder / CONFIG).unlink()
    assert CONFIG in refusal(folder)
    shutil.rmtree(folder)
    assert "does not exist" in refusal(folder)


# --- refusals --------------------------------------------------------------------------------------------------------

PEFTS_OWN = {
    "bias": ({"bias": "lora_only"}, "biases"),
    "lora_bias": ({"lora_bias": True}, "biases ('lora_bias')"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "tokens": ({"trainable_token_indices": [5, 6]}, "trained tokens"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "embedding"),
    "head": ({"target_modules": ["lm_head"]}, "lm_head"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "replicated": ({"layer_replication": [[0, 2], [1, 4]]}, "replicated layers"),
}


@pytest.mark.parametrize("name", PEFTS_OWN)
def test_more_than_lora_is_refused(tmp_path, name):
    """Written by peft; then with the configuration made innocent, the tensors alone must tell where they can."""
    options, message = PEFTS_OWN[name]
    base = hf.build(CASE.config, CASE.params(), torch.float32)
    make(tmp_path, base, **{"r": 2, "target_modules": ["q_proj"]} | options)
    assert message in refusal(tmp_path)
    edit(tmp_path / CONFIG, **dict.fromkeys(options, ...))
    if name not in ("pissa", "olora", "replicated", "bias"):
        assert "merge_and_unload" in refusal(tmp_path)
    elif name == "replicated":
        with pytest.raises(GemkitError, match="does not have"):
            check_fits(read_peft(tmp_path), CASE.config)


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "PREFIX_TUNING", "lora", None, 7])
def test_other_kinds_are_refused(folder, kind):
    edit(folder / CONFIG, peft_type=kind)
    assert "peft_type" in refusal(folder)


BAD = {
    "fan_in_fan_out": True,
    "bias": "all",
    "use_rslora": "yes",
    "use_dora": 1,
    "lora_dropout": 1.0,
    "use_qalora": True,
    "alora_invocation_tokens": [5],
    "arrow_config": {"top_k": 3},
    "target_parameters": ["x"],
    "megatron_config": {"a": 1},
    "something_new": {"a": 1},
    "init_lora_weights": "loftq",
    "r": 0,
    "lora_alpha": 0,
    "rank_pattern": [1],
    "alpha_pattern": {"q_proj": "a lot"},
}


@pytest.mark.parametrize("key", BAD)
def test_bad_configurations(folder, key):
    edit(folder / CONFIG, **{key: BAD[key]})
    assert key in refusal(folder)


@pytest.mark.parametrize("value", [True, 1.5, -3, "8", None, 10**9, float("inf")])
def test_bad_numbers(folder, value):
    edit(folder / CONFIG, r=value)
    refusal(folder)
    edit(folder / CONFIG, r=4, lora_alpha=value)
    if value in (1.5, -3, 10**9) and value is not True:
        assert {part.scale for part in read_peft(folder).parts.values()} == {value / 4}
    else:
        refusal(folder)


def test_harmless_keys_of_other_versions(folder):
    edit(
        folder / CONFIG,
        qalora_group_size=...,
        peft_version="9.9",
        eva_config={"rho": 2.0},
        new_but_off=False,
        more=None,
    )
    edit(folder / CONFIG, auto_mapping={"base_model_class": "X"}, init_lora_weights="eva", lora_dropout=0.1)
    read_peft(folder)


HOSTILE = [
    "(.*)*x",
    "(a+)+$",
    "(.*)+",
    "(?:a|a)*b",
    ".*.*.*.*.*.*.*.*x",
    "(a{1,99}){1,99}",
    "a?" * 40 + "x",
    "a" * 5000,
]
HOSTILE += [
    "(.|.)" * 40 + "x",
    "(?x: (a+) +)x",
    "(?=(a+))*b",
    "(",
    "[",
    "*",
    "(?P<a",
    "\\",
    "a{99999999999}",
    "(" * 300,
]


@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda pattern: ascii(pattern[:20]))
def test_patterns_that_would_take_forever(folder, pattern):
    start = time.perf_counter()
    for key in ("rank_pattern", "alpha_pattern"):
        edit(folder / CONFIG, **{"rank_pattern": {}, "alpha_pattern": {}, key: {pattern: 4}})
        assert "pattern" in refusal(folder)
    assert time.perf_counter() - start < 2


def test_slowest_patterns_that_are_let_through(folder):
    edit(folder / CONFIG, rank_pattern=dict.fromkeys(map("x{}".format, range(2001)), 4))
    assert "too long" in refusal(folder)
    edit(folder / CONFIG, rank_pattern={f"a?a?a?x{i}": 4 for i in range(1990)})
    edit(folder / CONFIG, alpha_pattern={".*.*(a|b|c)x": 4, "(m?o?d?e?l?.?l?a?y?|b)x": 1})
    start = time.perf_counter()
    read_peft(folder)
    assert time.perf_counter() - start < 4


def test_bad_tensors(folder):
    whole = state(folder)
    a, b = next((key, key.replace("lora_A", "lora_B")) for key in whole if "lora_A" in key)

    def with_tensors(**changes) -> str:
        found = {key: value.clone() for key, value in (whole | changes).items() if value is not None}
        write(folder, found)
        return refusal(folder)

    assert "lacks lora_B" in with_tensors(**{b: None}) and "lacks lora_A" in with_tensors(**{a: None})
    assert "rank 4" in with_tensors(**{a: torch.ones(5, 96)}) and "rank 4" in with_tensors(**{b: torch.ones(128, 3)})
    assert "shape" in with_tensors(**{a: torch.ones(4)}) and "shape" in with_tensors(**{a: torch.ones(4, 0)})
    assert "finite" in with_tensors(**{a: whole[a] * float("nan")})
    assert "I8" in with_tensors(**{a: whole[a].to(torch.int8)})
    assert "two lora_A" in with_tensors(**{a.replace(".weight", ".other.weight"): whole[a]})
    assert "two names" in with_tensors(
        **{key.replace("model.model.", "model.model.language_model."): whole[key] for key in (a, b)}
    )
    assert "no tensor of LoRA" in with_tensors(**{a.removeprefix("base_model.model."): whole[a], a: None})
    assert "no module" in with_tensors(**{a.replace("layers", "l" * 999): whole[a]})
    write(folder, {})
    assert "no layer" in refusal(folder)
    (folder / WEIGHTS).write_bytes(b"x" * 99)
    assert WEIGHTS in refusal(folder)
    for broken in ("", "[]", "{", '{"r": 1, "r": 2}'):
        (folder / CONFIG).write_text(broken)
        assert CONFIG in refusal(folder)


def test_bad_magnitudes(tmp_path):
    make(tmp_path, r=2, target_modules=["q_proj"], use_dora=True)
    whole = state(tmp_path)
    key = next(key for key in whole if key.endswith("q_proj.lora_magnitude_vector"))

    def with_magnitude(value: torch.Tensor | None, name: str = key) -> str:
        write(tmp_path, {k: v.clone() for k, v in whole.items() if k != key} | ({} if value is None else {name: value}))
        return refusal(tmp_path)

    assert "lacks lora_magnitude_vector" in with_magnitude(None)
    assert "[rows]" in with_magnitude(whole[key][None].clone()) and "magnitudes" in with_magnitude(
        whole[key][1:].clone()
    )
    assert "finite" in with_magnitude(whole[key] * float("inf"))
    assert "no tensor of" in with_magnitude(whole[key].clone(), key + ".a.b")
    for name in ("", ".default", ".weight", ".default.weight"):
        write(tmp_path, {k + name * (k == key): v.clone() for k, v in whole.items()})
        assert np.array_equal(next(iter(read_peft(tmp_path).parts.values())).magnitude, whole[key].numpy())
    edit(tmp_path / CONFIG, use_dora=False)
    assert "lacks use_dora" in refusal(tmp_path)


def test_another_models_adapter(saved, folder):
    adapter = read_peft(saved)
    check_fits(adapter, CASE.config)
    shallow = dataclasses.replace(CASE.config, num_hidden_layers=2, layers=CASE.config.layers[:2])
    wide = CASES["gemma3_27b"].config
    with pytest.raises(GemkitError, match=r"layers\.2\.[a-z_.]+', which this model does not have") as error:
        check_fits(adapter, shallow)
    assert "\n" not in str(error.value) and str(saved) in str(error.value)
    with pytest.raises(GemkitError, match=r"k_proj\.weight is for a matrix of \[32, 96\], this model has \[64, 96\]"):
        check_fits(adapter, wide)
    tensors = {key.replace("q_proj", "r_proj"): value for key, value in state(folder).items()}
    write(folder, tensors)
    with pytest.raises(GemkitError, match="r_proj"):
        check_fits(read_peft(folder), CASE.config)


def test_changed_configurations_are_refused_or_read(folder):
    rng = np.random.default_rng(9)
    data = (folder / CONFIG).read_bytes()
    assert json.loads(data)["peft_type"] == "LORA"
    refused = 0
    for _ in range(400):
        bad = bytearray(data)
        for at in rng.integers(0, len(data), 2).tolist():
            bad[at] = rng.choice(np.frombuffer(data, "u1"))
        (folder / CONFIG).write_bytes(bad)
        try:
            read_peft(folder)
        except GemkitError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
            refused += 1
    assert 100 < refused < 400


def test_adapters_of_mlx_and_what_is_no_adapter(tmp_path):
    def refusal() -> str:
        with pytest.raises(GemkitError) as error:
            read_peft(tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no adapter_config.json: give the folder" in refusal()
    (tmp_path / "config.json").write_text("{}")
    assert "holds a model" in refusal()
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / CONFIG).write_text("{}")
    assert "such as checkpoint-7" in refusal()
    pair = {"model.layers.0.self_attn.q_proj.lora_a": torch.ones(8, 2)}
    safetensors.torch.save_file(pair, tmp_path / "adapters.safetensors")
    assert "mlx_lm.fuse" in refusal()
    for facts in ({"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}, {"lora_layers": 8}, {}):
        (tmp_path / CONFIG).write_text(json.dumps(facts))
        assert "adapter of mlx_lm" in refusal() and "mlx_lm.fuse" in refusal()
    (tmp_path / CONFIG).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1\n")
    assert "Git LFS pointer" in refusal()
