"""Batches: each sample once an epoch, targets within samples, exact restore, near-optimal packing. Budget: 10 s."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemkit.data.batch import Batches, TokenBatch
from gemkit.data.pack import best_fit, bucket
from gemkit.data.sample import Sample
from gemkit.errors import GemkitError

T = 200


def sample(number: int, length: int, seed: int = 0) -> Sample:
    """A sample whose tokens name it: BOS, then its number in each token."""
    rng = np.random.default_rng([seed, number])
    loss = rng.random(length) < 0.5
    loss[0], loss[-1] = False, True
    return Sample(np.array([2, *range(1000 * number + 10, 1000 * number + 9 + length)], np.int32), loss)


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(2, T), min_size=1, max_size=40))
    samples = [sample(number, length) for number, length in enumerate(lengths)]
    return samples, draw(st.integers(1, 5)), draw(st.booleans()), draw(st.integers(0, 2**40))


def unpacked(batch: TokenBatch) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens, targets and positions of each segment; asserts that segments are 1, 2, … and padding is at the end."""
    found = []
    for row in range(len(batch.tokens)):
        segments = batch.segments[row]
        count = segments.max()
        real = segments[segments > 0]
        assert (segments[len(real) :] == 0).all() and (np.diff(real) >= 0).all()
        assert set(real.tolist()) == set(range(1, count + 1))
        padding = segments == 0
        assert not batch.tokens[row][padding].any() and not batch.positions[row][padding].any()
        assert (batch.targets[row][padding] == -1).all()
        for segment in range(1, count + 1):
            at = segments == segment
            found.append(tuple(part[row][at].tolist() for part in (batch.tokens, batch.targets, batch.positions)))
    return found


def equal(one: TokenBatch, other: TokenBatch) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("tokens", "targets", "positions", "segments")]
    return all(a.shape == b.shape and a.dtype == b.dtype == np.int32 and (a == b).all() for a, b in pairs)


@settings(deadline=None, max_examples=150)
@given(cases())
def test_every_sample_is_in_an_epoch_once(case):
    samples, size, packing, seed = case
    batches = Batches(samples, size, T, packing, seed)
    for epoch in range(3):
        assert batches.epoch == epoch
        made = [next(batches) for _ in range(batches.per_epoch)]
        assert {batch.tokens.shape for batch in made} == set(batches.shapes)
        assert all((batch.targets >= 0).any() for batch in made)
        found = sorted((tokens, targets, positions) for batch in made for tokens, targets, positions in unpacked(batch))
        wanted = sorted(
            (
                one.tokens.tolist(),
                [*(t if loss else -1 for t, loss in zip(one.tokens[1:].tolist(), one.loss[1:])), -1],
                list(range(len(one.tokens))),
            )
            for one in samples
        )
        assert found == wanted
        filled = sum(int((batch.segments > 0).sum()) for batch in made) / sum(batch.tokens.size for batch in made)
        assert filled == pytest.approx(batches.fill)


@settings(deadline=None, max_examples=100)
@given(cases(), st.integers(0, 60), st.integers(0, 60))
def test_a_restored_iterator_goes_on_bit_for_bit(case, before, other):
    samples, size, packing, seed = case
    whole = Batches(samples, size, T, packing, seed)
    for _ in range(before):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    resumed = Batches(list(samples), size, T, packing, seed)
    for _ in range(other):
        next(resumed)
    resumed.restore(state)
    assert resumed.state() == state
    for _ in range(2 * whole.per_epoch + 1):
        assert equal(next(whole), next(resumed))
    assert whole.state() == resumed.state()


def test_epochs_differ_and_seeds_differ():
    samples = [sample(number, 10 + number % 7) for number in range(60)]
    for packing in (True, False):
        batches = Batches(samples, 2, 64, packing, seed=3)
        epochs = [np.concatenate([batch.tokens[:, :64].ravel() for batch in batches.once()])]
        for _ in range(batches.per_epoch):
            next(batches)
        epochs.append(np.concatenate([batch.tokens[:, :64].ravel() for batch in batches.once()]))
        epochs.append(np.concatenate([batch.tokens.ravel() for batch in Batches(samples, 2, 64, packing, 4).once()]))
        assert len({epoch.tobytes() for epoch in epochs}) == 3
        again = np.concatenate([batch.tokens.ravel() for batch in Batches(samples, 2, 64, packing, 3).once()])
        assert again.tobytes() == epochs[0].tobytes()


