"""`JaxRunner` behind the engine: cut and batched as it likes, it gives the reference's logits. Budget: 40 s."""

import time
from itertools import pairwise

import jax
import numpy as np
import pytest
from engine.batches import make_batch, one
from engine.vocabulary import tokenizer, vocabulary
from parity.cases import CASES, random_params
from parity.tolerances import FRAMEWORK_FLOAT32, NATIVE_LOGPROB, relative_error
from weights.files import tiny_config

from gemkit.arch import reference
from gemkit.engine.engine import Engine
from gemkit.engine.sampling import Sampling, log_softmax, sample
from gemkit.errors import GemkitError, UsageError
from gemkit.models.jax import JaxRunner, load_runner
from gemkit.weights.checkpoint import Checkpoint

NO_IDS = np.zeros(0, np.int32)


def runner_of(config, params, **options) -> JaxRunner:
    return load_runner(config, Checkpoint.from_params(config, params).tensors, **{"device": "cpu"} | options)


@pytest.fixture(scope="module")
def simple() -> JaxRunner:
    """A runner without windows, for tests that run the same shapes, so that few are compiled."""
    runner = runner_of(CASES["gemma1_2b"].config, CASES["gemma1_2b"].params())
    runner.reserve([40])
    return runner


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_cuts_and_neighbours_change_nothing(name, monkeypatch):
    monkeypatch.setattr(JaxRunner, "page_size", 16)  # several pages a window
    case = CASES[name]
    ids = case.tokens()
    expected = reference.forward(case.config, case.params(), ids)
    runner = runner_of(case.config, case.params())
    runner.reserve([120] * len(runner.groups))
    freed = 0
    for first, end in pairwise([0, 1, 9, 17, 24, 32, 40, len(ids)]):
        # Next to others of other lengths, which write their own pages
        places = [(0, 0, 3), (1, first, end), (2, 0, 5 + first % 3)]
        batch = make_batch(runner, [(place, ids[start:stop], start) for place, start, stop in places])
        wanted = np.concatenate([expected[start:stop] for _, start, stop in places])
        assert relative_error(runner.logits(batch), wanted) <= FRAMEWORK_FLOAT32
        freed += sum((table[1] == -1).sum() for table in batch.pages)
    assert freed > 0


def test_hidden_and_score_agree_with_the_logits(simple):
    runner, case = simple, CASES["gemma1_2b"]
    ids = case.tokens()[:40]
    batch = make_batch(runner, [(0, ids, 0), (1, ids[:7], 0)])
    hidden = runner.hidden(batch)[: len(ids)]
    assert relative_error(hidden, reference.hidden(case.config, case.params(), ids)) <= FRAMEWORK_FLOAT32
    targets = np.concatenate([ids[1:], [-1], ids[:7]]).astype(np.int32)
    targets[3] = -1
    scores, logits = runner.score(batch, targets), runner.logits(batch)
    wanted = [0.0 if t < 0 else log_softmax(row)[t] for row, t in zip(logits, targets, strict=True)]
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=NATIVE_LOGPROB)
    assert scores.dtype == np.float32 and scores[3] == 0


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=3, logprobs=None),
    Sampling(temperature=0.8, top_p=0.9, seed=4, logprobs=3),
    Sampling(temperature=1.3, top_k=5, min_p=0.05, seed=5, logprobs=20),
    Sampling(temperature=1.0, logit_bias=((7, 9.0), (11, -2.0)), seed=6),
    Sampling(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, seed=7),
]


def test_tokens_are_those_of_the_definition():
    case = CASES["untied_embedding"]
    runner = runner_of(case.config, case.params())
    runner.reserve([80] * len(runner.groups))
    parts = [(place, case.tokens()[: 5 + 7 * place], 0) for place in range(4)]
    logits = runner.logits(make_batch(runner, parts))
    ends = np.cumsum([len(ids) for _, ids, _ in parts]) - 1
    drawn = set()
    for sampling in SAMPLINGS:
        batch = make_batch(runner, parts, sampling)
        batch.draws[2] = 0
        result = runner.step(batch)
        assert len(result.tokens) == len(result.top_ids) == 3
        for row, b in enumerate((0, 1, 3)):
            wanted = sample(logits[ends[b]], sampling, b, batch.history[b], int(batch.prompt_lengths[b]))
            token, logprob, top_ids, top_logprobs = wanted
            assert result.tokens[row] == token, sampling
            drawn.add(bool(token != np.argmax(logits[ends[b]])))
            if sampling.logprobs is not None:
                assert abs(result.logprobs[row] - logprob) <= NATIVE_LOGPROB
                assert result.top_ids[row].tolist() == top_ids.tolist()
                np.testing.assert_allclose(result.top_logprobs[row], top_logprobs, rtol=0, atol=NATIVE_LOGPROB)
    assert drawn == {True, False}


