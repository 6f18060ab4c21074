"""The public functions on a fake model, and on a tiny model in the native core. Budget: 10 s."""

from __future__ import annotations

import ast
import copy
import dataclasses
import math
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engine.fakes import FakeRunner, continue_alone, hidden_of, words_of
from engine.vocabulary import STOP, tokenizer
from parity.cases import CASES

import gemkit
from gemkit.api.model import Model
from gemkit.api.options import MAX_TOKENS, GenerateKeywords, GenerateOptions, LoadKeywords, LoadOptions
from gemkit.api.output import Completion
from gemkit.arch import reference
from gemkit.engine.sampling import Sampling
from gemkit.errors import GemkitError, GemkitWarning, UsageError
from gemkit.host import default_threads
from gemkit.text import chat as chat_template

WINDOWS = (None, 10)
TALK = [{"role": "user", "content": "hello"}]


def fake(instruction_tuned: bool | None = True, **options) -> Model:
    checkpoint = SimpleNamespace(name="tiny", instruction_tuned=instruction_tuned)
    return Model(checkpoint, FakeRunner(**options), tokenizer())


def wanted(prompt: list[int], count: int, settings: Sampling) -> list[int]:
    return continue_alone(WINDOWS, prompt, count, settings, STOP)


def test_a_text_gets_one_bos_and_a_conversation_the_template():
    m = fake()
    settings = Sampling(1.0, 64, 0.95, seed=4)
    for prompt, ids in [
        ("abc", tokenizer().encode("abc")),
        (TALK, chat_template.render(tokenizer(), TALK)),
        ([9, 8, 7], [9, 8, 7]),
        (np.array([9, 8, 7]), [9, 8, 7]),
        ("", [2]),
    ]:
        answer = m.generate(prompt, max_tokens=9, seed=4)
        assert answer.ids == wanted(ids, 9, settings) and answer.usage.prompt_tokens == len(ids)
    assert tokenizer().encode("abc")[0] == 2 and tokenizer().encode("abc")[1] != 2


def test_a_completion_is_a_string_with_its_facts():
    m = fake()
    answer = m.generate("abc", max_tokens=20, temperature=0.7, seed=1, logprobs=3, ignore_eos=True)
    assert isinstance(answer, str) and answer == answer.text and type(answer.text) is str
    assert len(answer.ids) == len(answer.logprobs) == len(answer.top_logprobs) == 20 == answer.usage.completion_tokens
    assert all(len(top) == 3 for top in answer.top_logprobs) and max(answer.logprobs) < 0
    assert answer.finish_reason == "length"
    assert answer.usage.first_token_seconds > 0 and answer.usage.decode_rate > 0
    for clone in (copy.copy(answer), pickle.loads(pickle.dumps(answer))):
        assert isinstance(clone, Completion) and clone == answer and clone.ids == answer.ids


def test_a_list_gives_a_list_and_the_same_as_one_by_one():
    m = fake()
    batch = ["abc", TALK, [5, 6], "the end"]
    together = m.generate(batch, max_tokens=15, seed=3)
    assert [a.ids for a in together] == [m.generate(p, max_tokens=15, seed=3).ids for p in batch]
    assert m.generate([], max_tokens=3) == [] and m.score([]) == [] and m.embed([]).shape == (0, 8)
    assert [type(m.generate(["abc"], max_tokens=1)), type(m.generate(("abc",), max_tokens=1))] == [list, list]
    same = m.generate(["abc"] * 4, max_tokens=12, ignore_eos=True)
    assert len(set(map(str, same))) > 1, "without a seed every prompt has its own"


