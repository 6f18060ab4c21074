"""The types of every public call, for type checkers alone: `make types` runs them, nothing runs this file."""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import gemkit
from gemkit import (
    Chat,
    Completion,
    GemkitError,
    GenerateOptions,
    LoadOptions,
    Model,
    Piece,
    Score,
    Stream,
    Usage,
    UsageError,
)

assert_type(gemkit.load("demo"), Model)
assert_type(gemkit.load(Path("model"), threads=2, adapter={"a": "folder"}), Model)
assert_type(gemkit.load("demo", options=LoadOptions(ctx_size=512), backend="torch"), Model)
gemkit.load("demo", thread=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

m = gemkit.load("demo")
TALK = [{"role": "user", "content": "hello"}]
OPTIONS = GenerateOptions(max_tokens=5, stop=["a"], logit_bias={5: -2.0})
assert_type(OPTIONS.max_tokens, int | None)

assert_type(m.generate("a", max_tokens=16, temperature=0), Completion)
assert_type(m.generate("a", options=OPTIONS, stop="b", suffix="c"), Completion)
assert_type(m.generate(TALK), Completion)
assert_type(m.generate([2, 5, 6]), Completion)
assert_type(m.generate(np.array([2, 5, 6])), Completion)
assert_type(m.generate(["a", "b"]), list[Completion])
assert_type(m.generate([TALK, TALK]), list[Completion])
assert_type(m.generate([[2, 5], [2, 6]]), list[Completion])
m.generate("a", temperatur=0)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
m.generate("a", temperature="hot")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]

answer = m.generate("a")
assert_type(answer.text, str)
assert_type(answer.ids, list[int])
assert_type(answer.finish_reason, str)
assert_type(answer.logprobs, list[float] | None)
assert_type(answer.top_logprobs, list[tuple[tuple[int, float], ...]])
assert_type(answer.usage, Usage)
assert_type(answer.usage.prompt_tokens, int)
assert_type(answer.usage.decode_rate, float)
assert_type(answer.usage.prefill_rate, float)

stream = m.stream("a", options=OPTIONS, seed=1)
assert_type(stream, Stream)
assert_type(next(stream), Piece)
pieces: Iterator[Piece] = stream
for piece in pieces:
    assert_type(piece, Piece)
    assert_type(piece.id, int)
    assert_type(piece.logprob, float | None)
assert_type(stream.completion, Completion)
with m.stream("a") as opened:
    assert_type(opened, Stream)

chat = m.chat("Be brief.", context_shift=True, seed=1)
assert_type(chat, Chat)
assert_type(chat.send("a", max_tokens=5), Completion)
assert_type(chat.stream("a", options=OPTIONS), Stream)
assert_type(chat.messages, list[dict[str, str]])

assert_type(m.score("a"), Score)
assert_type(m.score([2, 5]), Score)
assert_type(m.score(["a", "b"], adapter="base"), list[Score])
assert_type(m.score("a").perplexity, float)
assert_type(m.score("a").ids, list[int])
assert_type(m.score("a").logprobs, NDArray[np.float32])

assert_type(m.embed("a"), np.ndarray[tuple[int], np.dtype[np.float32]])
assert_type(m.embed(["a", "b"]), np.ndarray[tuple[int, int], np.dtype[np.float32]])

assert_type(m.render(TALK, add_generation_prompt=False), list[int])
assert_type(m.ctx_size, int)
assert_type(m.stop_ids, frozenset[int])
assert_type(m.chat_template, str | None)
with m as same:
    assert_type(same, Model)
assert_type(m.close(), None)
assert issubclass(UsageError, GemkitError)
