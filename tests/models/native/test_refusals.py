"""Refusals of the C++ core, in one line: arguments, weights, batches, plans, and calls that are out of order.

Budget: 20 s on two cores.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from models.native.running import (
    Pages,
    Weight,
    make_batch,
    tiny,
)
from parity.cases import tokens

from gemkit import _native
from gemkit.engine.sampling import Sampling
from gemkit.errors import GemkitError, UsageError
from gemkit.models.native import NativeRunner, kernel_path
from gemkit.models.native.plan import build_plan


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 300
    return text


@pytest.mark.parametrize(
    "arguments, kind, words",
    [
        ({"activations": "int4"}, UsageError, "activations must be one of"),
        ({"threads": 0}, UsageError, "threads"),
        ({"threads": 5000}, UsageError, "threads"),
        ({"max_tokens_per_step": 0}, GemkitError, "max_tokens"),
        ({"max_tokens_per_step": 10**6}, GemkitError, "max_tokens"),
    ],
)
def test_bad_arguments(arguments, kind, words):
    with pytest.raises(kind) as error:
        NativeRunner(*tiny(), **arguments)
    assert words in one_line(error)


@pytest.mark.parametrize("isa, words", [("mmx", "must be one of"), ("AVX2", "must be one of")])
def test_an_unknown_instruction_set(monkeypatch, isa, words):
    monkeypatch.setenv("GEMKIT_ISA", isa)
    for call in (kernel_path, lambda: NativeRunner(*tiny())):
        with pytest.raises(UsageError) as error:
            call()
        assert words in one_line(error)


def _reshaped(name: str, shape: tuple[int, ...]):
    def change(weights):
        weights[name] = Weight.plain(np.zeros(shape, np.float32))

    return change


def _shortened(name: str):
    def change(weights):
        weight = weights[name]
        weights[name] = Weight(weight.type, weight.shape, weight.data[:-1], weight.values)

    return change


def _retyped(name: str, kind: int):
    def change(weights):
        weight = weights[name]
        weights[name] = Weight(kind, weight.shape, weight.data, weight.values)

    return change


_Q = "model.layers.1.self_attn.q_proj.weight"
_DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (_reshaped(_Q, (96, 96)), "q_proj"),
        (_reshaped(_DOWN, (128, 96)), "down_proj"),
        (_reshaped("model.embed_tokens.weight", (511, 96)), "embed_tokens"),
        (_reshaped("model.norm.weight", (95,)), "model.norm"),
        (_reshaped("model.layers.0.self_attn.q_norm.weight", (96,)), "q_norm"),
        (_reshaped(_Q, (128 * 96,)), ""),
        (_shortened(_Q), "bytes"),
        (_shortened("model.embed_tokens.weight"), "bytes"),
        (_retyped(_Q, 2), "bytes"),
        (_retyped(_Q, 12), "256"),
        (_retyped(_Q, 16), "type"),
        (_retyped(_Q, -1), "type"),
        (lambda weights: weights.pop(_Q), ""),
        (lambda weights: weights.pop("model.norm.weight"), ""),
    ],
)
def test_weights_that_do_not_fit(change, words):
    config, weights = tiny()
    change(weights)
    with pytest.raises(GemkitError) as error:
        NativeRunner(config, weights)
    assert words in one_line(error)


def _bad_batches():
    def tokens_(value):
        return lambda b: b.tokens.__setitem__(3, value)

    def page(value):
        return lambda b: b.pages[0].__setitem__((0, 0), value)

    def position(value):
        return lambda b: b.positions.__setitem__(0, value)

    def table(b):
        b.pages = (b.pages[0][:, :0],)

    def more_tables(b):
        b.pages = (*b.pages, *b.pages)

    def empty_sequence(b):
        b.starts = np.array([0, 0], np.int32)

    def long(b):
        b.tokens = np.zeros(33, np.int32)
        b.starts = np.array([0, 33], np.int32)

    return {
        "id_past_the_vocabulary": (tokens_(512), "512 is not in the vocabulary of 512"),
        "negative_id": (tokens_(-1), "vocabulary"),
        "huge_id": (tokens_(2**31 - 1), "vocabulary"),
        "freed_page_in_sight": (page(-1), "no page"),
        "page_never_reserved": (page(4), "no page"),
        "context_overflow": (position(4096 - 7), "4096 is past the context of 4096"),
        "position_overflow": (position(2**31 - 1), "context"),
        "negative_position": (position(-1), "context"),
        "short_table": (table, "page table"),
        "extra_table": (more_tables, "page table"),
        "no_tokens": (empty_sequence, ""),
        "too_many_tokens": (long, "between 1 and 32 tokens"),
    }


@pytest.mark.parametrize("name", _bad_batches())
@pytest.mark.parametrize("call", ["step", "logits", "score", "hidden"])
def test_batches_that_cannot_run(name, call):
    change, words = _bad_batches()[name]
    runner = NativeRunner(*tiny(), threads=1, max_tokens_per_step=32)
    ids = tokens(runner.config, 8).astype(np.int32)
    pages = Pages(runner, 4)
    good = make_batch(pages, [(0, ids, 0)], (Sampling(),))
    expected = runner.logits(good)
    bad = make_batch(pages, [(0, ids, 0)], (Sampling(),))
    change(bad)
    extra = (np.ones(len(bad.tokens), np.int32),) if call == "score" else ()
    with pytest.raises(GemkitError) as error:
        getattr(runner, call)(bad, *extra)
    assert words in one_line(error)
    assert np.array_equal(runner.logits(good), expected), "a refused step leaves the cache alone"


def test_bad_targets_and_bad_reservations():
    runner = NativeRunner(*tiny(), threads=1)
    batch = make_batch(Pages(runner, 4), [(0, tokens(runner.config, 4), 0)])
    for targets in ([0, 1, 2, 512], [0, 1, 2, -2], [0, 1, 2]):
        with pytest.raises(GemkitError) as error:
            runner.score(batch, np.array(targets, np.int32))
        assert "target" in one_line(error)
    with pytest.raises(GemkitError) as error:
        runner.reserve([1, 1, 1])
    assert "group" in one_line(error)
    with pytest.raises(GemkitError) as error:
        runner.reserve([2**24 + 1])
    assert "pages" in one_line(error)
    with pytest.raises(GemkitError):
        runner.page_bytes(2)


def test_weights_that_are_not_numbers_are_reported():
    config, weights = tiny()
    weights["model.norm.weight"] = Weight.plain(np.full(config.hidden_size, np.nan, np.float32))
    runner = NativeRunner(config, weights, threads=1)
    with pytest.raises(GemkitError) as error:
        runner.step(make_batch(Pages(runner, 4), [(0, tokens(config, 4), 0)], (Sampling(),)))
    assert "not numbers" in one_line(error)


BAD_PLAN_VALUES = {
    "hidden": [0, -32, 2**40, 97],
    "ffn": [0, -1, 2**40],
    "heads": [0, -1, 5000, 3],
    "kv_heads": [0, 3, 5, -2],
    "head_dim": [0, 16, 33, 8192, -32],
    "vocab": [0, -1, 2**40, 513],
    "context": [0, -1, 2**40],
    "norm_eps": [0.0, -1.0, float("nan")],
    "embed_scale": [float("inf"), float("nan")],
    "query_scale": [float("inf"), float("nan")],
    "attention_softcap": [-1.0, float("nan")],
    "final_softcap": [-1.0, float("nan")],
    "embed": [-1, 10**6, 0x7FFFFFFF],
    "head": [-1, 10**6],
    "final_norm": [-1, 10**6],
    "group_windows": [[], [-1], [2**40], [0] * 9, [0] * 8],
    "ropes": [[], *([{"base": b, "factor": f}] for b, f in ((0.0, 1.0), (1e4, 0.0), (1e4, float("nan"))))],
    "layers": [[]],
    "tensors": [[]],
    "adapters": [[{"adapter": -1, "target": 0, "a": 0, "b": 0, "scale": 1.0, "magnitude": -1}]],
}  # fmt: skip


@pytest.mark.parametrize("key", BAD_PLAN_VALUES)
def test_plans_are_validated(key):
    plan = build_plan(*tiny())
    _native.Model.create(plan, 1, False, 8)
    for value in BAD_PLAN_VALUES[key]:
        with pytest.raises(ValueError) as error:
            _native.Model.create(plan | {key: value}, 1, False, 8)
        one_line(error)
    with pytest.raises(ValueError) as error:
        _native.Model.create({k: v for k, v in plan.items() if k != key}, 1, False, 8)
    assert key in one_line(error)


@pytest.mark.parametrize("key", ["group", "rope", "input_norm", "pre_ffn_norm", "q_norm", "k_proj", "down_proj"])
def test_layers_of_plans_are_validated(key):
    plan = build_plan(*tiny())
    optional = key.endswith("norm") and key not in ("input_norm", "pre_ffn_norm")
    for value in (-2, 10**6, 2**31 - 1, *(() if optional else (-1,))):
        layers = [dict(layer) for layer in plan["layers"]]
        layers[1][key] = value
        with pytest.raises(ValueError) as error:
            _native.Model.create(plan | {"layers": layers}, 1, False, 8)
        assert "layer 1" in one_line(error)


# Straight into the module, in a process of their own: a crash is a failure, not the end.
def test_hostile_calls_are_refused_and_never_crash():
    source = os.path.dirname(os.path.dirname(os.path.dirname(sys.modules["gemkit.arch.config"].__file__)))
    tests = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    hostile = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hostile_calls.py")
    run = subprocess.run(
        [sys.executable, "-X", "faulthandler", hostile, source],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([tests, source])},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    wrong = [line for line in run.stdout.splitlines() if line.startswith("WRONG")]
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong[:30])
    refused = int(run.stdout.split("refused ")[1].split()[0])
    assert refused > 2000, run.stdout