def test_a_stream_is_the_completion_in_pieces():
    m = fake()
    assert all(p.logprob is None and p.top_logprobs == () for p in m.stream("abc", max_tokens=3))
    assert m.generate("abc", max_tokens=3).logprobs is None, "they were not asked for"
    pieces = list(m.stream("abc", max_tokens=12, temperature=0, ignore_eos=True, logprobs=0))
    answer = m.generate("abc", max_tokens=12, temperature=0, ignore_eos=True, logprobs=0)
    assert "".join(pieces) == answer and [p.id for p in pieces] == answer.ids
    assert [p.logprob for p in pieces] == answer.logprobs and len(pieces) == 12
    drawn = list(m.stream([5, 6], max_tokens=12, seed=3, stop="e"))
    assert "".join(drawn) == m.generate([5, 6], max_tokens=12, seed=3, stop=["e"])


def test_a_stream_checks_at_once_starts_when_asked_and_ends_when_closed():
    m = fake()
    with pytest.raises(UsageError):
        m.stream("abc", max_tokens=0)
    stream = m.stream("abc")
    assert not m.engine.scheduler
    stream.close()
    stream = m.stream("abc", ignore_eos=True)
    next(stream), next(stream)
    assert m.engine.scheduler.running
    del stream
    assert not m.engine.scheduler and m.engine.allocator.used(0) == 0
    with pytest.raises(UsageError, match="one prompt"):
        m.stream(["abc", "def"])


def test_a_stream_ends_with_its_completion_and_usage():
    m = fake()
    stream = m.stream("abc", max_tokens=6, seed=2, ignore_eos=True, logprobs=1)
    with pytest.raises(UsageError, match="has not ended"):
        _ = stream.completion
    pieces, answer = list(stream), stream.completion
    whole = m.generate("abc", max_tokens=6, seed=2, ignore_eos=True, logprobs=1)
    assert (answer, answer.ids, answer.logprobs, answer.top_logprobs) == (
        whole,
        whole.ids,
        whole.logprobs,
        whole.top_logprobs,
    )
    assert (answer.finish_reason, answer.usage.prompt_tokens, answer.usage.completion_tokens) == ("length", 4, 6)
    assert answer.usage.prefill_rate == 4 / answer.usage.first_token_seconds and answer.usage.decode_rate > 0
    assert "".join(pieces) == answer and next(stream, None) is None and stream.completion is answer
    with m.stream("abc", seed=2, ignore_eos=True) as stream:
        read = [next(stream), next(stream)]
    assert stream.completion == "".join(read) and stream.completion.ids == whole.ids[:2]
    assert stream.completion.finish_reason == "cancelled" and not m.engine.scheduler
    stream = m.stream("abc")
    stream.close()
    assert stream.completion == "" and stream.completion.usage.prefill_rate == 0 == stream.completion.usage.decode_rate


def test_a_stream_that_fails_ends():
    m = fake()
    stream = m.stream("abc", ignore_eos=True)
    first = next(stream)
    m.engine.runner.step = None
    with pytest.raises(TypeError):
        next(stream)
    assert not m.engine.scheduler and next(stream, None) is None
    assert stream.completion == first and stream.completion.finish_reason == "cancelled"


def test_options_and_keywords():
    m = fake()
    options = GenerateOptions(max_tokens=5, seed=3, ignore_eos=True)
    wanted = m.generate("abc", max_tokens=5, seed=3, ignore_eos=True)
    assert m.generate("abc", options=options) == wanted == "".join(m.stream("abc", options=options))
    shorter = m.generate("abc", options=options, max_tokens=2)
    assert len(shorter.ids) == 2 and shorter.ids == wanted.ids[:2]
    chat = m.chat(options=options, max_tokens=4)
    assert (chat.options.max_tokens, chat.options.seed, options.max_tokens) == (4, 3, 5)
    assert [len(chat.send("a").ids), len(chat.send("a", max_tokens=1).ids)] == [4, 1]
    assert len(chat.send("a", options=GenerateOptions(ignore_eos=True), max_tokens=3).ids) == 3
    assert len(m.generate("abc", ignore_eos=True, max_tokens=None).ids) == m.ctx_size - 4
    for call in (m.generate, m.stream):
        with pytest.raises(UsageError, match="options is"):
            call("abc", options={"max_tokens": 3})


