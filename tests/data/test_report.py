"""The dry run's report: marks, colours, statistics, rows left out. Budget: 5 s."""

import io
import json
import re

import numpy as np
import pytest

from gemkit.data.batch import Batches
from gemkit.data.prepare import DataOptions, Prepared, prepare
from gemkit.data.report import decoded, histogram, report, takes_colour
from gemkit.data.sample import Sample


@pytest.fixture
def prepared(tokenizer, tmp_path) -> Prepared:
    rows = [
        {"prompt": f"What is\x1b[31m {n}?", "completion": f"It is {n},\nno « more." * (n // 2 + 1)} for n in range(20)
    ]
    rows += [{"prompt": "a \x1b"}, {"text": "a"}, {"prompt": "b"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepare(path, tokenizer, DataOptions(max_length=100, validation=0.1, on_bad_row="skip"))


def test_marks(tokenizer):
    ids = tokenizer.encode("a b\nc")
    sample = Sample(np.array([*ids, tokenizer.end_of_turn_id]), np.array([False, False, *[True] * (len(ids) - 1)]))
    assert decoded(sample, tokenizer) == "<bos>a« b\nc<end_of_turn>»"
    assert decoded(sample, tokenizer, colour=True) == (
        "\x1b[2m<bos>\x1b[0ma\x1b[32m b\x1b[0m\n\x1b[32mc<end_of_turn>\x1b[0m"
    )


def test_a_report(prepared, tokenizer):
    batches = Batches(prepared.train, 2, 100)
    text = report(prepared, batches, tokenizer, samples=2)
    assert "\x1b" not in text and text.endswith("\n")
    assert text.count("Sample ") == 2 and "«It is 1,\nno « more.<end_of_turn>»\n" in text
    assert "What is␛[31m 1?" in text
    assert 0 < prepared.truncated < 10
    trained, held = len(prepared.train), len(prepared.validation)
    assert (
        f"Rows: {trained} for training, {held} for validation, 3 left out, {prepared.truncated} cut to 100 tokens"
        in text
    )
    total = sum(len(sample.tokens) for sample in prepared.train)
    loss = sum(int(sample.loss.sum()) for sample in prepared.train)
    assert f"Tokens for training: {total:,}, of which {loss:,} carry loss ({loss / total:.1%})" in text
    filled = total / (batches.per_epoch * 2 * batches.shapes[0][1])
    assert f"Batches: {batches.per_epoch} an epoch, of 2×{batches.shapes[0][1]} tokens, {filled:.1%} filled" in text
    left_out = text[text.index("Left out:") :].splitlines()
    assert left_out[1] == "  2 × the row has no known format" and left_out[4].startswith("  1 × the row has another")
    assert re.search(r"a.jsonl:21: the row has no known format: it has prompt", left_out[2])
    bars = dict(re.findall(r"^ +([\d,]+-[\d,]+) +(\d+) ", text, re.MULTILINE))
    assert sum(map(int, bars.values())) == trained


def test_colour(prepared, tokenizer):
    text = report(prepared, Batches(prepared.train, 2, 100, packing=False), tokenizer, colour=True)
    assert "\x1b[32mIt is 1,\x1b[0m\n\x1b[32mno « more.<end_of_turn>\x1b[0m\n" in text and "in green" in text
    assert "2×64, 2×100 tokens" in text


def test_histogram():
    assert histogram([5]) == [f"  5  1  {'#' * 40}"]
    assert histogram([3, 3, 5]) == [f"  3  2  {'#' * 40}", "  4  0", f"  5  1  {'#' * 20}"]
    rows = [row.split()[:2] for row in histogram([1, 12, 13])]
    assert rows == [[f"{start}-{start + 1}", count] for start, count in zip(range(1, 14, 2), "1000011")]
    assert histogram([1, 2000])[-1].split()[:2] == ["1,793-2,048", "1"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert takes_colour(Terminal()) and not takes_colour(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not takes_colour(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not takes_colour(Terminal())
