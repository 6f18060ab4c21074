"""The sampler against brute force, against transformers, and its settings' checks. Budget: 10 s."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemkit.engine.sampling import SAMPLING, Sampling, adjust, kept, log_softmax, sample, sampling_records, uniform
from gemkit.errors import UsageError

NONE = np.empty(0, np.int32)


def random_logits(seed: int, size: int = 50, step: float = 0.0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, 2, size)
    return (np.round(logits / step) * step if step else logits).astype(np.float32)


def brute_force(logits: np.ndarray, s: Sampling) -> dict[int, float]:
    """Kept ids and their probabilities, one token at a time, in exact order and Python floats."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    if s.top_k:
        order = order[: s.top_k]
    best = float(logits[order[0]])
    weight = {i: math.exp((float(logits[i]) - best) / s.temperature) for i in order}
    total = math.fsum(weight.values())
    nucleus, mass = [], 0.0
    for i in order:
        if s.top_p < 1 and mass >= s.top_p * total:
            break
        nucleus.append(i)
        mass += weight[i]
    chosen = [i for i in nucleus if weight[i] >= s.min_p * weight[nucleus[0]]]
    total = math.fsum(weight[i] for i in chosen)
    return {i: weight[i] / total for i in chosen}


filters = st.builds(
    Sampling,
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 50, 1000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=300, deadline=None)
@given(filters, st.integers(0, 10**6), st.sampled_from([0.0, 0.5]), st.integers(0, 1000))
def test_filters_and_draw_equal_brute_force(s: Sampling, seed: int, step: float, counter: int):
    logits = random_logits(seed, step=step)
    expected = brute_force(logits, s)
    ids, weights = kept(logits, s)
    assert ids.tolist() == list(expected)
    np.testing.assert_allclose(weights / weights.sum(), list(expected.values()), rtol=1e-12)
    u, mass, drawn = uniform(s.seed, counter), 0.0, None
    for i, probability in expected.items():
        mass += probability
        if mass > u:
            drawn = i
            break
    # Rounding decides only where u falls on a boundary.
    if abs(mass - u) > 1e-12:
        assert sample(logits, s, counter, NONE, 0)[0] == drawn


def test_ties_go_to_the_lower_id():
    logits = np.array([1, 3, 2, 3, 3, 2], np.float32)
    assert sample(logits, Sampling(), 0, NONE, 0)[0] == 1
    assert kept(logits, Sampling(temperature=1.0, top_k=2))[0].tolist() == [1, 3]
    assert kept(logits, Sampling(temperature=1.0, top_k=4))[0].tolist() == [1, 3, 4, 2]
    assert kept(logits, Sampling(temperature=1.0, top_p=0.01))[0].tolist() == [1]
    assert kept(logits, Sampling(temperature=1.0, min_p=1.0))[0].tolist() == [1, 3, 4]
    top = sample(logits, Sampling(logprobs=4), 0, NONE, 0)[2]
    assert top.tolist() == [1, 3, 4, 2] and top.dtype == np.int32


def test_a_draw_on_a_boundary_goes_to_the_next_token(monkeypatch):
    for u, token in [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (0.7499, 2)]:
        monkeypatch.setattr("gemkit.engine.sampling.uniform", lambda seed, counter, u=u: u)
        assert sample(np.zeros(4, np.float32), Sampling(temperature=1.0), 0, NONE, 0)[0] == token


def test_the_whole_vocabulary_and_tiny_temperatures():
    logits = random_logits(3)
    assert len(kept(logits, Sampling(temperature=1.0))[0]) == 50
    for temperature in (1e-300, 5e-324, 1e-6):
        assert sample(logits, Sampling(temperature=temperature), 5, NONE, 0)[0] == np.argmax(logits)


def test_draws_follow_the_distribution():
    logits = random_logits(1, size=20)
    s = Sampling(temperature=0.8, top_k=8, top_p=0.95, seed=11)
    expected = brute_force(logits, s)
    n = 4000
    counts = np.bincount([sample(logits, s, counter, NONE, 0)[0] for counter in range(n)], minlength=20)
    assert counts.sum() == sum(counts[i] for i in expected)
    chi2 = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in expected.items())
    assert chi2 < 26  # 7 degrees of freedom: 99.95 %


def test_random_numbers_are_splitmix64():
    # Outputs of the published generator for the state 1234567.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [uniform(1234567, n) for n in range(5)] == [(z >> 11) / 2**53 for z in published]
    u = np.array([uniform(2**64 - 1, n) for n in range(4000)])
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02 and abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.05
    assert uniform(0, 1) != uniform(1, 0)


def test_penalties_and_bias_one_id_at_a_time():
    logits = random_logits(5)
    history = np.array([4, 4, 9, 7, 9, 9, 30], np.int32)
    s = Sampling(
        repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.25, logit_bias={7: 2.0, 0: -1.5, 49: 100}
    )
    expected = [np.float32(value) for value in logits]
    for i in range(50):
        if i in history:
            expected[i] = expected[i] / np.float32(1.3) if expected[i] > 0 else expected[i] * np.float32(1.3)
        count = history[3:].tolist().count(i)
        if count:
            expected[i] -= np.float32(0.4)
            expected[i] -= np.float32(0.25) * np.float32(count)
        expected[i] += np.float32(dict(s.logit_bias).get(i, 0))
    adjusted = adjust(logits, s, history, 3)
    assert adjusted.dtype == np.float32 and adjusted.tolist() == [float(value) for value in expected]
    token, logprob, top, values = sample(logits, s, 0, history, 3)
    assert token == 49, "the bias decides"
    # What is reported belongs to the unmodified logits.
    reference = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert logprob == pytest.approx(reference[49], abs=1e-12) and len(top) == len(values) == 0
    np.testing.assert_allclose(log_softmax(logits), reference, atol=1e-12)


