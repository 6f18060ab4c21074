"""The training loop in JAX against the one in PyTorch, and what a run relies on. Budget: 210 s."""

import dataclasses

import jax
import numpy as np
import pytest
from parity.cases import CASES
from parity.tolerances import FRAMEWORK_FLOAT32, INT8_MATRIX, LOSS_CURVE, relative_error
from train.curves import FALL, batches, curve, options_of, parts_of

from gemkit.data.batch import TokenBatch
from gemkit.models import jax as in_jax
from gemkit.models import torch as in_torch
from gemkit.models.jax.logprobs import logprobs_plain
from gemkit.train import loop_jax, loop_torch
from gemkit.train.loop_jax import JaxLoop, row_norms
from gemkit.weights.checkpoint import Checkpoint

METHODS = ["full", "lora", "dora"]


def decoder_of(name: str, method: str, load=in_jax.load_decoder, bits: int | None = None):
    case = CASES[name]
    weights = Checkpoint.from_params(case.config, case.params()).tensors
    return load(case.config, weights, bits=bits, trainable=(lambda spec: True) if method == "full" else None)


def loop_of(name: str, method: str, recompute: str = "cheap", bits: int | None = None, dropout: float = 0.0) -> JaxLoop:
    decoder = decoder_of(name, method, bits=bits)
    if method != "full":
        decoder = loop_jax.adapt(decoder, parts_of(CASES[name], method == "dora"), dropout)
    return JaxLoop(decoder, options_of("full" if method == "full" else "lora"), recompute)


def theirs(name: str, method: str) -> loop_torch.TorchLoop:
    decoder = decoder_of(name, method, in_torch.load_decoder)
    if method != "full":
        loop_torch.adapt(decoder, parts_of(CASES[name], method == "dora"))
    return loop_torch.TorchLoop(decoder, options_of("full" if method == "full" else "lora"))


@pytest.mark.parametrize(
    "name, method",
    [("attention_softcap", "full"), ("attention_softcap", "lora"), ("gemma3", "full"), ("gemma3", "dora")],
)
def test_the_curve_and_the_parameters_are_those_of_torch(name, method):
    """With accumulation, where the first batch of two has fewer tokens with loss."""
    data = batches(CASES[name])
    data[0].targets[0, :20] = -1
    ours, other = loop_of(name, method), theirs(name, method)
    groups = [data[:1], data[1:], data]
    found, expected = (
        np.array([dataclasses.astuple(loop.step(groups[step % 3], 0.01))[:4] for step in range(12)])
        for loop in (ours, other)
    )
    losses, expected_losses = found[:, 0], expected[:, 0]
    assert expected_losses[-1] < expected_losses[2] - FALL
    assert np.abs(losses - expected_losses).max() <= LOSS_CURVE
    assert np.array_equal(found[:, 1:3], expected[:, 1:3]) and np.allclose(found[:, 3], expected[:, 3], rtol=1e-2)
    assert ours.evaluate(data[0]) == pytest.approx(other.evaluate(data[0]), abs=LOSS_CURVE * 24)
    theirs_now = other.parameters()
    assert ours.parameters().keys() == theirs_now.keys()
    for key, value in ours.parameters().items():
        assert value.dtype == np.float32 and np.allclose(value, theirs_now[key], atol=0.01), key


def test_a_mask_that_is_off_by_one_shows():
    right, wrong = (curve(loop_of("attention_softcap", "lora"), "attention_softcap", shift) for shift in (0, 1))
    assert np.abs(right - wrong).max() > 10 * LOSS_CURVE


@pytest.mark.parametrize("recompute", ["layers", "none"])
def test_recomputing_changes_no_loss(recompute):
    losses = [curve(loop_of("attention_softcap", "dora", way), "attention_softcap") for way in (recompute, "cheap")]
    assert np.abs(losses[0] - losses[1]).max() <= LOSS_CURVE


def test_recomputing_saves_memory():
    """Bytes that the compiled step takes, its arguments aside, on more rows than the matrices have."""
    data = TokenBatch(*(np.tile(value, (16, 2)) for value in dataclasses.astuple(batches(CASES["gemma3"])[0])))
    taken = []
    for recompute in ("layers", "cheap", "none"):
        loop = loop_of("gemma3", "dora", recompute)
        rows, draw = loop_jax._rows(data), np.zeros(2, np.uint32)
        lowered = loop._gradient.lower(None, loop.trained, loop._frozen, rows, np.float32(1), draw)
        taken.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    assert taken[0] < 0.9 * taken[1] < 0.8 * taken[2], taken


def test_chunks_of_the_head_train_as_the_log_softmax_of_all_logits(monkeypatch):
    chunked = curve(loop_of("attention_softcap", "full"), "attention_softcap")
    monkeypatch.setattr("gemkit.models.jax.decoder.logprobs", logprobs_plain)
    plain = curve(loop_of("attention_softcap", "full"), "attention_softcap")
    assert np.abs(plain - chunked).max() <= LOSS_CURVE


