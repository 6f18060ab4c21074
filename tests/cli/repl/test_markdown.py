"""Streaming Markdown loses nothing, and shows the same however the text is cut. Budget: 8 s."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemkit.cli.repl.markdown import PHRASE, Markdown, Span


def render(*pieces: str) -> list[Span]:
    """The spans of a text that comes in pieces; neighbours that show their source in one style are joined."""
    markdown = Markdown()
    spans = [span for piece in pieces for span in markdown.feed(piece)] + markdown.finish()
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last and last.text == last.source and span.text == span.source and last[1::2] == span[1::2]:
            joined[-1] = Span(last.text + span.text, span.style, last.source + span.source, span.hang)
        else:
            joined.append(span)
    return joined


def shown(text: str) -> list[tuple[str, str]]:
    """Texts and styles, neighbours of one style joined if both show their source."""
    spans = [span._replace(hang="") for span in render(text) if span.text]
    joined: list[Span] = []
    for span in spans:
        same = joined and joined[-1].style == span.style == "" and span.text == span.source
        joined[-1:] = [span._replace(text=joined[-1].text + span.text)] if same else [*joined[-1:], span]
    return [(span.text, span.style) for span in joined]


HIDDEN = r"\*{1,3}|_{1,3}|`+|~~|\[| *#{1,6}[ \t]+"
# An escape, a link's middle, a quote, a bullet, a number, a rule, a fence's line.
SUBSTITUTED = r"\\[*_`#~|>]|\]\(|[ \t]*(>[ ]?|[-*+][ \t]+|\d+[.)][ \t]+|[-*_ \t]+|(```+|~~~+)[^\n]*)"
TABLE = r"[ \t]*\|[^\n]*\n[ \t|:-]+(\n[^\n]*)*"
MARKUP = [
    "\n|a|b|\n|-|:-:|\n",
    "|c|d\n",
    *"*_`~[]()\\\n#->|1.+ ab日",
    "**",
    "***",
    "```",
    "\n```\n",
    "](",
    "- ",
    "# ",
    "> ",
    "1. ",
    "\n~~~",
    "x" * 90,
]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(MARKUP), max_size=60).map("".join) | st.text(max_size=60), st.data())
def test_nothing_is_lost_and_cuts_do_not_matter(text: str, data: st.DataObject):
    whole = render(text)
    assert "".join(span.source for span in whole) == text
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    assert render(*pieces) == whole
    assert render(*text) == whole


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(MARKUP), max_size=60).map("".join))
def test_only_markup_is_hidden(text: str):
    for span in render(text):
        if span.hang is None and (not span.source or re.fullmatch(TABLE, span.source)):
            continue
        if span.text != span.source:
            assert re.fullmatch(SUBSTITUTED if span.text else HIDDEN, span.source), span


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("plain", [("plain", "")]),
        ("# A *b*", [("A ", "heading"), ("b", "heading italic")]),
        ("#hash", [("#hash", "")]),
        ("a **b c** d", [("a ", ""), ("b c", "bold"), (" d", "")]),
        ("***a***", [("a", "bold italic")]),
        ("__a__ _b_", [("a", "bold"), (" ", ""), ("b", "italic")]),
        ("**a `b` c**", [("a ", "bold"), ("b", "bold code"), (" c", "bold")]),
        ("`a **b**`", [("a **b**", "code")]),
        ("``a`b``", [("a`b", "code")]),
        ("~~a~~ ~b~", [("a", "strike"), (" ~b~", "")]),
        ("5 * 3 * 2 and 2*3*4", [("5 * 3 * 2 and 2*3*4", "")]),
        ("snake_case_name", [("snake_case_name", "")]),
        ("这是**重点**内容", [("这是", ""), ("重点", "bold"), ("内容", "")]),
        ("def f(*args, **kwargs)", [("def f(*args, **kwargs)", "")]),
        ("a **b\nc** d", [("a **b\nc** d", "")]),
        (r"\*a\* \d", [("*a", ""), (r"* \d", "")]),
        ("[a](http://b/c_(d)) e", [("a", "link"), (" (", "dim"), ("http://b/c_(d))", "dim"), (" e", "")]),
        ("[ ] a [b] c[0](x y)", [("[ ] a [b] c[0](x y)", "")]),
        ("- a\n  * b", [("• ", "marker"), ("a\n", ""), ("  • ", "marker"), ("b", "")]),
        ("10.  a", [("10. ", "marker"), ("a", "")]),
        ("3.14", [("3.14", "")]),
        ("2024 was", [("2024 was", "")]),
        ("-5 is", [("-5 is", "")]),
        ("> a\nb", [("│ ", "dim"), ("a", "quote"), ("\nb", "")]),
        ("| a | **b** |\n", [("| a | **b** |\n", "")]),
    ],
)
def test_what_is_shown(source, expected):
    assert shown(source) == expected


def test_rules_and_fences():
    assert shown("---\n")[0][0].startswith("──") and shown("--")[0] == ("--", "")
    text = "```python\ndef f(**k):\n    return '`'\n```\nafter **b**"
    spans = [span for span in shown(text) if span[0] != "\n"]
    assert spans[0][1] == "dim" and "python" in spans[0][0] and "`" not in spans[0][0]
    assert spans[1:3] == [("def f(**k):", "block"), ("    return '`'", "block")]
    assert spans[3][1] == "dim" and ("b", "bold") in spans
    assert shown("```\nopen **x**")[-1] == ("open **x**", "block")


def test_text_is_shown_as_it_comes():
    markdown = Markdown()
    out = ""
    for piece in ("The", " answer", " is", " 42", "."):
        out += "".join(span.text for span in markdown.feed(piece))
        assert out.endswith(piece)


def test_a_marker_waits_no_longer_than_a_phrase():
    markdown = Markdown()
    assert "".join(s.text for s in markdown.feed("a **b" + "x" * (PHRASE - 10))) == "a "
    assert "".join(s.text for s in markdown.feed("x" * 20)).startswith("**bxxx")


def test_a_long_answer_takes_no_time():
    text = "word **bold** `code` [a](b) * _ ` ~ [\n" * 3000 + "*" * 20_000 + "[" * 20_000 + "`a" * 10_000
    assert "".join(span.source for span in render(text)) == text
