"""One request on its way through the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple, Protocol

import numpy as np

from gemkit.engine.pages import PageTable
from gemkit.engine.sampling import Sampling
from gemkit.text.stream import StopMatcher, StreamDecoder


class Tokenizer(Protocol):
    """Tokenizer interface of the engine; `StreamDecoder` needs more."""

    vocab_size: int
    stop_ids: set[int]


class Token(NamedTuple):
    """One generated token.

    text: what it adds to the text; empty while a character or a possible stop string is incomplete.
    logprob: natural logarithm of its probability under the unmodified softmax; None if it was not asked for.
    top: the most probable tokens with their log-probabilities, best first; as many as ``Sampling.logprobs``.
    """

    id: int
    text: str
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class TextStream:
    """Text of one request as its tokens come; ``stopped`` once a stop string is complete, which is then left out."""

    __slots__ = ("_decoder", "_matcher", "_stop", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self.restart()

    def restart(self) -> None:
        self._decoder = StreamDecoder(self._tokenizer)
        self._matcher = StopMatcher(self._stop) if self._stop else None

    @property
    def stopped(self) -> bool:
        return self._matcher is not None and self._matcher.stopped

    def push(self, token: int) -> str:
        # Some models have more rows than their vocabulary has pieces.
        text = self._decoder.push(token) if token < self._tokenizer.vocab_size else ""
        return text if self._matcher is None else self._matcher.push(text)

    def flush(self) -> str:
        """Return what was held back."""
        text = self._decoder.flush()
        return text if self._matcher is None else self._matcher.push(text) + self._matcher.flush()


class State(Enum):
    """Position of a request in the scheduler. A request that was cancelled runs until the step under way has ended."""

    NEW = auto()  # prepared, not queued
    WAITING = auto()  # queued, without pages; for the first time or after a preemption
    RUNNING = auto()  # has pages and takes part in steps
    REMOVED = auto()  # without pages, never to run again


class Request:
    """Prompt, generated tokens, page table, and times of one request.

    ids: int32, allocated for the whole request; ``length`` are known, the first ``prompt_length`` are the prompt.
    cached: how many positions are in the cache; the next step starts there. state: set by the scheduler.
    limit: the length at which generation ends.
    adapter: its adapter's number, -1 for none.
    tokens: what was generated, in order; finish_reason: None, then "stop", "length" or "cancelled".
    """

    __slots__ = (
        "adapter",
        "cached",
        "finish_reason",
        "first_token_time",
        "ids",
        "ignore_eos",
        "last_token_time",
        "length",
        "limit",
        "preemptions",
        "prompt_length",
        "sampling",
        "start_time",
        "state",
        "stream",
        "table",
        "tokens",
    )

    def __init__(
        self,
        prompt: Sequence[int],
        limit: int,
        table: PageTable,
        sampling: Sampling,
        stream: TextStream | None = None,
        ignore_eos: bool = False,
        adapter: int = -1,
    ) -> None:
        self.ids = np.empty(limit, np.int32)
        self.ids[: len(prompt)] = prompt
        self.prompt_length = self.length = len(prompt)
        self.limit = limit
        self.table = table
        self.sampling = sampling
        self.stream = stream
        self.ignore_eos = ignore_eos
        self.adapter = adapter
        self.cached = 0
        self.state = State.NEW
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None
        self.preemptions = 0
        self.start_time = time.perf_counter()
        self.first_token_time = self.last_token_time = self.start_time

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def first_token_seconds(self) -> float:
        """From the request to its first token; 0 before that."""
        return self.first_token_time - self.start_time

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first one; 0 if there is none."""
        seconds = self.last_token_time - self.first_token_time
        return (len(self.tokens) - 1) / seconds if seconds > 0 else 0.0
