"""Packed rows, adapters and gradients, in the same words in torch, JAX and Keras. Budget: 90 s.

Keras runs on PyTorch here; its other backends run the same functions in ``tests/models/keras``.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from parity.cases import CASES
from parity.tolerances import FRAMEWORK_FLOAT32, TRAIT_MARGIN, relative_error

from gemkit.arch import reference
from gemkit.arch.tensors import manifest
from gemkit.weights.checkpoint import Checkpoint

os.environ.setdefault("KERAS_BACKEND", "torch")
RANK, SCALE = 3, 0.7
ADAPTED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


@dataclasses.dataclass(frozen=True)
class Framework:
    """decoder: of a case, with low-rank parts by name. hidden: of int [B, T] ids. gradients: by name, of the loss.

    run: calls layers with activation checkpointing.
    """

    where: type
    decoder: Callable
    put: Callable
    get: Callable
    gradients: Callable
    run: Callable

    def hidden(self, decoder, ids, **options) -> np.ndarray:
        return self.get(decoder.hidden(self.put(ids), **options)[0])

    def at(self, positions, segments=None):
        return self.where(self.put(positions), None if segments is None else self.put(segments))


def _torch() -> Framework:
    from gemkit.models.torch import Where, load_decoder
    from gemkit.models.torch.linear import LowRank
    from gemkit.models.torch.load import put as put_parameter

    def decoder(config, params, parts: Mapping = {}):
        found = load_decoder(config, Checkpoint.from_params(config, params).tensors, trainable=lambda spec: True)
        for name, (a, b, magnitude) in parts.items():
            base = found.get_parameter(name).detach()
            gain = None if magnitude is None else torch.from_numpy(magnitude)
            put_parameter(found, name, LowRank(base, torch.from_numpy(a), torch.from_numpy(b), SCALE, gain))
        return found

    def gradients(decoder, ids, **options):
        logits = decoder.logits(decoder.hidden(torch.from_numpy(ids), **options)[0])
        torch.nn.functional.cross_entropy(logits[0, :-1], torch.from_numpy(ids[0, 1:])).backward()
        return {name: p.grad.numpy() for name, p in decoder.named_parameters() if p.grad is not None}

    def run(layer, *args):
        return torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)

    return Framework(Where, decoder, torch.from_numpy, lambda x: x.detach().numpy(), gradients, run)


def _jax() -> Framework:
    import jax
    import jax.numpy as jnp

    from gemkit.models.jax import Where, load_decoder
    from gemkit.models.jax.linear import LowRank

    def decoder(config, params, parts: Mapping = {}):
        found = load_decoder(config, Checkpoint.from_params(config, params).tensors, trainable=lambda spec: True)
        adapted = {
            name: LowRank(found.params[name], jnp.asarray(a), jnp.asarray(b), SCALE, magnitude)
            for name, (a, b, magnitude) in parts.items()
        }
        return dataclasses.replace(found, params={**found.params, **adapted})

    def gradients(decoder, ids, **options):
        def loss(decoder):
            logprobs = jax.nn.log_softmax(decoder.logits(decoder.hidden(ids, **options)[0])[0, :-1])
            return -jnp.take_along_axis(logprobs, ids[0, 1:, None], 1).mean()

        found = {}
        for name, value in jax.jit(jax.grad(loss))(decoder).params.items():
            if isinstance(value, LowRank):
                found |= {f"{name}.{part}": np.asarray(getattr(value, part)) for part in ("a", "b")}
                if value.magnitude is not None:
                    found[f"{name}.magnitude"] = np.asarray(value.magnitude)
            else:
                found[name] = np.asarray(value)
        return found

    def run(layer, *args):
        return jax.checkpoint(layer)(*args)

    return Framework(Where, decoder, jnp.asarray, np.asarray, gradients, run)


def _keras() -> Framework:
    import keras

    from gemkit.models.keras import Where, load_decoder

    def decoder(config, params, parts: Mapping = {}):
        found = load_decoder(config, Checkpoint.from_params(config, params).tensors)
        for name, (a, b, magnitude) in parts.items():
            weight = found.adapt(name, len(a), SCALE, dora=magnitude is not None)
            for variable, value in ((weight.a, a), (weight.b, b), (weight.magnitude, magnitude)):
                if value is not None:
                    variable.assign(value)
        return found

    def gradients(decoder, ids, **options):
        logits = decoder.logits(decoder.hidden(torch.from_numpy(ids), **options)[0])
        torch.nn.functional.cross_entropy(logits[0, :-1], torch.from_numpy(ids[0, 1:])).backward()
        found = {}
        for variable in decoder.trainable_variables:
            name = variable.path.replace("/", ".").replace("proj.magnitude", "proj.weight.magnitude")
            found[name.replace("proj.lora_", "proj.weight.")] = variable.value.grad.numpy()
        return found

    def get(x):
        return keras.ops.convert_to_numpy(keras.ops.stop_gradient(x))

    def run(layer, *args):
        return torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)

    return Framework(Where, decoder, keras.ops.convert_to_tensor, get, gradients, run)


FRAMEWORKS = {"torch": _torch, "jax": _jax, "keras": _keras}


@pytest.fixture(scope="module", params=FRAMEWORKS)
def on(request) -> Framework:
    return FRAMEWORKS[request.param]()


def parts_of(name: str, dora: bool = False) -> dict[str, tuple]:
    """A, B and magnitudes of an adapter that changes the logits visibly."""
    config = CASES[name].config
    params, found = CASES[name].params(), {}
    for key, spec in manifest(config).items():
        if spec.lora and any(part in key for part in ADAPTED):
            draw = np.random.default_rng(len(found))
            a, b = (
                draw.standard_normal(shape).astype(np.float32) * 0.1
                for shape in ((RANK, spec.shape[1]), (spec.shape[0], RANK))
            )
            magnitude = (np.linalg.norm(params[key], axis=1) * draw.uniform(0.5, 1.5, spec.shape[0])).astype(np.float32)
            found[key] = a, b, magnitude if dora else None
    return found


def merged(params: Mapping[str, np.ndarray], parts: Mapping[str, tuple]) -> dict[str, np.ndarray]:
    found = dict(params)
    for key, (a, b, magnitude) in parts.items():
        w = params[key].astype(np.float64) + SCALE * b.astype(np.float64) @ a
        if magnitude is not None:
            w *= (magnitude / np.linalg.norm(w, axis=1))[:, None]
        found[key] = w.astype(np.float32)
    return found


@pytest.mark.parametrize("name", ["window", "gemma2", "gemma3"])
def test_packed_sequences_are_computed_as_alone(on, name):
    """Three sequences in a row, longer than the window and shorter, one token of padding before and after."""
    case = CASES[name]
    decoder, lengths = on.decoder(case.config, case.params()), (40, 5, 25)
    ids = case.tokens()[: sum(lengths)].astype(np.int32)
    padded = np.concatenate([[0], ids, [0]])[None].astype(np.int32)
    positions = np.concatenate([[0], *map(np.arange, lengths), [0]])[None].astype(np.int32)
    segments = np.repeat([0, 1, 2, 3, 0], (1, *lengths, 1))[None].astype(np.int32)
    packed = on.hidden(decoder, padded, where=on.at(positions, segments))[0, 1:-1]
    bounds = np.cumsum([0, *lengths])
    for first, last in itertools.pairwise(bounds):
        alone = on.hidden(decoder, ids[None, first:last])[0]
        assert relative_error(packed[first:last], alone) <= FRAMEWORK_FLOAT32
    open_segments = on.hidden(decoder, padded, where=on.at(positions))[0, 1:-1]
    assert relative_error(open_segments, packed) > TRAIT_MARGIN * FRAMEWORK_FLOAT32


def test_inputs_take_the_place_of_tokens(on):
    case = CASES["gemma3"]
    decoder, ids = on.decoder(case.config, case.params()), case.tokens()[None].astype(np.int32)
    expected = on.hidden(decoder, ids)
    assert np.array_equal(on.hidden(decoder, ids, inputs=decoder.embed(on.put(ids))), expected)
    doubled = on.hidden(decoder, ids, inputs=2 * decoder.embed(on.put(ids)))
    assert relative_error(doubled, expected) > TRAIT_MARGIN * FRAMEWORK_FLOAT32


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_gives_the_logits_of_merged_weights(on, dora):
    case, parts = CASES["gemma3"], parts_of("gemma3", dora)
    ids = case.tokens()[None].astype(np.int32)
    expected = reference.hidden(case.config, merged(case.params(), parts), ids[0])
    assert (
        relative_error(on.hidden(on.decoder(case.config, case.params(), parts), ids)[0], expected) <= FRAMEWORK_FLOAT32
    )
    plain = reference.hidden(case.config, case.params(), ids[0])
    assert relative_error(plain, expected) > TRAIT_MARGIN * FRAMEWORK_FLOAT32


@pytest.mark.parametrize(
    "name, dora", [("attention_softcap", None), ("untied_embedding", None), ("gemma3", False), ("gemma3", True)]
)
def test_gradients_by_name_are_equal(name, dora):
    """torch = JAX = Keras, of all parameters and of those of adapters; with activation checkpointing too."""
    case, ids = CASES[name], CASES[name].tokens()[None]
    parts = {} if dora is None else parts_of(name, dora)
    found = {}
    for key, framework in FRAMEWORKS.items():
        on = framework()
        found[key] = on.gradients(on.decoder(case.config, case.params(), parts), ids)
        again = on.gradients(on.decoder(case.config, case.params(), parts), ids, run=on.run)
        assert all(
            relative_error(again[n], value) <= FRAMEWORK_FLOAT32 for n, value in found[key].items() if value.any()
        )
    if parts:  # all of torch's parameters are trainable, those of adapted matrices aside
        for name in ("jax", "keras"):
            found[name] = {n: v for n, v in found[name].items() if n in found["torch"]}
    low_rank = {f"{n}.{part}" for n in parts for part in ("a", "b", *(("magnitude",) if dora else ()))}
    assert found["torch"].keys() == (manifest(case.config).keys() - parts.keys()) | low_rank
    for name, value in found["torch"].items():
        assert value.any(), name
        for other in ("jax", "keras"):
            assert relative_error(found[other][name], value) <= 10 * FRAMEWORK_FLOAT32, (other, name)