def test_the_engine_writes_the_references_text(monkeypatch):
    """Past four windows, several requests at once, the cache growing."""
    monkeypatch.setattr(JaxRunner, "page_size", 16)
    monkeypatch.setattr("gemkit.models.jax.runner.JaxRunner.first_pages", 8)
    config = tiny_config("gemma2", vocab_size=len(vocabulary().pieces))
    params = random_params(config, 1)
    runner = runner_of(config, params)
    engine = Engine(runner, tokenizer(), context_size=128)
    requests = [engine.add([2, *range(40, 40 + n)], Sampling(), max_tokens=36, ignore_eos=True) for n in (3, 30, 17)]
    sizes = set()
    while not all(request.finished for request in requests):
        engine.step()
        sizes |= {len(k) for k, _ in runner.caches}
    assert len(sizes) > 1, "the cache grew on the way"
    for request in requests:
        ids = request.ids
        assert len(request.tokens) == 36
        logits = reference.forward(config, params, ids[:-1])
        start = request.prompt_length - 1
        assert np.argmax(logits[start:], 1).tolist() == [token.id for token in request.tokens]


def test_compiled_once_for_a_shape_and_no_slower_with_depth():
    case = CASES["gemma1_2b"]
    runner = runner_of(case.config, case.params())
    runner.reserve([20])
    token = case.tokens()[:1]

    def run(first: int) -> float:
        began = time.perf_counter()
        runner.step(one(runner, token, first, Sampling(logprobs=None)))
        return time.perf_counter() - began

    run(10)
    assert runner.compilations == 1, "all of a step of one token"
    run(1024)
    assert runner.compilations == 2
    shallow, deep = (min(run(first + n) for n in range(30)) for first in (10, 1024))
    assert deep <= 1.5 * shallow + 4e-3
    assert runner.compilations == 2
    for first in range(0, 1200, 64):
        run(first)
    assert runner.compilations == 5, "128, 256, 512, 1024 and 2048 slots, for 19 numbers of pages"
    # Nothing was compiled behind our back, as for another placement of the same shape
    functions = (getattr(runner, f"_run_{name}") for name in ("decode", "hidden", "take", "top", "logprobs"))
    assert sum(function._cache_size() for function in functions) == runner.compilations


def test_a_step_writes_the_cache_in_place(simple):
    before = [k.unsafe_buffer_pointer() for k, _ in simple.caches]
    simple.hidden(one(simple, CASES["gemma1_2b"].tokens()[:5], 0))
    assert [k.unsafe_buffer_pointer() for k, _ in simple.caches] == before


def test_after_a_broken_step_the_cache_is_there_again(simple):
    ids = CASES["gemma1_2b"].tokens()[:5]
    expected = simple.logits(one(simple, ids, 0))
    for k, v in simple.caches:
        k.delete()
        v.delete()
    assert np.array_equal(simple.logits(one(simple, ids, 0)), expected)


def test_too_much_cache_is_refused_and_the_old_one_kept(simple):
    ids = CASES["gemma1_2b"].tokens()[:5]
    expected = simple.logits(one(simple, ids, 0))
    with pytest.raises(GemkitError, match="memory is short"):
        simple.reserve([1 << 36])
    assert np.array_equal(simple.logits(one(simple, ids, 0)), expected)


def test_weights_that_are_not_numbers_are_reported():
    case = CASES["gemma1_2b"]
    params = case.params()
    params["model.norm.weight"] = np.full(case.config.hidden_size, np.nan, np.float32)
    runner = runner_of(case.config, params)
    runner.reserve([20])
    with pytest.raises(GemkitError, match="not numbers"):
        runner.step(one(runner, case.tokens()[:4], 0, Sampling()))


def test_what_it_says_of_itself():
    case = CASES["untied_embedding"]
    runner = runner_of(case.config, case.params(), dtype="bfloat16")
    assert (runner.path, runner.activations) == ("jax cpu", "bfloat16") and runner.adapter_count == 0
    vectors = sum(value.size for value in case.params().values() if value.ndim == 1)
    assert runner.weight_bytes == 2 * case.config.parameter_count() + 2 * vectors
    assert runner.token_bytes == runner.weight_bytes - 2 * 512 * 96
    assert runner.page_bytes(0) == 2 * 64 * 2 * 32 * 2 * 2


@pytest.mark.parametrize("name", ["cuda:7", "npu", "cpu:99", "cpu:x"])
def test_a_device_that_is_not_there(name):
    case = CASES["gemma1_2b"]
    with pytest.raises(UsageError, match=f"JAX has no device '{name}' here"):
        runner_of(case.config, case.params(), device=name)
    assert jax.devices("cpu")
