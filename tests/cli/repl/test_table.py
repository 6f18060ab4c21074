"""Tables: found however a text is cut, aligned, within the terminal, nothing lost. Budget: 6 s."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toolkit.utils import get_cwidth

from gemkit.cli.repl.markdown import Markdown
from gemkit.cli.repl.table import MAX_LINE, MAX_ROWS, find


def show(text: str, width: int = 80, size: int = 1) -> str:
    markdown = Markdown(lambda: width, get_cwidth)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    return "".join(span.text for piece in pieces for span in markdown.feed(piece)) + "".join(
        span.text for span in markdown.finish()
    )


PLANETS = """| Planet | Moons | Notes |
|:-------|------:|:-----:|
| Earth | 1 | **Home** of `us` |
| 日本語 | 146 | naïve<br>_rings_ |
| a \\| b | | x | extra |
"""
SHOWN = """Planet │ Moons │   Notes
───────┼───────┼───────────
Earth  │     1 │ Home of us
日本語 │   146 │   naïve
       │       │   rings
a | b  │       │ x | extra
"""


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_table_is_aligned(size):
    assert show(PLANETS, size=size) == SHOWN
    assert show(f"text\n\n{PLANETS}\nafter **b**", size=size) == f"text\n\n{SHOWN}\nafter b"
    assert show(PLANETS.rstrip("\n"), size=size) == SHOWN.rstrip("\n")
    assert show(PLANETS + "# head\n", size=size) == SHOWN + "head\n"


def test_styles():
    markdown = Markdown(lambda: 80, get_cwidth)
    spans = [span for span in [*markdown.feed(PLANETS + "\n")] if span.text]
    styles = {span.text: span.style for span in spans}
    assert (styles["Planet"], styles["Home"], styles["us"], styles[" │ "]) == ("bold", "bold", "code", "dim")
    assert styles["rings"] == "italic"


def test_long_cells_wrap_within_their_columns():
    text = show("| a | b |\n|---|---|\n| one | " + "word " * 30 + "|\n| two | x |\n", 40)
    lines = text.splitlines()
    assert all(get_cwidth(line) < 40 for line in lines) and text.count("word") == 30
    assert {line.index("│") for line in lines if "│" in line} == {4}
    assert lines[-1] == "two │ x"


def test_a_narrow_terminal_gets_lists():
    assert show(PLANETS, 20).split("\n")[:5] == ["─" * 19, "Planet: Earth", "Moons: 1", "Notes: Home of us", "─" * 19]


@pytest.mark.parametrize(
    "text",
    [
        "| a | b |\n",
        "| a | b |\nnext\n",
        "| a | b |\n|---|\n| c | d |\n",
        "| a |\n---\n",
        "> | a |\n> |---|\n",
        "| not a table",
        "|" + "x" * (MAX_LINE + 9) + "|\n|-|\n",
    ],
)
def test_what_is_no_table_is_text(text):
    assert "┼" not in show(text) and show(text).replace("│ ", "> ").replace("─" * 24, "---") == text


def test_text_does_not_wait_for_a_table_that_cannot_come():
    markdown = Markdown(lambda: 80, get_cwidth)
    assert markdown.feed("| a | b |\n") == [] and markdown.rows == 0
    assert "".join(span.text for span in markdown.feed("n")) == "| a | b |\nn" and markdown.rows is None
    assert markdown.feed("\n| a |\n|-|\n| 1 |\n| 2 |\n")[0].text == "\n" and markdown.rows == 2
    assert "".join(span.text for span in markdown.feed("x")).endswith("2\nx") and markdown.rows is None


def test_a_very_long_table_is_shown_in_time():
    text = "| a |\n|---|\n" + "| row |\n" * (MAX_ROWS + 50)
    table = find(text, False)
    assert len(table.rows) == MAX_ROWS
    assert show(text, size=7).count("row") == MAX_ROWS + 50


WORDS = st.sampled_from(
    ["", "a", "two words", "**bold**", "`x|y`", "日本語日本語", "x" * 40, "é", "1<br>2", "👍🏽", "\x1b[31m"]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(WORDS, min_size=3, max_size=3), max_size=5), st.integers(8, 90))
def test_lines_fit_and_no_letter_is_lost(rows, width):
    text = "| h1 | h2 | h3 |\n|---|:-:|--:|\n"
    text += "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)
    out = show(text, width)
    assert all(get_cwidth(line) < max(width, 9) for line in out.split("\n"))
    wanted = "".join("".join(row) for row in rows).replace("<br>", "")
    for letter in set("abdltwo本12xyé👍[31m") & set(wanted):
        assert out.count(letter) >= wanted.count(letter)


def test_a_control_character_takes_the_columns_that_it_is_shown_in():
    assert show("| a | b |\n|-|-|\n| \x9b | c |\n") == "a    │ b\n─────┼──\n\\x9b │ c\n"
