"""The JAX decoder against the reference and transformers, and its forms of attention. Budget: 40 s."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import transformers_models as hf
from parity.cases import CASES
from parity.tolerances import (
    FRAMEWORK_FLOAT32,
    TRAIT_MARGIN,
    relative_error,
)

from gemkit.arch import reference
from gemkit.arch.presets import preset
from gemkit.errors import GemkitError, UsageError
from gemkit.models.jax import Decoder, abstract_decoder, load_decoder
from gemkit.models.jax.attention import Where, attend, attend_one, attend_plain, visible
from gemkit.models.jax.load import pick_dtype
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.quant import GGMLType

CPU = jax.devices("cpu")[0]
jitted = jax.jit(Decoder.__call__)


@pytest.fixture(autouse=True)
def on_the_cpu():
    with jax.default_device(CPU):
        yield


@functools.cache
def decoder_of(name: str, dtype=jnp.float32) -> Decoder:
    case = CASES[name]
    types = GGMLType.BF16 if dtype == jnp.bfloat16 else GGMLType.F32
    return load_decoder(case.config, Checkpoint.from_params(case.config, case.params(), types).tensors, dtype, CPU)


def logits(name: str, dtype=jnp.float32, positions=None, run=jitted) -> np.ndarray:
    case = CASES[name]
    where = None if positions is None else Where(positions)
    out = run(decoder_of(name, dtype), case.tokens()[None].astype(np.int32), where)
    assert out.dtype == jnp.float32
    return np.asarray(out[0])


@functools.cache
def expected_logits(name: str) -> np.ndarray:
    case = CASES[name]
    return reference.forward(case.config, case.params(), case.tokens())


def test_late_positions():
    case, positions = CASES["gemma3"], 100_003 + np.arange(CASES["gemma3"].length)
    expected = reference.forward(case.config, case.params(), case.tokens(), positions)
    ours = logits("gemma3", positions=positions[None].astype(np.int32))
    assert relative_error(ours, expected) <= FRAMEWORK_FLOAT32


def test_without_jit_it_is_the_same():
    assert relative_error(logits("qk_norm", run=Decoder.__call__), logits("qk_norm")) <= FRAMEWORK_FLOAT32


def test_gradients_equal_those_of_transformers():
    case = CASES["gemma3"]
    tokens = case.tokens()[None].astype(np.int32)
    assert 0 not in tokens, "transformers takes no gradient of <pad>"

    @jax.jit
    @jax.grad
    def gradient(decoder):
        log_probs = jax.nn.log_softmax(decoder(tokens)[0, :-1])
        return -jnp.take_along_axis(log_probs, tokens[0, 1:, None], 1).mean()

    theirs = hf.build(case.config, case.params(), torch.float32)
    hf.exact_buffers(theirs, case.config)
    ids = torch.from_numpy(case.tokens())
    torch.nn.functional.cross_entropy(theirs(ids[None]).logits[0, :-1], ids[1:]).backward()
    expected = {key: p.grad.numpy() for key, p in theirs.named_parameters() if p.grad is not None}
    ours = gradient(decoder_of("gemma3")).params
    assert ours.keys() == expected.keys()
    for key, value in ours.items():
        assert relative_error(value, expected[key]) <= 5 * FRAMEWORK_FLOAT32, key


@pytest.mark.parametrize(
    "name, count", [("gemma-2b", 2_506_172_416), ("gemma-7b", 8_537_680_896), ("gemma-3-270m", 268_098_176)]
)
def test_parameter_counts_without_memory(name, count):
    config = preset(name).config
    decoder = abstract_decoder(config, jnp.bfloat16)
    params = decoder.params
    assert sum(value.size for value in params.values()) == count
    assert {value.dtype for value in params.values() if value.ndim == 1} == {np.dtype(np.float32)}
    out = jax.eval_shape(Decoder.__call__, decoder, jax.ShapeDtypeStruct((2, 5), jnp.int32))
    assert (out.shape, out.dtype) == ((2, 5, config.vocab_size), jnp.float32)


@pytest.mark.parametrize("softcap, window", [(None, 6), (5.0, None)])
def test_the_door_to_attention_gives_the_plain_form(softcap, window):
    generator = np.random.default_rng(0)
    B, T, S, N, K, H = 2, 5, 33, 4, 2, 16
    q, k, v = (
        jnp.asarray(generator.standard_normal((B, n, heads, H)) * 2, jnp.float32)
        for n, heads in ((T, N), (S, K), (S, K))
    )
    query_at = Where(jnp.broadcast_to(jnp.arange(20, 20 + T), (B, T)))
    key_at = Where(jnp.broadcast_to(jnp.arange(S), (B, S)))
    seen = visible(query_at, key_at, window)
    ours = jax.jit(functools.partial(attend, scale=0.3, softcap=softcap))(q, k, v, seen)
    plain = jax.jit(functools.partial(attend_plain, scale=0.3, softcap=softcap))
    assert relative_error(ours, plain(q, k, v, seen)) <= FRAMEWORK_FLOAT32
    without = jax.jit(functools.partial(attend_plain, scale=0.3))(q, k, v, visible(query_at, key_at, None))
    assert relative_error(ours, without) > TRAIT_MARGIN * FRAMEWORK_FLOAT32


def test_one_query_a_sequence_has_a_form_of_its_own():
    generator = np.random.default_rng(0)
    B, S, N, K, H = 3, 33, 4, 2, 16
    q, k, v = (
        jnp.asarray(generator.standard_normal((B, n, heads, H)) * 2, jnp.float32)
        for n, heads in ((1, N), (S, K), (S, K))
    )
    at, key_at = Where(jnp.array([[3], [20], [32]])), Where(jnp.broadcast_to(jnp.arange(S), (B, S)))
    for softcap, window in ((None, None), (5.0, 6)):
        seen = visible(at, key_at, window)
        expected = attend_plain(q, k, v, seen, scale=0.3, softcap=softcap)
        assert relative_error(attend_one(q, k, v, seen, scale=0.3, softcap=softcap), expected) <= FRAMEWORK_FLOAT32
        door = attend(q, k, v, seen, scale=0.3, softcap=softcap)
        assert relative_error(door, expected) <= FRAMEWORK_FLOAT32


def test_split_over_devices_it_is_the_same():
    """Tensor parallel by the manifest's rules on four devices, which only a process of its own can have."""
    code = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import NamedSharding, PartitionSpec
