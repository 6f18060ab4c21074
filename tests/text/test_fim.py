"""Filling in the middle: the prompt's ids, and what ends the answer. Budget: 3 s."""

import numpy as np
import pytest
from engine.fakes import FakeRunner
from engine.vocabulary import vocabulary

from gemkit.api.model import Model
from gemkit.errors import GemkitError, UsageError
from gemkit.text import fim
from gemkit.text.tokenizer import Tokenizer
from gemkit.text.vocabulary import Vocabulary

FIM = {67: "<|fim_prefix|>", 68: "<|fim_middle|>", 69: "<|fim_suffix|>", 70: "<|file_separator|>"}


def codegemma() -> Tokenizer:
    """The small vocabulary with CodeGemma's four pieces at their ids; the later pieces move up."""
    small = vocabulary()
    pieces, types = list(small.pieces), small.types.tolist()
    pieces[67:67], types[67:67] = [piece.encode() for piece in FIM.values()], [3] * 4
    scores = np.arange(0, -len(pieces), -1, dtype=np.float32)
    return Tokenizer.from_vocabulary(Vocabulary(pieces, scores, np.array(types, np.int32)))


def test_the_published_order_without_any_white_space():
    tokenizer = codegemma()
    ids = fim.render(tokenizer, "import ", "\nsys exit")
    before, after = tokenizer.encode("import ", bos=False), tokenizer.encode("\nsys exit", bos=False)
    assert ids == [2, 67, *before, 69, *after, 68]
    assert fim.render(tokenizer, "", "") == [2, 67, 69, 68]
    # Text that looks like a token is text
    assert fim.render(tokenizer, "<|fim_middle|>", "").count(68) == 1
    several = fim.render(tokenizer, "<bos>a<|file_separator|>b", "c<|file_separator|>", parse_special=True)
    a, b, c = (tokenizer.encode(letter, bos=False) for letter in "abc")
    assert several == [2, 67, *a, 70, *b, 69, *c, 70, 68]


def test_an_answer_ends_at_any_of_the_four():
    tokenizer = codegemma()
    assert tokenizer.stop_ids == {1, 111, *FIM}
    for token in FIM:
        model = Model(None, FakeRunner(forced=[40, 41, token, 42]), tokenizer)
        answer = model.generate("a", suffix="b", max_tokens=9, temperature=0)
        assert answer.ids == [40, 41, token] and answer.finish_reason == "stop"
        assert [piece.id for piece in model.stream("a", suffix="b", max_tokens=9, temperature=0)] == [40, 41, token]


def test_other_models_and_other_prompts_are_refused():
    with pytest.raises(GemkitError, match="codegemma-2b"):
        fim.render(Tokenizer.from_vocabulary(vocabulary()), "a", "b")
    model = Model(None, FakeRunner(), codegemma())
    for prompt, suffix in (([5, 6], "b"), ([{"role": "user", "content": "a"}], "b"), ("a", 3)):
        with pytest.raises(UsageError, match="two texts"):
            model.generate(prompt, suffix=suffix)
