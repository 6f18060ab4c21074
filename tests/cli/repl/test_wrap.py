"""Streaming word wrap: lines fit, nothing is lost, nothing that is out changes. Budget: 4 s."""

from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toolkit.utils import get_cwidth

from gemkit.cli.repl.markdown import Span
from gemkit.cli.repl.wrap import Wrap


def wrap(pieces: list[str], width: int, hang: str | None = "") -> str:
    wrapper = Wrap(lambda: width, get_cwidth)
    out = [text for piece in pieces for _, text in wrapper.feed([Span(piece, "", piece, hang)])]
    return "".join([*out, *(text for _, text in wrapper.finish())])


WORDS = ["a", "word", "longer-word", " ", " ", "  ", "\n", "日本", "語", "e\u0301", "👩‍👩‍👧", "x" * 30, ",", "."]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=80), st.integers(20, 60))
def test_nothing_is_lost(pieces: list[str], width: int):
    text, out = "".join(pieces), wrap(pieces, width)
    assert "".join(out.split()) == "".join(text.split())
    assert wrap(pieces, width, hang=None) == text
    assert wrap(pieces, 10**6) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["one", "three", "eleven", "日本語"]), max_size=60), st.integers(20, 60))
def test_lines_fit_and_words_stay_whole(words: list[str], width: int):
    out = wrap([word + " " for word in words], width)
    assert all(get_cwidth(line) <= width for line in out.split("\n"))
    ascii_words = [word for word in words if word.isascii()]
    assert [word for word in out.split() if word.isascii()] == ascii_words


def test_a_line_breaks_between_words_and_hangs():
    text = "- the quick brown fox jumps over the lazy dog"
    assert wrap([text[:2], text[2:]], 24, hang="  ").split("\n") == [
        "- the quick brown fox",
        "  jumps over the lazy",
        "  dog",
    ]


def test_a_word_in_pieces_stays_whole_at_the_edge():
    pieces = ["aaaa bbbb cccc dddd", " ee", "ff", "gg", " h"]
    assert wrap(pieces, 22).split("\n") == ["aaaa bbbb cccc dddd", "eeffgg h"]


def test_a_word_that_is_partly_out_is_not_broken():
    assert wrap(["aaaa ", "b" * 10, "b" * 20, " c"], 32) == "aaaa " + "b" * 30 + " c"


def test_words_are_shown_at_once_away_from_the_edge():
    wrapper = Wrap(lambda: 80, get_cwidth)
    for piece in ("The", " ans", "wer", " is"):
        assert "".join(text for _, text in wrapper.feed([Span(piece, "", piece)])) == piece


def test_the_width_may_change_in_the_middle():
    width = [60]
    wrapper = Wrap(lambda: width[0], get_cwidth)
    out = ""
    for number in range(40):
        width[0] = 60 if number < 20 else 24
        out += "".join(text for _, text in wrapper.feed([Span(f"word{number} ", "", "")]))
    out += "".join(text for _, text in wrapper.finish())
    assert out.split() == [f"word{number}" for number in range(40)]
    assert all(len(line) <= 24 for line in out.split("\n")[-5:])
