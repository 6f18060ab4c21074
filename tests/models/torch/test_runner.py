"""`TorchRunner` behind the engine: cut and batched as it likes, it gives the reference's logits. Budget: 60 s."""

import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from engine.batches import make_batch, one
from engine.vocabulary import tokenizer, vocabulary
from parity.cases import CASES, random_params
from parity.tolerances import FRAMEWORK_FLOAT32, relative_error
from weights.files import tiny_config

from gemkit.arch import reference
from gemkit.engine.engine import Engine
from gemkit.engine.sampling import Sampling, sample
from gemkit.errors import UsageError
from gemkit.models.torch import TorchRunner, load_runner
from gemkit.models.torch.attention import Where, attend_one, attend_plain, visible
from gemkit.weights.checkpoint import Checkpoint

NO_IDS = np.zeros(0, np.int32)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models lose time to more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def runner_of(config, params, **options) -> TorchRunner:
    return load_runner(config, Checkpoint.from_params(config, params).tensors, device="cpu", **options)


@pytest.mark.parametrize("name", ["gemma1_2b", "gemma2", "gemma3", "untied_embedding"])
def test_cuts_and_neighbours_change_nothing(name, monkeypatch):
    monkeypatch.setattr(TorchRunner, "page_size", 16)  # several pages a window
    case = CASES[name]
    ids = case.tokens()
    expected = reference.forward(case.config, case.params(), ids)
    runner = runner_of(case.config, case.params())
    runner.reserve([120] * len(runner.groups))
    cuts = [0, 1, 17, 18, 40, len(ids)]
    chunks = []
    for first, end in pairwise(cuts):
        # Next to others of other lengths, which write their own pages
        parts = [(0, ids[:3], 0), (1, ids[first:end], first), (2, ids[: 5 + first % 3], 0)]
        chunks.append(runner.logits(make_batch(runner, parts))[3 : 3 + end - first])
    assert relative_error(np.concatenate(chunks), expected) <= FRAMEWORK_FLOAT32
    alone = runner.logits(make_batch(runner, [(4, ids[:9], 0)]))
    assert relative_error(alone, expected[:9]) <= FRAMEWORK_FLOAT32
    hidden = runner.hidden(make_batch(runner, [(3, ids, 0)]))
    assert relative_error(hidden, reference.hidden(case.config, case.params(), ids)) <= FRAMEWORK_FLOAT32
    targets = np.append(ids[1:], -1).astype(np.int32)
    scores = runner.score(make_batch(runner, [(5, ids, 0)]), targets)
    shifted = expected - expected.max(1, keepdims=True)
    exact = shifted[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(shifted[:-1]).sum(1))
    assert np.abs(scores[:-1] - exact).max() < 1e-3 and scores[-1] == 0


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=3, logprobs=None),
    Sampling(temperature=0.8, top_p=0.9, seed=4, logprobs=3),
    Sampling(temperature=1.3, top_k=5, min_p=0.05, seed=5, logprobs=0),
    Sampling(temperature=1.0, logit_bias=((7, 9.0), (11, -2.0)), seed=6),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_tokens_are_those_of_the_definition(sampling):
    case = CASES["gemma3"]
    runner = runner_of(case.config, case.params())
    runner.reserve([80] * len(runner.groups))
    parts = [(place, case.tokens()[: 5 + 7 * place], 0) for place in range(4)]
    logits = runner.logits(make_batch(runner, parts))
    ends = np.cumsum([len(ids) for _, ids, _ in parts]) - 1
    result = runner.step(make_batch(runner, parts, sampling))
    for b, end in enumerate(ends):
        token, logprob, top_ids, top_logprobs = sample(logits[end], sampling, b, NO_IDS, 0)
        assert result.tokens[b] == token
        if sampling.logprobs is not None:
            assert result.logprobs[b] == pytest.approx(logprob, abs=1e-5)
            assert result.top_ids[b].tolist() == top_ids.tolist()
            assert np.allclose(result.top_logprobs[b], top_logprobs, atol=1e-5)


def test_the_engine_writes_the_references_text(monkeypatch):
    """Past four windows, several requests at once, the cache growing."""
    monkeypatch.setattr(TorchRunner, "page_size", 16)
    config = tiny_config("gemma3_text", head_dim=32, vocab_size=len(vocabulary().pieces))
    params = random_params(config, 1)
    engine = Engine(runner_of(config, params), tokenizer(), context_size=128)
    requests = [engine.add([2, *range(40, 40 + n)], Sampling(), max_tokens=40, ignore_eos=True) for n in (3, 30, 17)]
    while not all(request.finished for request in requests):
        engine.step()
    for request in requests:
        ids = request.ids
        assert len(request.tokens) == 40
        logits = reference.forward(config, params, ids[:-1])
        start = request.prompt_length - 1
        assert np.argmax(logits[start:], 1).tolist() == [token.id for token in request.tokens]


