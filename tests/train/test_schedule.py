"""Learning rates by step, against values by hand. Budget: 1 s."""

import itertools
import math

import pytest

from gemkit.train.schedule import WSD, Constant, Cosine, Linear

ALL = [Constant(2.0, 4), Linear(2.0, 20, 4), Cosine(2.0, 20, 4), WSD(2.0, 20, 4, 8)]


@pytest.mark.parametrize("schedule", ALL)
def test_the_rate_rises_in_a_line_to_the_last_step_of_the_warm_up(schedule):
    assert [schedule(step) for step in range(1, 5)] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("schedule", ALL)
def test_rates_are_positive_floats_that_do_not_rise_after_the_warm_up(schedule):
    rates = [schedule(step) for step in range(4, 21)]
    assert all(type(rate) is float and rate > 0 for rate in rates)
    assert all(b <= a for a, b in itertools.pairwise(rates))


def test_a_line_falls_by_equal_parts_and_ends_behind_the_last_step():
    assert [Linear(8.0, 4)(step) for step in range(1, 6)] == [8, 6, 4, 2, 0]
    assert [Linear(8.0, 4, floor=4.0)(step) for step in range(1, 6)] == [8, 7, 6, 5, 4]


def test_a_cosine_is_at_the_middle_in_the_middle():
    schedule = Cosine(1.0, 8, floor=0.5)
    assert schedule(1) == 1.0 and schedule(5) == pytest.approx(0.75) and schedule(9) == pytest.approx(0.5)
    assert schedule(3) == pytest.approx(0.75 + 0.25 * math.cos(math.pi / 4))


def test_wsd_is_flat_until_the_decay():
    rates = [WSD(4.0, 10, 2, 3)(step) for step in range(1, 12)]
    assert rates == [2, 4, 4, 4, 4, 4, 4, 3, 2, 1, 0]


def test_one_step_and_no_step_after_the_warm_up():
    for schedule in (Constant(1.0), Linear(1.0, 1), Cosine(1.0, 1), WSD(1.0, 1, 0, 1)):
        assert 0 < schedule(1) <= 1.0
    for schedule in (Linear(1.0, 4, 4), Cosine(1.0, 4, 4), WSD(1.0, 4, 4, 0)):
        assert schedule(4) == 1.0