def test_an_answer_without_a_limit_is_capped():
    m = fake(context=2 * MAX_TOKENS)
    assert len(m.generate("abc", ignore_eos=True).ids) == MAX_TOKENS == len(list(m.stream("abc", ignore_eos=True)))
    assert len(m.chat().send("a", ignore_eos=True).ids) == MAX_TOKENS


def test_the_keywords_for_type_checkers_are_the_fields():
    for kind, keywords in ((GenerateOptions, GenerateKeywords), (LoadOptions, LoadKeywords)):
        assert {field.name: field.type for field in dataclasses.fields(kind)} == {
            name: hint.__forward_arg__ for name, hint in keywords.__annotations__.items()
        }


def test_an_interrupted_generate_leaves_nothing_behind():
    m = fake()
    step, calls = m.engine.runner.step, []

    def interrupt(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(batch)

    m.engine.runner.step = interrupt
    with pytest.raises(KeyboardInterrupt):
        m.generate(["abc", "de"], max_tokens=9)
    assert not m.engine.scheduler and m.engine.allocator.used(0) == 0
    assert len(m.generate("abc", max_tokens=9, ignore_eos=True).ids) == 9


def test_a_pretrained_model_warns_of_a_conversation():
    with pytest.warns(GemkitWarning, match="tiny is pretrained only") as caught:
        fake(instruction_tuned=False).generate(TALK, max_tokens=1)
    assert caught[0].filename == __file__
    fake(instruction_tuned=None).generate(TALK, max_tokens=1)
    fake(instruction_tuned=False).generate("abc", max_tokens=1)


RENDERED = "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"


def test_a_rendered_prompt_warns_once_a_call_and_is_read_when_asked():
    m, t = fake(), tokenizer()
    ids = chat_template.render(t, [{"role": "user", "content": "hi"}])
    calls = [
        lambda **o: m.generate(RENDERED, max_tokens=1, seed=1, **o).usage.prompt_tokens,
        lambda **o: m.generate([RENDERED, "abc", RENDERED], max_tokens=1, seed=1, **o)[2].usage.prompt_tokens,
        lambda **o: next(m.stream(RENDERED, max_tokens=1, temperature=0, logprobs=1, **o)).logprob,
        lambda **o: m.score(RENDERED, **o).ids,
        lambda **o: m.score(["abc", RENDERED], **o)[1].ids,
        lambda **o: m.embed(["abc", RENDERED], **o)[1].tolist(),
    ]
    for call, wanted in zip(
        calls,
        [len(ids)] * 2 + [m.generate(ids, max_tokens=1, temperature=0, logprobs=1).logprobs[0]] + [ids] * 2 + [None],
    ):
        with pytest.warns(GemkitWarning) as caught:
            plain = call()
        (warning,) = caught
        message = str(warning.message)
        assert "<bos>, <start_of_turn>, <end_of_turn>" in message and "parse_special=True" in message
        assert warning.filename == __file__ and "\n" not in message
        read = call(parse_special=True)
        assert read != plain and (wanted is None or read == wanted)
    with pytest.warns(GemkitWarning, match="the text holds <eos>, read as plain"):
        m.generate("a <eos> b <eos>", max_tokens=1)
    m.generate([{"role": "user", "content": "what does <end_of_turn> mean?"}], max_tokens=1)
    with pytest.raises(UsageError, match="content of a message is always plain"):
        m.generate(TALK, parse_special=True)


def test_score():
    m = fake()
    score = m.score("hello there")
    assert score.ids == tokenizer().encode("hello there") and len(score.logprobs) == len(score.ids) - 1
    assert score.perplexity == pytest.approx(math.exp(-np.mean(score.logprobs.astype(np.float64))))
    again = m.score(score.ids)
    assert again.ids == score.ids and (again.logprobs == score.logprobs).all()
    several = m.score(["hello there", "a", [5, 6, 7]])
    assert (several[0].logprobs == score.logprobs).all() and [len(s.ids) for s in several] == [len(score.ids), 2, 3]
    for bad, message in [
        ("", "nothing to score"),
        ([5], "nothing to score"),
        (TALK, "score takes text"),
        ("a" * 300, "301 tokens"),
    ]:
        with pytest.raises(UsageError, match=message):
            m.score(bad)


def test_embed():
    m = fake()
    vectors = m.embed(["hello", "a", "hello"])
    assert vectors.shape == (3, 8) and vectors.dtype == np.float32 and (vectors[0] == vectors[2]).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    rows = np.array([hidden_of(w) for w in words_of(WINDOWS, tokenizer().encode("hello"))], np.float64)[1:]
    np.testing.assert_allclose(vectors[0], rows.mean(0) / np.linalg.norm(rows.mean(0)), rtol=1e-6)
    assert m.embed("hello").shape == (8,) and (m.embed("hello") == vectors[0]).all()
    for bad, message in [
        ("", "text 0 is empty"),
        (["a", ""], "text 1 is empty"),
        ([3], "text 0 is 3"),
        ("a" * 300, "301 tokens"),
    ]:
        with pytest.raises(UsageError, match=message):
            m.embed(bad)


def test_chat_leaves_out_the_oldest_messages_when_asked():
    m = fake()
    m.ctx_size = 150
    chat = m.chat("be brief", context_shift=True, max_tokens=5, seed=3)
    with pytest.warns(GemkitWarning, match=r"the \d+ oldest messages are left out") as warned:
        for number in range(12):
            chat.send(f"question {number}")
    assert chat.dropped and chat.dropped % 2 == 0 and len(chat.messages) == 25
    assert 1 <= len(warned) < 12
    seen = [chat.messages[0], *chat.messages[1 + chat.dropped : -1]]
    assert chat.messages[-1]["content"] == m.generate(seen, max_tokens=5, seed=3)


def test_chat_keeps_the_history():
    m = fake()
    talk = m.chat("be brief", seed=7, max_tokens=12)
    first = talk.send("hello")
    history = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert first.ids == m.generate(history, seed=7, max_tokens=12).ids
    history += [{"role": "assistant", "content": str(first)}, {"role": "user", "content": "more"}]
    second = "".join(talk.stream("more", seed=8))
    assert second == m.generate(history, seed=8, max_tokens=12)
    assert talk.messages == [*history, {"role": "assistant", "content": second}]
    stream = talk.stream("and", ignore_eos=True)
    said = next(stream) + next(stream)
    stream.close()
    assert [message["content"] for message in talk.messages[-2:]] == ["and", said]
    length = len(talk.messages)
    with pytest.raises(UsageError, match="context holds 256"):
        talk.send("word " * 200)
    assert len(talk.messages) == length


@pytest.mark.parametrize("prompt", [None, 5, b"abc", {"role": "user"}, 1.5])
def test_a_prompt_of_another_kind_is_refused(prompt):
    with pytest.raises(UsageError, match="give a text, a list of messages, a list of ids"):
        fake().generate(prompt)


@pytest.mark.parametrize("prompt", [[["abc"]], [[TALK]], [1.5], ["abc", None]])
def test_a_wrong_list_is_refused(prompt):
    with pytest.raises(UsageError):
        fake().generate(prompt, max_tokens=1)


def test_a_closed_model_says_so():
    with fake() as m:
        m.generate("abc", max_tokens=1)
        runner = m.engine.runner
        m.settle()
        assert (runner.settled, runner.closed) == (1, 0)
    m.close()
    m.settle()
    assert (runner.settled, runner.closed) == (1, 1)
    with pytest.raises(GemkitError, match="closed"):
        m.generate("abc")


def test_load_refuses_what_is_not_there(tmp_path):
    with pytest.raises(GemkitError, match=r"no model 'gemma-9z'.*gemma-2-9b"):
        gemkit.load("gemma-9z")
    with pytest.raises(GemkitError, match="holds no GGUF files"):
        gemkit.load(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(GemkitError, match="holds 2 GGUF models"):
        gemkit.load(tmp_path)
    for options in ({"threads": 0}, {"threads": 1.5}, {"threads": True}, {"activations": "fp4"}):
        with pytest.raises(UsageError, match=next(iter(options))):
            gemkit.load(tmp_path / "a.gguf", **options)


def test_default_threads_are_usable():
    assert 1 <= default_threads() <= 1024


def test_import_is_fast_and_exports_are_there():
    times = []
    for _ in range(3):
        code = "import time; t = time.perf_counter(); import gemkit; print(time.perf_counter() - t)"
        times.append(
            float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stdout)
        )
    assert min(times) < 0.04
    assert all(getattr(gemkit, name) is not None for name in gemkit.__all__)
    assert set(gemkit.__all__) <= set(dir(gemkit))
    with pytest.raises(AttributeError, match="nothing"):
        _ = gemkit.nothing


def test_type_checkers_see_the_exports():
    source = Path(gemkit.__file__)
    shown = {}
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("gemkit."):
            shown |= {alias.asname: node.module.removeprefix("gemkit.") for alias in node.names}
    assert shown == gemkit._EXPORTS and source.with_name("py.typed").exists()


@dataclass
class Float32:
    """A tensor of a checkpoint that never was a file."""

    values: np.ndarray
    type: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def data(self) -> np.ndarray:
        return self.values.view(np.uint8).reshape(-1)

    def to_float32(self) -> np.ndarray:
        return self.values


@pytest.fixture(scope="module")
def native():
    from gemkit.models.native import NativeRunner

    case = CASES["gemma3"]
    config, params = case.config, case.params()
    runner = NativeRunner(
        config,
        {name: Float32(values) for name, values in params.items()},
        threads=1,
        activations="float32",
        max_tokens_per_step=48,
    )
    checkpoint = SimpleNamespace(name="tiny", instruction_tuned=None)
    return Model(checkpoint, runner, tokenizer(), ctx_size=300), config, params


def test_native_score_and_embed_equal_the_reference(native):
    m, config, params = native
    text = "the quick brown fox jumps over the lazy dog 0123456789 " * 3
    score = m.score(text)
    logits = reference.forward(config, params, np.array(score.ids))
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    np.testing.assert_allclose(score.logprobs, logprobs[np.arange(len(score.logprobs)), score.ids[1:]], atol=2e-4)
    hidden = reference.hidden(config, params, np.array(score.ids))[1:].mean(0)
    np.testing.assert_allclose(m.embed(text), hidden / np.linalg.norm(hidden), atol=1e-5)


def test_native_batch_equals_single_and_tight_memory_changes_nothing(native):
    m, *_ = native
    prompts = ["the quick", "a", "0123456789 " * 12, [5, 6, 7], "and then there was one"]
    options = {"max_tokens": 90, "ignore_eos": True, "repetition_penalty": 1.1, "logprobs": 2}
    together = m.generate(prompts, seed=3, **options)
    for prompt, answer in zip(prompts, together):
        alone = m.generate(prompt, seed=3, **options)
        assert (
            alone.ids == answer.ids and alone.logprobs == answer.logprobs and alone.top_logprobs == answer.top_logprobs
        )
    limits = m.engine.allocator.limits
    try:
        m.engine.allocator.limits = [max(limit // 16, used) for limit, used in zip(limits, m.engine.allocator.capacity)]
        assert [a.logprobs for a in m.generate(prompts, seed=3, **options)] == [a.logprobs for a in together]
    finally:
        m.engine.allocator.limits = limits
    assert m.engine.allocator.used(0) == 0
    pieces = list(m.stream(prompts[0], temperature=1.0, seed=3, **options))
    assert [p.id for p in pieces] == together[0].ids
