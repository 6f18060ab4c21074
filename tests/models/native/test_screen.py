"""Tokens chosen through the head's screen are those of the whole head, on real weights. Budget: 30 s."""

import gzip
import json
import math

import numpy as np
import pytest

import gemkit
from tests.testdata import data_file

TOKENS = 64


@pytest.fixture(scope="module")
def model():
    with gemkit.load("demo", threads=2) as loaded:
        loaded.settle()
        assert loaded.engine.runner.screen_bytes > 0
        yield loaded


@pytest.fixture(scope="module")
def prompts(model):
    prose = data_file("text_wikitext2", "valid.txt").read_text(encoding="utf-8")
    with gzip.open(data_file("humaneval", "HumanEval.jsonl.gz"), "rt", encoding="utf-8") as file:
        program = json.loads(file.readline())["prompt"]
    texts = (prose[1000:2000], program, "東京の朝は静かで、", "Der alte Mann ging langsam zum Hafen und", "")
    return [model.tokenizer.encode(text)[:48] for text in texts]


SETTINGS = {
    "greedy": {"temperature": 0.0},
    "chat": {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "seed": 5},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.2, "logit_bias": {107: 4.0}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_tokens_are_those_of_the_whole_head(model, prompts, name):
    runner, settings = model.engine.runner, SETTINGS[name]
    tokens = {}
    for use in (True, False):
        runner.use_screen(use)
        runner.take_screen_counts()
        tokens[use] = [
            piece.id for ids in prompts for piece in model.stream(ids, max_tokens=TOKENS, ignore_eos=True, **settings)
        ]
        counts = np.array(runner.take_screen_counts())
        assert len(counts) == (len(tokens[use]) if use else 0)
        if use:
            panels = math.ceil(model.config.vocab_size / 16)
            assert np.mean(counts < 0) < 0.1, "the whole head was read too often"
            assert np.median(counts) < panels / 20
    runner.use_screen(True)
    assert tokens[True] == tokens[False]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 400},
        {"temperature": 0.0, "logprobs": 0},
    ],
    ids=["top-p alone", "a large top-k", "log-probabilities"],
)
def test_what_needs_the_whole_head_reads_it(model, prompts, settings):
    runner = model.engine.runner
    runner.take_screen_counts()
    pieces = list(model.stream(prompts[0], max_tokens=4, ignore_eos=True, **settings))
    assert len(pieces) == 4
    assert runner.take_screen_counts() == []


def test_a_batch_goes_through_the_screen_and_chooses_the_same(model, prompts):
    runner, settings = model.engine.runner, {"max_tokens": 6, "ignore_eos": True, "temperature": 0.0}
    one_by_one = [model.generate(ids, **settings).ids for ids in prompts]
    runner.take_screen_counts()
    assert [completion.ids for completion in model.generate(prompts, **settings)] == one_by_one
    assert len(runner.take_screen_counts()) == 6 * len(prompts)
