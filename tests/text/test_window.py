"""Oldest messages are left out when a conversation outgrows the context. Budget: 1 s."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemkit.text.window import drop_oldest, shift, visible

SYSTEM = {"role": "system", "content": "be brief"}


def said(*sizes: int) -> list[dict[str, str]]:
    """Messages of so many tokens each, user and assistant in turn."""
    return [{"role": ("user", "assistant")[at % 2], "content": "x" * size} for at, size in enumerate(sizes)]


def count(messages: list[dict[str, str]]) -> int:
    return sum(len(message["content"]) for message in messages)


def test_the_system_message_stays():
    messages = [SYSTEM, *said(5, 5, 5)]
    assert visible(messages, 0) == messages
    assert visible(messages, 2) == [SYSTEM, messages[3]]
    assert visible(messages[1:], 2) == messages[3:]
    assert visible([], 0) == []


@pytest.mark.parametrize(("limit", "dropped"), [(100, 0), (40, 0), (39, 2), (30, 2), (29, 4), (18, 4), (10, 4), (0, 4)])
def test_so_many_are_dropped_that_the_rest_fits_and_begins_with_a_user(limit, dropped):
    assert drop_oldest([SYSTEM, *said(5, 5, 5, 7, 10)], count, limit) == dropped


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(0, 400), st.booleans())
def test_no_more_than_needed_is_dropped(sizes, limit, with_system):
    messages = [SYSTEM] * with_system + said(*(sizes if len(sizes) % 2 else sizes[:-1] or sizes))
    dropped = drop_oldest(messages, count, limit)
    kept = visible(messages, dropped)
    assert kept[with_system]["role"] == "user" and kept[-1] == messages[-1] and dropped % 2 == 0
    assert count(kept) <= limit or dropped == len(messages) - with_system - 1
    assert dropped == 0 or count(visible(messages, dropped - 2)) > limit


def test_nothing_more_is_dropped_while_an_answer_has_space():
    messages = said(30, 30, 15)
    assert shift(messages, 0, count, 100) == 0  # a quarter is left
    assert shift(messages, 0, count, 96) == 2
    assert shift(messages, 0, count, 80, max_tokens=5) == 0
    assert shift(messages, 2, count, 96) == 2  # what is left out stays out
    assert shift([{"role": "assistant", "content": "x" * 90}], 0, count, 50) == 0
