"""The training loop in PyTorch against transformers and peft, and what a run relies on. Budget: 60 s."""

import dataclasses

import numpy as np
import peft
import pytest
import torch
from parity import transformers_models as hf
from parity.cases import CASES
from parity.tolerances import FRAMEWORK_FLOAT32, INT8_MATRIX, LOSS_CURVE, relative_error
from train.curves import FALL, LR, batches, curve, options_of, parts_of

from gemkit.data.batch import TokenBatch
from gemkit.models.torch import load_decoder
from gemkit.models.torch.logprobs import logprobs_plain
from gemkit.train.adapter import named, trained_parts
from gemkit.train.loop_torch import TorchLoop, adapt, row_norms
from gemkit.weights.checkpoint import Checkpoint

METHODS = ["full", "lora", "dora"]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models: threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loop_of(name: str, method: str, recompute: str = "cheap", bits: int | None = None, **changes) -> TorchLoop:
    case = CASES[name]
    trainable = (lambda spec: True) if method == "full" else None
    weights = Checkpoint.from_params(case.config, case.params()).tensors
    decoder = load_decoder(case.config, weights, bits=bits, trainable=trainable)
    if method != "full":
        adapt(decoder, parts_of(case, method == "dora"), changes.pop("dropout", 0.0))
    return TorchLoop(decoder, options_of("full" if method == "full" else "lora", **changes), recompute)


def theirs(name: str, method: str) -> np.ndarray:
    """The losses of transformers with peft's adapter in a plain loop, from the same start on the same batches."""
    case = CASES[name]
    model = hf.build(case.config, case.params(), torch.float32)
    hf.exact_buffers(model, case.config)
    model.train()
    if method != "full":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=method == "dora")
        model = peft.get_peft_model(model, config)
        state = model.state_dict()
        for key, part in parts_of(case).items():
            state[f"base_model.model.{key.removesuffix('.weight')}.lora_A.default.weight"].copy_(
                torch.from_numpy(part.a)
            )
    rate = LR["full" if method == "full" else "lora"]
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.01},
             {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(decay, rate)
    losses, data = [], batches(case)
    for step in range(20):
        batch = data[step % 2]
        logits = model(torch.from_numpy(batch.tokens).long()).logits
        targets = torch.from_numpy(batch.targets).long()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gemma3", "gemma2"])
def test_the_curve_is_that_of_transformers_and_peft(name, method):
    expected = theirs(name, method)
    found = curve(loop_of(name, method), name)
    assert expected[-2:].mean() < expected[:2].mean() - FALL
    assert np.abs(found - expected).max() <= LOSS_CURVE
    assert np.abs(curve(loop_of(name, method), name, shift=1) - expected).max() > 10 * LOSS_CURVE


@pytest.mark.parametrize("recompute", ["layers", "none"])
def test_recomputing_changes_nothing(recompute):
    assert np.array_equal(
        curve(loop_of("gemma3", "lora", recompute), "gemma3"), curve(loop_of("gemma3", "lora"), "gemma3")
    )


def test_chunks_of_the_head_train_as_the_log_softmax_of_all_logits(monkeypatch):
    chunked = curve(loop_of("gemma2", "full"), "gemma2")
    monkeypatch.setattr("gemkit.models.torch.decoder.logprobs", logprobs_plain)
    assert np.abs(curve(loop_of("gemma2", "full"), "gemma2") - chunked).max() <= LOSS_CURVE


def test_accumulated_batches_are_one_large_batch():
    """Also where they have loss on different numbers of tokens."""
    data = batches(CASES["gemma3"])
    data[1].targets[0] = -1
    whole = TokenBatch(*(np.concatenate(pair) for pair in zip(*map(dataclasses.astuple, data))))
    several, one = loop_of("gemma3", "full"), loop_of("gemma3", "full")
    for _ in range(3):
        a, b = several.step(data, 1e-3), one.step([whole], 1e-3)
        assert a.loss == pytest.approx(b.loss, rel=1e-5) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        assert (a.tokens, a.loss_tokens) == (b.tokens, b.loss_tokens) == (96, 36)
    for name, value in several.parameters().items():
        assert relative_error(value, one.parameters()[name]) <= 100 * FRAMEWORK_FLOAT32, name


@pytest.mark.parametrize("method", METHODS)
def test_a_restored_state_goes_on_bit_for_bit(method):
    changes = {} if method == "full" else {"dropout": 0.1}
    through, first, second = (loop_of("gemma3", method, **changes) for _ in range(3))
    data = batches(CASES["gemma3"])
    torch.manual_seed(0)
    for step in range(6):
        through.step([data[step % 2]], 1e-2)
    torch.manual_seed(0)
    for step in range(3):
        first.step([data[step % 2]], 1e-2)
    state = {name: value.copy() for name, value in first.state().items()}
    torch.manual_seed(5)
    second.restore(state)
    for step in range(3, 6):
        second.step([data[step % 2]], 1e-2)
    assert all(np.array_equal(value, second.state()[name]) for name, value in through.state().items())


def test_a_value_that_is_not_finite_is_named_and_changes_nothing():
    loop = loop_of("gemma3", "full")
    name = "model.layers.2.mlp.up_proj.weight"
    with torch.no_grad():
        loop.trained[name][0, 0] = np.inf
    before = loop.parameters()
    metrics = loop.step(batches(CASES["gemma3"])[:1], 1e-2)
    assert not np.isfinite(metrics.loss) and metrics.non_finite in loop.trained
    assert all(np.array_equal(value, before[key]) for key, value in loop.parameters().items())


def test_evaluation_is_the_loss_without_dropout_or_change():
    loop, data = loop_of("gemma3", "lora", dropout=0.5), batches(CASES["gemma3"])
    before = loop.parameters()
    total, count = loop.evaluate(data[0])
    assert (total, count) == (loop.evaluate(data[0])[0], 24)
    assert total / count == pytest.approx(loop_of("gemma3", "lora").step(data[:1], 1e-3).loss, rel=1e-6)
    assert all(np.array_equal(value, before[key]) for key, value in loop.parameters().items())


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_on_quantised_weights_learns(bits):
    losses = curve(loop_of("gemma3", "lora", bits=bits), "gemma3")
    assert losses[-2:].mean() < losses[:2].mean() - FALL


def test_parameters_are_the_parts_of_the_adapter():
    loop, start = loop_of("gemma3", "dora"), parts_of(CASES["gemma3"], dora=True)
    arrays = {key: value for name, part in start.items() for key, value in named(name, part).items()}
    assert loop.parameters().keys() == arrays.keys()
    assert all(np.array_equal(loop.parameters()[key], value) for key, value in arrays.items())
    curve(loop, "gemma3")
    trained = trained_parts(start, loop.parameters())
    assert all(trained[name].b.any() and trained[name].scale == part.scale for name, part in start.items())


def test_row_norms_are_those_of_plain_and_quantised_matrices():
    name = "model.layers.0.mlp.up_proj.weight"
    expected = np.linalg.norm(CASES["gemma3"].params()[name], axis=1)
    assert relative_error(row_norms(loop_of("gemma3", "full").decoder, name), expected) <= FRAMEWORK_FLOAT32
    case = CASES["gemma3"]
    packed = load_decoder(case.config, Checkpoint.from_params(case.config, case.params()).tensors, bits=8)
    assert relative_error(row_norms(packed, name), expected) <= INT8_MATRIX