@pytest.mark.parametrize("method", METHODS)
def test_a_restored_state_goes_on_bit_for_bit(method):
    dropout = 0.0 if method == "full" else 0.1
    through, second = (loop_of("attention_softcap", method, dropout=dropout) for _ in range(2))
    data = batches(CASES["attention_softcap"])
    for step in range(3):
        through.step([data[step % 2]], 1e-2)
    state = through.state()
    given = {name: value.copy() for name, value in state.items()}
    for step in range(3, 6):
        through.step([data[step % 2]], 1e-2)
    assert all(np.array_equal(value, given[name]) for name, value in state.items())  # later steps do not write there
    second.restore(given)
    for value in given.values():
        value.fill(7)
    for step in range(3, 6):
        second.step([data[step % 2]], 1e-2)
    assert all(np.array_equal(value, second.state()[name]) for name, value in through.state().items())


def test_dropout_differs_by_step_by_batch_and_by_seed():
    data = batches(CASES["attention_softcap"])[:1]
    loop = loop_of("attention_softcap", "lora", dropout=0.5)
    for _ in range(2):
        loop.step(data, 1e-2)  # B is zero at first
    kept = {name: value.copy() for name, value in loop.state().items()}

    def gradient(draw: tuple[int, int]) -> np.ndarray:
        arguments = None, loop.trained, loop._frozen, loop_jax._rows(data[0]), np.float32(1), np.array(draw, np.uint32)
        return np.asarray(loop._gradient(*arguments)[0])

    assert gradient((2, 0)) == gradient((2, 0))
    assert len({float(gradient(draw)) for draw in ((2, 0), (2, 1), (3, 0))}) == 3
    other = loop_of("attention_softcap", "lora", dropout=0.5)
    other.options = dataclasses.replace(other.options, seed=1)
    seeded = JaxLoop(other.decoder, other.options)
    for one in (loop, seeded):
        one.restore(kept)
    assert loop.step(data, 1e-2).loss != seeded.step(data, 1e-2).loss


def test_a_value_that_is_not_finite_is_named_and_changes_nothing():
    loop = loop_of("attention_softcap", "full")
    name = "model.layers.1.mlp.up_proj.weight"
    state = {key: value.copy() for key, value in loop.state().items()}
    state[f"parameter.{name}"][0, 0] = np.inf
    loop.restore(state)
    metrics = loop.step(batches(CASES["attention_softcap"])[:1], 1e-2)
    assert not np.isfinite(metrics.loss) and metrics.non_finite in loop.trained
    assert all(np.array_equal(value, state[key]) for key, value in loop.state().items())


def test_evaluation_is_the_loss_without_dropout_or_change():
    loop, data = loop_of("attention_softcap", "lora", dropout=0.5), batches(CASES["attention_softcap"])
    before = loop.parameters()
    total, count = loop.evaluate(data[0])
    assert (total, count) == (loop.evaluate(data[0])[0], 24)
    assert total / count == pytest.approx(loop_of("attention_softcap", "lora").step(data[:1], 1e-3).loss, rel=1e-6)
    assert all(np.array_equal(value, before[key]) for key, value in loop.parameters().items())


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_on_quantised_weights_learns(bits):
    losses = curve(loop_of("attention_softcap", "lora", bits=bits), "attention_softcap")
    assert losses[-2:].mean() < losses[:2].mean() - FALL


def test_batches_of_one_shape_are_compiled_once_whatever_has_loss():
    loop, data = loop_of("attention_softcap", "lora"), batches(CASES["attention_softcap"])
    data[1].targets[0] = -1
    for batch in data:
        loop.step([batch], 1e-2)
    assert loop._gradient._cache_size() == loop._update._cache_size() == 1


def test_the_decoder_has_the_trained_arrays():
    loop = loop_of("attention_softcap", "lora")
    curve(loop, "attention_softcap")
    data = batches(CASES["attention_softcap"])[0]
    logprobs = jax.nn.log_softmax(loop.decoder(data.tokens))
    picked = np.take_along_axis(np.asarray(logprobs), np.maximum(data.targets, 0)[..., None], 2)[..., 0]
    assert -picked[data.targets >= 0].sum() == pytest.approx(loop.evaluate(data)[0], rel=1e-4)


def test_row_norms_are_those_of_plain_and_quantised_matrices():
    name = "model.layers.0.mlp.up_proj.weight"
    expected = np.linalg.norm(CASES["gemma3"].params()[name], axis=1)
    assert relative_error(row_norms(decoder_of("gemma3", "full"), name), expected) <= FRAMEWORK_FLOAT32
    assert relative_error(row_norms(decoder_of("gemma3", "lora", bits=8), name), expected) <= INT8_MATRIX