def test_which_samples_share_a_row_changes():
    samples = [sample(number, 32) for number in range(40)]
    batches = Batches(samples, 1, 64, seed=0)
    mates = []
    for _ in range(2):
        rows = [[tokens[1] // 1000 for tokens, _, _ in unpacked(next(batches))] for _ in range(batches.per_epoch)]
        assert all(len(row) == 2 for row in rows)
        mates.append({frozenset(row) for row in rows})
    assert len(mates[0] & mates[1]) < 10


def test_validation_keeps_its_order():
    samples = [sample(number, length) for number, length in enumerate([5, 60, 100, 20, 70])]
    batches = Batches(samples, 2, T, packing=False, shuffle=False)
    made = list(batches.once())
    assert [batch.tokens.shape for batch in made] == [(2, 128), (2, 64), (2, 64)]
    assert [[tokens[1] // 1000 for tokens, _, _ in unpacked(batch)] for batch in made] == [[2, 4], [0, 1], [3]]
    next(batches)
    assert all(equal(one, other) for one, other in zip(made, batches.once(), strict=True))


def test_the_first_batch_is_the_same_in_every_release():
    batches = Batches([sample(number, 20 + number) for number in range(8)], 2, 64, seed=5)
    first = [[tokens[1] // 1000 for tokens, _, _ in unpacked(batch)] for batch in batches.once()]
    assert first == [[5, 4, 1, 0], [3, 2, 7, 6]]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_best_fit(lengths):
    ordered = np.array(sorted(lengths, reverse=True))
    rows = best_fit(ordered, 100)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = [int(ordered[row].sum()) for row in rows]
    assert max(sums) <= 100
    # Best fit decreasing opens a row only for a sample that no earlier row can hold
    for later, row in enumerate(rows):
        assert all(ordered[row[0]] > 100 - int(ordered[[i for i in one if i < row[0]]].sum()) for one in rows[:later])


def test_packing_is_near_the_optimum():
    rng = np.random.default_rng(0)
    lengths = -np.sort(-np.minimum(rng.lognormal(4.5, 0.8, 20_000).astype(int) + 2, 1024))
    rows = best_fit(lengths, 1024)
    assert len(rows) <= 1.002 * lengths.sum() / 1024 + 1


@given(st.integers(1, 100_000), st.integers(2, 100_000))
def test_buckets_are_few_and_close(length, most):
    width = bucket(length, 100_000)
    assert length <= width <= max(64, 1.25 * length + 64) and width % 64 in (0, 100_000 % 64)
    assert bucket(min(length, most), most) <= most
    assert bucket(width, 100_000) == width


def test_there_are_few_widths():
    assert len({bucket(length, 2048) for length in range(1, 2049)}) == 16
    assert {bucket(length, 300) for length in range(1, 301)} == {64, 128, 192, 256, 300}


@pytest.mark.parametrize(
    ("samples", "options", "words"),
    [
        ([], {}, "there are no samples"),
        ([sample(0, 5), sample(1, 20)], {"max_length": 10}, "sample 1 has 20 tokens, more than max_length 10"),
        ([Sample(np.array([2, 3], np.int32), np.array([False, False]))], {}, "sample 0 has no token with loss"),
        ([Sample(np.array([2, 3], np.int32), np.array([True, True]))], {}, "sample 0 has loss on its first token"),
        ([Sample(np.array([2], np.int32), np.array([False]))], {}, "sample 0 has no token with loss"),
        ([sample(0, 5)], {"batch_size": 0}, "batch_size is 0: give a whole number from 1"),
        ([sample(0, 5)], {"seed": -1}, "seed is -1"),
        ([sample(0, 5)], {"packing": "yes"}, "packing is 'yes'"),
    ],
)
def test_refusals(samples, options, words):
    with pytest.raises(GemkitError, match=words):
        Batches(samples, **{"batch_size": 2, "max_length": 100, **options})


@pytest.mark.parametrize("change", ["tokens", "loss", "order", "batch_size", "max_length", "packing", "seed"])
def test_a_state_of_other_data_is_refused(change):
    samples = [sample(number, 10) for number in range(5)]
    arguments = {"batch_size": 2, "max_length": 50, "packing": True, "seed": 1}
    state = Batches(samples, **arguments).state()
    changed = {"batch_size": 3, "max_length": 51, "packing": False, "seed": 2}
    if change in arguments:
        arguments[change] = changed[change]
    elif change == "order":
        samples.reverse()
    else:
        samples[2] = sample(2, 10, seed=1) if change == "loss" else sample(9, 10)
    with pytest.raises(GemkitError, match="not those of the checkpoint"):
        Batches(samples, **arguments).restore(state)


def test_a_damaged_state_is_refused():
    batches = Batches([sample(0, 10)], 1, 50)
    for damage in ({"epoch": -1}, {"batch": 1}, {"batch": "x"}, {"epoch": None}):
        with pytest.raises(GemkitError, match="the checkpoint is damaged"):
            batches.restore(batches.state() | damage)
