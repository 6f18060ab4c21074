"""The validation part depends on the content of each row alone. Budget: 5 s."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gemkit.data.rows import Conversation, Pair, Text
from gemkit.data.split import position


def talk(*texts: str, assistant: str = "assistant") -> Conversation:
    return Conversation(
        tuple({"role": role, "content": text} for role, text in zip(["user", assistant] * len(texts), texts))
    )


@given(st.text(), st.text())
def test_equal_contents_are_on_one_side(prompt, answer):
    at = position(Pair(prompt, answer))
    assert 0 <= at < 1
    assert at == position(Pair(f" {prompt}", f"{answer}\n")) == position(talk(prompt, answer))
    assert at == position(talk(prompt, answer, assistant="model"))
    parts = [{"type": "text", "text": prompt}]
    assert at == position(Conversation(({"role": "user", "content": parts}, *talk(prompt, answer).messages[1:])))


def test_other_contents_are_elsewhere():
    contents = [Pair("a", "b"), Pair("b", "a"), Pair("ab", ""), Text("ab"), Text("a"), talk("a", "b", "c", "d")]
    assert len({position(content) for content in contents}) == len(contents)


def test_shares_are_met():
    at = np.array([position(Text(f"row {n}")) for n in range(20_000)])
    for share in (0.01, 0.05, 0.5):
        assert abs((at < share).mean() - share) < 4 * np.sqrt(share * (1 - share) / len(at))


def test_positions_are_the_same_in_every_release():
    """A run that is resumed with a newer release keeps its validation rows."""
    assert (position(Text("a")), position(talk("a", "b"))) == (0.04257495803475253, 0.13374792399122193)