from gemkit.arch.tensors import manifest
from gemkit.models.jax import Decoder
from parity.cases import CASES
case = CASES["gemma1_7b"]
mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu"))
place = {n: NamedSharding(mesh, PartitionSpec(*(None,) * (s.shard or 0), None if s.shard is None else "model"))
         for n, s in manifest(case.config).items()}
params = {n: jax.device_put(value, place[n]) for n, value in case.params().items()}
run = jax.jit(lambda p, t: Decoder(case.config, p)(t)).lower(params, case.tokens()[None].astype(np.int32)).compile()
assert "all-reduce" in run.as_text()
np.save(__import__("sys").argv[1], run(params, case.tokens()[None].astype(np.int32))[0])
"""
    tests = Path(__file__).parents[2]
    path = os.pathsep.join([str(tests), str(Path(sys.modules["gemkit"].__file__).parents[1])])
    target = Path(os.environ["GEMKIT_CACHE"]).absolute() / "split.npy"
    target.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code, str(target)], check=True, env=environment, timeout=60)
    assert relative_error(np.load(target), expected_logits("gemma1_7b")) <= FRAMEWORK_FLOAT32


def test_float16_is_refused_where_it_overflows():
    assert pick_dtype("float16", CASES["gemma1_2b"].config, CPU) == np.float16
    assert pick_dtype("auto", CASES["gemma3"].config, CPU) == np.float32
    with pytest.raises(UsageError, match="float16 overflows in Gemma 2 and 3: choose bfloat16"):
        pick_dtype("float16", CASES["gemma3"].config, CPU)
    with pytest.raises(UsageError, match="choose from auto"):
        pick_dtype("int3", CASES["gemma3"].config, CPU)


def test_bfloat16_comes_bit_by_bit_and_norms_stay_float32():
    case = CASES["gemma3"]
    tensors = Checkpoint.from_params(case.config, case.params(), GGMLType.BF16).tensors
    for name, value in decoder_of("gemma3", jnp.bfloat16).params.items():
        if value.ndim == 1:
            assert value.dtype == jnp.float32 and np.array_equal(value, case.params()[name])
        else:
            assert np.array_equal(np.asarray(value).view(np.uint8).reshape(-1), tensors[name].data)


@pytest.mark.parametrize("capability, has", [("7.5", False), ("8.0", True), ("9.0", True), ("gfx90a", True)])
def test_a_gpu_without_bfloat16(capability, has):
    gpu, config = SimpleNamespace(platform="gpu", compute_capability=capability), CASES["gemma3"].config
    for name in ("auto", "int8", "int4"):
        assert pick_dtype(name, config, gpu) == (jnp.bfloat16 if has else jnp.float32)
        assert pick_dtype(name, config, CPU) == jnp.float32
    if has:
        assert pick_dtype("bfloat16", config, gpu) == jnp.bfloat16
    else:
        with pytest.raises(UsageError, match="this GPU has no bfloat16: choose auto or float32"):
            pick_dtype("bfloat16", config, gpu)
    assert pick_dtype("bfloat16", config, CPU) == jnp.bfloat16


@pytest.mark.parametrize("fault", ["missing", "transposed"])
def test_a_wrong_tensor_is_named(fault):
    case, name = CASES["gemma3"], "model.layers.1.mlp.up_proj.weight"
    weights = dict(Checkpoint.from_params(case.config, case.params()).tensors)
    wrong = weights.pop(name)
    if fault == "transposed":
        weights[name] = type(wrong)(wrong.type, wrong.shape[::-1], wrong.data)
    with pytest.raises(GemkitError, match=name):
        load_decoder(case.config, weights)
