"""`gemkit score`: texts that are too improbable for a float, and weights that are damaged. Budget: 10 s."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from engine.fakes import FakeRunner
from engine.vocabulary import tokenizer

import gemkit
from gemkit.api.model import Model
from gemkit.api.output import Score
from gemkit.cli import common, main
from gemkit.engine.interface import NOT_NUMBERS


class Scores(FakeRunner):
    """Gives every token the same log-probability."""

    def __init__(self, logprob: float) -> None:
        super().__init__()
        self.logprob = logprob

    def score(self, batch, targets):
        return np.where(targets >= 0, self.logprob, 0).astype(np.float32)


def run(capsys, monkeypatch, logprob: float, *args: str) -> tuple[int, str, str]:
    model = Model(SimpleNamespace(name="tiny", tensors={}), Scores(logprob), tokenizer())
    monkeypatch.setattr(gemkit, "load", lambda *_, **__: model, raising=False)
    with pytest.raises(SystemExit) as exit_:
        main(["score", "tiny", "--text", "abc", *args])
    output = capsys.readouterr()
    return exit_.value.code or 0, output.out, output.err


def test_a_perplexity_too_large_for_a_float_is_said(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, -1000.5)
    assert (code, err) == (0, "") and out.startswith("perplexity exp(1,000.5)\n")
    code, out, _ = run(capsys, monkeypatch, -1000.5, "--json")
    record = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and record["perplexity"] is None and record["logprob"] == -3001.5
    assert json.loads(run(capsys, monkeypatch, -2.0, "--json")[1])["perplexity"] == pytest.approx(math.exp(2))
    assert Score([2, 5], np.array([-1000.5], np.float32)).perplexity == math.inf


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_score_that_is_no_number_is_the_error_of_generate(capsys, monkeypatch, value, options):
    assert run(capsys, monkeypatch, value, *options) == (1, "", f"gemkit: {NOT_NUMBERS}\n")


def test_json_has_no_infinities(capsys):
    common.print_json({"a": [1.5, math.nan, {"b": (math.inf, -math.inf)}], "c": "NaN"})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None, {"b": [None, None]}], "c": "NaN"}
