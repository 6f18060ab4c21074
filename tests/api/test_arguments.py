"""A wrong argument of a public function fails at once, in one line that names it. Budget: 5 s."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engine.fakes import FakeRunner
from engine.vocabulary import tokenizer

import gemkit
from gemkit.api.model import Model
from gemkit.engine.sampling import Sampling
from gemkit.errors import GemkitError
from gemkit.text import chat, fim
from gemkit.text.tokenizer import Tokenizer

NAN = float("nan")
TALK = [{"role": "user", "content": "hello"}]


def fake(**options) -> Model:
    return Model(SimpleNamespace(name="tiny", instruction_tuned=True), FakeRunner(), tokenizer(), **options)


MODEL = fake()
T = MODEL.tokenizer

# By option of generate, stream and chat: wrong values, and a part of the message.
OPTIONS = {
    "stop": [(v, "stop is") for v in (5, b"a", {"a": 1}, NAN, True)]
    + [(v, "a stop string is") for v in ([5], [b"a"], [""], "", [["a"]])],
    "max_tokens": [(v, "max_tokens is") for v in ("x", NAN, 1.5, True, 0, -1, [3])],
    "seed": [(v, "seed is") for v in ("x", -1, 1.5, True, 2**64)],
    "temperature": [(v, "temperature is") for v in (NAN, "1", None, True, float("inf"), -1, [1.0])],
    "top_k": [(v, "top_k is") for v in ("x", 1.5, None, -1)],
    "top_p": [(v, "top_p is") for v in (NAN, 0, None, 1.1)],
    "min_p": [(v, "min_p is") for v in (2, NAN, "x")],
    "repetition_penalty": [(v, "repetition_penalty is") for v in (0, NAN, "x")],
    "presence_penalty": [(v, "presence_penalty is") for v in ("x", NAN)],
    "frequency_penalty": [(v, "frequency_penalty is") for v in ("x", NAN)],
    "logit_bias": [(v, "logit_bias is") for v in (5, 0, False, [5], "ab")]
    + [(v, "logit_bias names") for v in ({"a": 1}, {5.5: 1}, {-1: 1}, {10**6: 1}, {True: 1})]
    + [(v, "logit_bias adds") for v in ({5: "x"}, {5: NAN}, {5: None})],
    "ignore_eos": [(v, "ignore_eos is") for v in ("no", None, 2)],
    "logprobs": [(v, "logprobs is") for v in ("x", True, 21, -1)],
    "adapter": [(v, "adapter is") for v in (5, ["a"], {}, b"a")] + [("nope", "no adapter 'nope'")],
}
TEXT_OPTIONS = {
    "suffix": [(v, "takes two texts") for v in (5, b"x")],
    "parse_special": [(v, "parse_special is") for v in ("yes", None)],
}
PROMPTS = [None, b"abc", Path("a"), 5, 1.5, {"role": "user"}, object(), set(), iter("ab"), ["abc", 5], ["abc", None]]
PROMPTS += [[None], [b"a"], [["a"]], [{}], ["a", *TALK, 5], [*TALK, "a", 5], [True, False], [1.5, 2], [-1], [10**9]]
PROMPTS += [[2**70], [1, None], [[]], np.zeros((2, 2)), np.array([1.5]), np.array(5), np.array([True]), "a\ud800"]
PROMPTS += [
    [{"role": role, "content": content}] for role, content in (("x", "a"), (1, "a"), ("user", None), ("user", 5))
]
LOAD = {
    "ctx_size": [(v, "ctx_size is") for v in ("x", True, 0, 1, -1, 1.5, NAN, [5], b"5")],
    "threads": [(v, "threads is") for v in ("x", True, 0, -1, 1.5, 2000)],
    "activations": [(v, "activations is") for v in (5, ["int8"], None)],
    "dtype": [(v, "dtype is") for v in (5, ["a"], None, np.float32)],
    "adapter": [(v, "an adapter is") for v in (5, ["a", "b"], True, {"a": 5}, b"abc")] + [({5: "a"}, "is named 5")],
    "offline": [(v, "offline is") for v in ("no", None)],
    "backend": [(v, "backend is") for v in (5, ["x"], None)],
    "device": [(v, "device is") for v in (5, "cuda")],
}


def one_line(call, part: str) -> None:
    with pytest.raises(GemkitError) as error:
        call()
    message = str(error.value)
    assert part in message and "\n" not in message and 20 < len(message) < 300, message


def cases(table: dict) -> list:
    return [pytest.param(n, v, p, id=f"{n}-{i}") for n, rows in table.items() for i, (v, p) in enumerate(rows)]


@pytest.mark.parametrize(("name", "value", "part"), cases(OPTIONS | TEXT_OPTIONS))
def test_options_of_generate_and_stream(name, value, part):
    one_line(lambda: MODEL.generate("abc", **{"max_tokens": 1, name: value}), part)
    one_line(lambda: MODEL.stream("abc", **{"max_tokens": 1, name: value}), part)
    assert not MODEL.engine.scheduler


@pytest.mark.parametrize(("name", "value", "part"), cases(OPTIONS))
def test_options_of_chat_fail_before_anything_is_said(name, value, part):
    one_line(lambda: MODEL.chat(**{name: value}), part)
    talk = MODEL.chat()
    for say in (talk.send, talk.stream):
        one_line(lambda say=say: say("hello", **{name: value}), part)
    assert talk.messages == []


def test_unknown_options():
    talk = MODEL.chat()
    calls = [lambda n=name: MODEL.chat(**{n: 1}) for name in ("nonsense", "prompt", "suffix", "parse_special")]
    for call in (*calls, lambda: talk.send("a", nonsense=1), lambda: talk.stream("a", nonsense=1)):
        one_line(call, "there is no option")
    for call in (MODEL.generate, MODEL.stream):
        with pytest.raises(TypeError, match="nonsense"):
            call("abc", nonsense=1)


@pytest.mark.parametrize("value", [b"x", None, 5, ["a"], "a\ud800"], ids=lambda value: f"{value!r:.20}")
def test_what_is_said_and_instructions(value):
    talk = MODEL.chat()
    one_line(lambda: talk.send(value), "")
    one_line(lambda: talk.stream(value), "")
    assert talk.messages == []
    if value is not None and not isinstance(value, str | list):
        one_line(lambda: MODEL.chat(value), "system is")
    one_line(lambda: MODEL.chat(context_shift="yes"), "context_shift is")


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_prompts(prompt):
    for call in (
        lambda: MODEL.generate(prompt, max_tokens=1),
        lambda: MODEL.stream(prompt),
        lambda: MODEL.score(prompt),
    ):
        one_line(call, "")
    if not isinstance(prompt, Iterator):
        one_line(lambda: MODEL.embed(prompt), "")


@pytest.mark.parametrize(("name", "value", "part"), cases(LOAD))
def test_arguments_of_load_before_the_file_is_read(tmp_path, name, value, part):
    path = tmp_path / "empty.gguf"
    path.touch()
    one_line(lambda: gemkit.load(path, **{name: value}), part)


@pytest.mark.parametrize("path", [None, 5, b"x", ["a"], True, 1.5, {}, "", " "], ids=lambda value: f"{value!r:.20}")
def test_a_model_is_named_by_text_or_a_path(path):
    one_line(lambda: gemkit.load(path), "a model is")


@pytest.mark.parametrize("value", [5, b"x", ["a"], {}], ids=lambda value: f"{value!r:.20}")
def test_a_chat_template_is_text_or_none(value):
    before = MODEL.chat_template
    one_line(lambda: setattr(MODEL, "chat_template", value), "chat_template is")
    assert MODEL.chat_template == before


@pytest.mark.parametrize("value", ["x", True, 2.5, 1, 257, b"5"], ids=lambda value: f"{value!r:.20}")
def test_the_size_of_the_context(value):
    one_line(lambda: fake(ctx_size=value), "ctx_size is")


@pytest.mark.parametrize(
    "call",
    [pickle.dumps, copy.copy, copy.deepcopy, lambda m: pickle.dumps(m.chat()), lambda m: copy.deepcopy(m.chat())],
)
def test_a_model_is_not_copied(call):
    one_line(lambda: call(MODEL), "load it in the process that uses it")
    with pytest.raises(TypeError):  # what the library's users catch
        call(MODEL)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: MODEL.score("abc", adapter=["a"]), "adapter is"),
        (lambda: MODEL.embed("abc", adapter=5), "adapter is"),
        (lambda: MODEL.score("abc", parse_special="x"), "parse_special is"),
        (lambda: MODEL.embed("abc", parse_special="x"), "parse_special is"),
        (lambda: MODEL.embed([2, 5]), "text 0 is 2"),
        (lambda: MODEL.embed({"a": 1}), "embed got"),
        (lambda: MODEL.render(None), "messages is no list"),
        (lambda: MODEL.render("abc"), "messages is no list"),
        (lambda: MODEL.render([5]), "message 0 is 5"),
        (lambda: chat.turns(5), "messages is no list"),
        (lambda: fim.render(T, None, "a"), "cannot fill in"),
        (lambda: MODEL.engine.prepare([2], stop=5), "stop is"),
        (lambda: MODEL.engine.prepare([2], adapter="x"), "no adapter 'x'"),
        (lambda: MODEL.engine.prepare([2], {"temperature": 1}), "sampling is"),
        (lambda: Sampling(logit_bias=None), "logit_bias is"),
        (lambda: T.encode(None), "cannot encode NoneType"),
        (lambda: T.encode(["a"]), "cannot encode list"),
        (lambda: T.find_control(None), "cannot encode NoneType"),
        (lambda: T.decode(None), "ids are None"),
        (lambda: T.decode(5), "ids are 5"),
        (lambda: T.decode("abc"), "ids are 'abc'"),
        (lambda: T.decode([1.5]), "ids are [1.5]"),
        (lambda: T.decode(["5"]), "ids are ['5']"),
        (lambda: T.decode([[5]]), "ids are [[5]]"),
        (lambda: T.decode([-1]), "id -1 is not"),
        (lambda: T.with_bos("ab"), "ids are 'ab'"),
        (lambda: T.id_to_piece("x"), "id 'x' is not"),
        (lambda: T.id_to_piece(1.5), "id 1.5 is not"),
        (lambda: T.is_control(NAN), "id nan is not"),
        (lambda: T.token_bytes(None), "None is no token id"),
        (lambda: T.piece_to_id(5), "no piece 5"),
        (lambda: T.piece_to_id(b"<bos>"), "no piece b'<bos>'"),
        (lambda: Tokenizer.from_file(None), "file is None"),
        (lambda: Tokenizer.from_file(5), "file is 5"),
        (lambda: Tokenizer("abc"), "model is 'abc'"),
    ],
)
def test_other_functions(call, part):
    one_line(call, part)


def test_numpy_numbers_and_other_sequences_are_taken():
    options = {"max_tokens": np.int64(2), "temperature": np.float32(0.5), "top_k": np.int32(3), "seed": np.uint64(5)}
    options |= {"logprobs": np.int8(1), "logit_bias": {np.int64(5): np.float32(1)}, "ignore_eos": np.bool_(True)}
    plain = {"max_tokens": 2, "temperature": 0.5, "top_k": 3, "seed": 5, "logprobs": 1, "logit_bias": {5: 1.0}}
    wanted = MODEL.generate([2, 40], **plain, ignore_eos=True).ids
    assert MODEL.generate(np.array([2, 40], np.uint8), **options).ids == wanted
    for prompt in ((2, 40), [np.int64(2), np.int32(40)], range(2, 41, 38)):
        assert MODEL.generate(prompt, **options).ids == wanted
    assert [a.ids for a in MODEL.generate(np.array([[2, 40]] * 2), **options)] == [wanted] * 2
    assert fake(ctx_size=np.int64(50)).ctx_size == 50
    assert T.decode(np.array(T.encode("abc"))) == "abc" == T.decode(iter(T.encode("abc")))
    assert MODEL.embed(text for text in ("a", "b")).shape == (2, 8) == MODEL.embed(("a", "b")).shape
    together = MODEL.generate(["abc", "abc"], seed=1, max_tokens=30, stop=(text for text in ["e"]))
    assert together[0] == together[1] == MODEL.generate("abc", seed=1, max_tokens=30, stop=["e"])
    MODEL.chat(stop=None, seed=None, max_tokens=None, logprobs=None, logit_bias=None, adapter=None)
