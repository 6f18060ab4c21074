"""The C++ core draws the tokens that the NumPy definition draws.

Budget: 15 s on two cores.
"""

import dataclasses

import numpy as np
import pytest
from models.native.running import (
    NO_IDS,
    WIDE,
    Pages,
    make_batch,
    weights_of,
)
from parity.cases import CASES, tokens
from parity.tolerances import (
    NATIVE_LOGPROB,
)

from gemkit.engine.sampling import Sampling, sample
from gemkit.errors import GemkitError
from gemkit.models.native import NativeRunner

LARGE = dataclasses.replace(
    CASES["gemma2"].config,
    vocab_size=20_011,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    layers=WIDE.layers,
)
SETTINGS = 512


def random_sampling(generator: np.random.Generator, ids: np.ndarray, vocab: int) -> Sampling:
    pick = generator.choice
    biased = (
        generator.integers(0, vocab, generator.integers(0, 6)).tolist() + pick(ids, generator.integers(0, 3)).tolist()
    )
    bias = {int(i): float(pick([-1e6, -3.0, 0.7, 5.0, 1e6 if generator.random() < 0.1 else 2.0])) for i in biased}
    return Sampling(
        temperature=float(pick([0.0, 1e-300, 1e-3, 0.3, 0.7, 1.0, 1.0, 1.5, 4.0, 1e6])),
        top_k=int(pick([0, 0, 1, 2, 40, 64, 1000, vocab - 1, vocab, 2**31 - 1])),
        top_p=float(pick([1.0, 1.0, 1e-9, 0.1, 0.5, 0.9, 0.95, 0.999999])),
        min_p=float(pick([0.0, 0.0, 1e-12, 0.02, 0.3, 1.0])),
        repetition_penalty=float(pick([1.0, 1.0, 1.3, 0.7, 0.01, 100.0])),
        presence_penalty=float(pick([0.0, 0.0, 0.6, -1.5, 1000.0])),
        frequency_penalty=float(pick([0.0, 0.0, 0.31, -0.4, 20.0])),
        logit_bias=bias if generator.random() < 0.5 else (),
        seed=(0, 1, 2**63, 2**64 - 1)[generator.integers(4)]
        if generator.random() < 0.2
        else int(generator.integers(2**63)),
        logprobs=int(pick([0, 0, 1, 5, 20])),
    )


def test_sampling_equals_the_numpy_definition(path):
    weights = weights_of(LARGE, "Q8_0", 8)
    runner = NativeRunner(LARGE, weights, threads=2)
    generator = np.random.default_rng(17)
    rows_per_step = 40  # more than the core holds logits of at a time
    different, total = set(), 0
    while total < SETTINGS:
        pages, lengths = Pages(runner, rows_per_step), generator.integers(1, 12, rows_per_step)
        parts = [(s, generator.integers(0, LARGE.vocab_size, n).astype(np.int32), 0) for s, n in enumerate(lengths)]
        # Histories repeat ids and reach beyond this step's tokens, as after an earlier prefill.
        history = [np.concatenate([generator.choice(ids, 9), ids]).astype(np.int32) for _, ids, _ in parts]
        prompts = np.array([generator.integers(0, len(h) + 1) for h in history], np.int32)
        counters = generator.choice([0, 1, 2, 77, 2**40], rows_per_step).astype(np.int64)
        sampling = [random_sampling(generator, h, LARGE.vocab_size) for h in history]
        kept = tuple(h if s.has_penalty else NO_IDS for h, s in zip(history, sampling, strict=True))
        batch = make_batch(pages, parts, tuple(sampling), counters=counters, history=kept, prompt_lengths=prompts)
        batch.draws[generator.integers(0, rows_per_step, 3)] = 0
        logits = runner.logits(batch)[batch.starts[1:] - 1]
        got = runner.step(batch)
        assert len(got.tokens) == len(got.logprobs) == len(got.top_ids) == len(got.top_logprobs) == batch.draws.sum()
        for row, b in enumerate(np.flatnonzero(batch.draws)):
            want = sample(logits[b], sampling[b], int(counters[b]), history[b], int(prompts[b]))
            token, logprob, top_ids, top_logprobs = want
            n = len(top_ids)
            assert got.tokens[row] == token, (sampling[b], int(counters[b]))
            assert abs(got.logprobs[row] - logprob) <= NATIVE_LOGPROB, (sampling[b], got.logprobs[row], logprob)
            assert got.top_ids[row, :n].tolist() == top_ids.tolist() and (got.top_ids[row, n:] == -1).all()
            np.testing.assert_allclose(got.top_logprobs[row, :n], top_logprobs, rtol=0, atol=NATIVE_LOGPROB)
            different.add(token != int(np.argmax(logits[b])))
            total += 1
    assert different == {True, False}


def test_a_draw_does_not_depend_on_threads_or_neighbours(path):
    weights, ids = weights_of(LARGE, "Q8_0", 8), tokens(LARGE, 12, 4).astype(np.int32)
    settings = tuple(Sampling(temperature=1.0, top_p=0.95, seed=s, logprobs=3) for s in range(8))
    results = []
    for threads in (1, 2, 3):
        runner = NativeRunner(LARGE, weights, threads=threads)
        together = runner.step(make_batch(Pages(runner, 8), [(s, ids, 0) for s in range(8)], settings))
        for s in range(8):
            alone = runner.step(make_batch(Pages(runner, 8), [(0, ids, 0)], settings[s : s + 1]))
            for field in ("tokens", "logprobs", "top_ids", "top_logprobs"):
                assert np.array_equal(getattr(alone, field)[0], getattr(together, field)[s])
        results.append((together.tokens.tolist(), together.logprobs.tolist()))
    assert results[0] == results[1] == results[2]
    assert len(set(results[0][0])) > 1


def test_draws_masks_and_targets_of_one_step_equal_steps_of_their_own(path):
    runner = NativeRunner(LARGE, weights_of(LARGE, "Q8_0", 8), threads=2)
    generator = np.random.default_rng(3)
    ids = generator.integers(0, LARGE.vocab_size, 30).astype(np.int32)
    setting = Sampling(temperature=1.0, top_k=40, seed=5, repetition_penalty=1.2, logprobs=3)
    masks = tuple(
        generator.integers(0, 2**32, -(-LARGE.vocab_size // 32), dtype=np.uint32) & 0x11111111 if i % 2 else None
        for i in range(6)
    )
    targets = np.where(np.arange(30) % 3, generator.integers(0, LARGE.vocab_size, 30), -1).astype(np.int32)
    batch = make_batch(Pages(runner, 8), [(0, ids, 0)], (setting,), counters=[7], history=(ids,), prompt_lengths=[20])
    batch.draws[0], batch.masks, batch.targets = 6, masks, targets
    together = runner.step(batch)
    assert np.array_equal(together.target_logprobs, runner.score(batch, targets))
    for i, mask in enumerate(masks):
        end = 25 + i
        one = make_batch(
            Pages(runner, 8),
            [(0, ids[:end], 0)],
            (setting,),
            counters=[7 + i],
            history=(ids[:end],),
            prompt_lengths=[20],
        )
        one.masks = (mask,)
        alone = runner.step(one)
        token = together.tokens[i]
        assert token == alone.tokens[0] and together.logprobs[i] == alone.logprobs[0]
        assert np.array_equal(together.top_ids[i], alone.top_ids[0])
        assert mask is None or mask[token // 32] >> token % 32 & 1
    with pytest.raises(GemkitError, match="allows no token"):
        batch.masks = (np.zeros_like(masks[1]),) * 6
        runner.step(batch)
