"""Draws, masks and targets of one step, in every framework's runner. Budget: 30 s."""

import importlib
import os

import numpy as np
import pytest
from engine.batches import make_batch, one
from parity.cases import CASES
from parity.tolerances import NATIVE_LOGPROB

from gemkit.engine.interface import NO_IDS, Runner
from gemkit.engine.sampling import Sampling
from gemkit.weights.checkpoint import Checkpoint

CASE = CASES["gemma3"]
V = CASE.config.vocab_size
IDS = CASE.tokens()[:24].astype(np.int32)


@pytest.fixture(scope="module", params=["torch", "jax", "keras"])
def runner(request) -> Runner:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "jax"))
        module = importlib.import_module(f"gemkit.models.{request.param}")
    found = module.load_runner(CASE.config, Checkpoint.from_params(CASE.config, CASE.params()).tensors, dtype="float32")
    found.reserve([60] * len(found.groups))
    return found


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(logprobs=None),
        Sampling(temperature=1.0, top_k=20, seed=5, logprobs=3),
        Sampling(temperature=1.2, presence_penalty=1.0, repetition_penalty=1.4, seed=8, logprobs=1),
    ],
)
def test_several_draws_of_a_step_are_those_of_single_steps(runner, sampling):
    batch = make_batch(runner, [(0, IDS[:7], 0), (1, IDS, 0), (2, IDS[3:5], 0)], sampling)
    batch.draws[:] = [1, 4, 0]
    batch.history = (IDS[:7], IDS, NO_IDS)
    batch.prompt_lengths[:] = [5, 20, 0]
    together = runner.step(batch)
    assert together.tokens.shape == (5,) and together.target_logprobs is None
    single = make_batch(runner, [(0, IDS[:7], 0)], sampling)
    single.history, single.prompt_lengths[:], single.counters[:] = (IDS[:7],), 5, batch.counters[0]
    alone = [runner.step(single)]
    runner.hidden(make_batch(runner, [(1, IDS[:20], 0)]))
    for n in range(4):
        single = make_batch(runner, [(1, IDS[20 + n : 21 + n], 20 + n)], sampling)
        single.history, single.prompt_lengths[:] = (IDS[: 21 + n],), 20
        single.counters[:] = batch.counters[1] + n
        alone.append(runner.step(single))
    for r, result in enumerate(alone):
        assert together.tokens[r] == result.tokens[0]
        if sampling.logprobs is not None:
            assert together.logprobs[r] == pytest.approx(result.logprobs[0], abs=NATIVE_LOGPROB)
            assert together.top_ids[r].tolist() == result.top_ids[0].tolist()


def test_masks_are_obeyed(runner):
    free = one(runner, IDS, 0, Sampling())
    free.draws[:] = 3
    tokens = runner.step(free).tokens
    allowed = np.ones((3, V), bool)
    allowed[0, tokens[0]] = False
    allowed[2] = np.arange(V) == 17
    words = [np.packbits(np.append(row, np.zeros(-V % 32, bool)), bitorder="little").view(np.uint32) for row in allowed]
    free.masks = (words[0], None, words[2])
    masked, unmasked = runner.step(free), runner.logits(one(runner, IDS, 0))[-1].astype(np.float64)
    logprob = unmasked[17] - np.log(np.exp(unmasked).sum())
    assert masked.logprobs[2] == pytest.approx(logprob, abs=NATIVE_LOGPROB)
    logits = runner.logits(one(runner, IDS, 0))[-3:]
    assert masked.tokens.tolist() == [int(np.argsort(logits[0])[-2]), tokens[1], 17]


def test_targets_of_a_step_with_draws_are_the_score(runner):
    parts = [(0, IDS, 0), (1, IDS[:9], 0)]
    targets = np.concatenate([IDS[1:], [-1], IDS[1:9], [3]]).astype(np.int32)
    targets[5] = -1
    batch = make_batch(runner, parts, Sampling())
    drawn = runner.step(batch).tokens
    batch.targets = targets
    result = runner.step(batch)
    assert result.tokens.tolist() == drawn.tolist()
    assert np.array_equal(result.target_logprobs, runner.score(make_batch(runner, parts), targets))
    logits = runner.logits(make_batch(runner, parts)).astype(np.float64)
    exact = logits[np.arange(len(targets)), targets] - np.log(np.exp(logits).sum(1))
    exact[targets < 0] = 0
    np.testing.assert_allclose(result.target_logprobs, exact, rtol=0, atol=NATIVE_LOGPROB)