def test_no_slower_with_depth():
    case = CASES["window"]
    runner = runner_of(case.config, case.params())
    runner.reserve([20] * len(runner.groups))
    generator = np.random.default_rng(0)
    ids = generator.integers(0, case.config.vocab_size, 1100)
    for first in range(0, 1024, 256):
        runner.hidden(one(runner, ids[first : first + 256], first))

    def seconds(first: int) -> float:
        times = []
        for position in range(first, first + 20):
            began = time.perf_counter()
            runner.step(one(runner, ids[position : position + 1], position, Sampling(logprobs=None)))
            times.append(time.perf_counter() - began)
        return min(times)  # the others had to share the processor

    shallow, deep = seconds(10), seconds(1024)
    assert deep <= 1.5 * shallow + 4e-3, (shallow, deep)


def test_compiled_once_for_all_layers_and_depths(monkeypatch):
    """As on CUDA but for the capture: one graph for the layers, one for the head, and no more for more cache."""
    monkeypatch.setattr("gemkit.models.torch.runner.TorchRunner.first_pages", 2)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    case = CASES["window"]
    plain, compiled = (runner_of(case.config, case.params(), dtype="int8", compile=c) for c in (False, True))
    ids = np.random.default_rng(0).integers(0, case.config.vocab_size, 700)

    def both(position: int) -> None:
        token = ids[position : position + 1]
        eager, graph = (r.step(one(r, token, position, Sampling())) for r in (plain, compiled))
        assert eager.tokens.tolist() == graph.tokens.tolist()
        assert eager.logprobs[0] == pytest.approx(graph.logprobs[0], abs=1e-4)

    for runner in (plain, compiled):
        runner.reserve([4] * len(runner.groups))
    for position in (0, 1, 2):
        both(position)
    assert counters["stats"]["unique_graphs"] == 2
    assert compiled.steps.recorded == 1
    both(70)
    both(200)
    assert compiled.steps.recorded == 3, "one for each size of the cache"
    for runner in (plain, compiled):
        runner.reserve([20] * len(runner.groups))
    both(3)
    both(690)
    assert compiled.steps.recorded == 2, "a cache that moved is recorded again"
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_one_query_a_sequence_has_a_form_of_its_own():
    torch.manual_seed(0)
    B, S, N, K, H = 3, 33, 4, 2, 16
    q, k, v = (torch.randn(B, n, heads, H) * 2 for n, heads in ((1, N), (S, K), (S, K)))
    at, key_at = Where(torch.tensor([[3], [20], [32]])), Where(torch.arange(S).expand(B, S))
    for softcap, window in ((None, None), (5.0, 6)):
        seen = visible(at, key_at, window)
        expected = attend_plain(q, k, v, seen, scale=0.3, softcap=softcap)
        found = attend_one(q, k, v, seen, scale=0.3, softcap=softcap)
        assert relative_error(found, expected) <= FRAMEWORK_FLOAT32


def test_tokens_next_to_a_long_chunk_run_apart(monkeypatch):
    case = CASES["gemma3"]
    runner = runner_of(case.config, case.params())
    runner.reserve([120] * len(runner.groups))
    ids = np.random.default_rng(1).integers(0, case.config.vocab_size, 200)
    shapes = []
    hidden = runner.steps.hidden
    decode = runner.steps.decode
    monkeypatch.setattr(runner.steps, "hidden", lambda s, *more: shapes.append(s.tokens.shape) or hidden(s, *more))
    monkeypatch.setattr(runner.steps, "decode", lambda s, *more: shapes.append(s.tokens.shape) or decode(s, *more))
    parts = [(0, ids[:1], 0), (1, ids, 0), (2, ids[5:6], 0), (3, ids[7:8], 0)]
    together = runner.step(make_batch(runner, parts, Sampling()))
    assert shapes == [(1, 256), (4, 1)]
    for b, part in enumerate(parts):
        alone = runner.step(make_batch(runner, [part], Sampling()))
        assert together.tokens[b] == alone.tokens[0]
        assert together.logprobs[b] == pytest.approx(alone.logprobs[0], abs=1e-5)


def test_a_missing_device():
    case = CASES["gemma1_2b"]
    weights = Checkpoint.from_params(case.config, case.params()).tensors
    with pytest.raises(UsageError, match="torch has no device 'cuda:7' here"):
        load_runner(case.config, weights, device="cuda:7")