def test_logits_given_are_not_changed():
    logits = random_logits(5)
    before = logits.copy()
    sample(logits, Sampling(repetition_penalty=2.0, logit_bias={1: 1.0}), 0, np.array([1, 2], np.int32), 1)
    assert (logits == before).all()


def test_kept_sets_equal_those_of_transformers():
    import torch
    from transformers.generation import logits_process as hf

    for seed in range(30):
        logits = random_logits(seed)
        scores, generator = torch.tensor(logits)[None], np.random.default_rng(seed)
        history = generator.integers(0, 50, 12).astype(np.int32)
        ids = torch.tensor(history.astype(np.int64))[None]
        temperature = float(generator.choice([0.5, 1.0, 2.0]))
        k, p, floor = (
            int(generator.integers(1, 50)),
            float(generator.uniform(0.1, 0.99)),
            float(generator.uniform(0.01, 0.5)),
        )
        for s, warpers in (
            (Sampling(temperature=temperature, top_k=k), [hf.TopKLogitsWarper(k)]),
            (Sampling(temperature=temperature, top_p=p), [hf.TopPLogitsWarper(p)]),
            (Sampling(temperature=temperature, min_p=floor), [hf.MinPLogitsWarper(floor)]),
            (Sampling(temperature=temperature, top_k=k, top_p=p), [hf.TopKLogitsWarper(k), hf.TopPLogitsWarper(p)]),
        ):
            warped = hf.TemperatureLogitsWarper(temperature)(ids, scores)
            for warper in warpers:
                warped = warper(ids, warped)
            assert set(kept(logits, s)[0].tolist()) == set(torch.isfinite(warped[0]).nonzero()[:, 0].tolist()), s
        penalised = hf.RepetitionPenaltyLogitsProcessor(1.4)(ids, scores)[0].numpy()
        assert (adjust(logits, Sampling(repetition_penalty=1.4), history, 12) == penalised).all()


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, "1", None, True, 1e9]),
        ("top_k", [-1, 1.5, "3", None, True, 2**31]),
        ("top_p", [0, -0.5, 1.01, math.nan, math.inf, None]),
        ("min_p", [-0.01, 1.01, math.nan, "a"]),
        ("repetition_penalty", [0, -1, math.nan, math.inf, 1e-30]),
        ("presence_penalty", [math.nan, math.inf, -math.inf, 1e4]),
        ("frequency_penalty", [math.nan, math.inf, "2"]),
        ("seed", [-1, 2**64, 0.5, None]),
        ("logprobs", [-1, 21, 2.0]),
        (
            "logit_bias",
            [{-1: 1.0}, {1: math.nan}, {1: math.inf}, {"a": 1.0}, [(1, 2.0), (1, 3.0)], 5, [1, 2], {1.5: 1}],
        ),
    ],
)
def test_bad_settings_are_refused_in_one_line(field: str, values: list):
    for value in values:
        with pytest.raises(UsageError) as error:
            Sampling(**{field: value})
        assert field in str(error.value) and "\n" not in str(error.value), value


def test_good_settings_are_normalised():
    s = Sampling(
        temperature=np.float32(1), top_k=np.int64(5), logit_bias={9: 1, 3: np.float32(2)}, seed=2**64 - 1, logprobs=20
    )
    assert s.logit_bias == ((3, 2.0), (9, 1.0)) and type(s.top_k) is int and type(s.temperature) is float
    assert hash(s) == hash(
        Sampling(temperature=1.0, top_k=5, logit_bias=((3, 2.0), (9, 1.0)), seed=2**64 - 1, logprobs=20)
    )
    with pytest.raises(UsageError, match="token 9"):
        s.check_vocabulary(9)
    s.check_vocabulary(10)
    assert not s.has_penalty and Sampling(presence_penalty=-1).has_penalty


def test_records_hold_every_setting():
    several = [
        Sampling(seed=2**64 - 1, top_k=7, logprobs=None, logit_bias={4: 1.5, 2: -0.25}),
        Sampling(),
        Sampling(temperature=0.7, top_p=0.9, min_p=0.1, repetition_penalty=1.2, logprobs=3, logit_bias={9: 2}),
    ]
    records, ids, values = sampling_records(several)
    assert records.dtype == SAMPLING and SAMPLING.itemsize == 8 * len(SAMPLING.names), "there is padding"
    scalars = set(Sampling.__dataclass_fields__) - {"logit_bias"}
    assert scalars <= set(SAMPLING.names)
    for record, sampling in zip(records, several, strict=True):
        wanted = {name: getattr(sampling, name) for name in scalars}
        wanted["logprobs"] = -1 if sampling.logprobs is None else sampling.logprobs
        assert {name: record[name].item() for name in scalars} == wanted
        part = slice(record["bias_start"], record["bias_end"])
        assert tuple(zip(ids[part].tolist(), values[part].tolist())) == sampling.logit_bias
    for name in ("row", "draws", "counter", "prompt_length", "history_start", "history_end"):
        assert not records[name].any()
    assert ids.dtype == np.int32 and values.dtype == np.float32
    assert [len(array) for array in sampling_records([])] == [0, 0, 0]
