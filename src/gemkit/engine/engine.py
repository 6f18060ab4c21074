"""The engine: schedule, run, postprocess.

One engine serves many requests at once, from one thread or several. No result depends on what else runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gemkit import forks
from gemkit.engine.interface import GREEDY, Batch, Runner, StepResult, check_finite
from gemkit.engine.pages import PageAllocator, PageTable, limits_for
from gemkit.engine.request import Request, TextStream, Token, Tokenizer
from gemkit.engine.sampling import Sampling
from gemkit.engine.scheduler import Scheduler, make_batch
from gemkit.errors import GemkitError, UsageError, brief, whole_number

Result = TypeVar("Result")


class Part(NamedTuple):
    """Positions start <= p < end of the index-th list of ids."""

    index: int
    start: int
    end: int


class Engine:
    """Turn requests into tokens.

    context_size: the most tokens of prompt and answer together; at most (and by default) the model's.
    max_sequences: the most requests that run at once; others wait.
    cache_bytes: bound on the cache; by default each running request may fill its context. Memory is taken as needed.
    stop_ids: the tokens that end an answer, the model's (``config.stop_token_ids``) and the tokenizer's.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        context_size: int | None = None,
        max_sequences: int = 16,
        cache_bytes: int | None = None,
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        longest = runner.config.max_position_embeddings
        size = longest if context_size is None else whole_number(context_size)
        if size is None or not 2 <= size <= longest:
            raise UsageError(f"ctx_size is {brief(context_size)}; this model takes 2 to {longest} tokens")
        self.context_size = size
        self.stop_ids = frozenset(runner.config.stop_token_ids) | frozenset(tokenizer.stop_ids)
        chunk = runner.max_tokens_per_step
        max_sequences = min(max_sequences, chunk)
        page_bytes = [runner.page_bytes(g) for g in range(len(runner.groups))]
        limits = limits_for(
            runner.groups, runner.page_size, page_bytes, self.context_size, chunk, max_sequences, cache_bytes
        )
        self.allocator = PageAllocator(runner.groups, runner.page_size, limits, runner.reserve)
        self.scheduler = Scheduler(self.allocator, chunk, max_sequences)
        self._lock = threading.RLock()
        self._busy = False
        self._cancelled: list[Request] = []
        self._forked = False
        self._survives_fork = runner.info.survives_fork
        forks.track(self)

    def hold(self) -> None:
        """Return at once before a fork: `step` repairs what another thread left half done."""

    def release(self, in_child: bool) -> None:
        """Free the lock in a forked child, and refuse further use there if the runner does not survive a fork."""
        if in_child:
            self._lock, self._busy = threading.RLock(), True
            self._forked = not self._survives_fork

    def add(self, prompt: Sequence[int], sampling: Sampling = GREEDY, **options: Any) -> Request:
        """Check a request, queue it and return it; `step` fills in its ``tokens`` and ``finish_reason``.

        options: those of `prepare`.
        """
        request = self.prepare(prompt, sampling, **options)
        self.submit(request)
        return request

    def prepare(
        self,
        prompt: Sequence[int],
        sampling: Sampling = GREEDY,
        *,
        max_tokens: int | None = None,
        stop: str | Iterable[str] | None = (),
        ignore_eos: bool = False,
        adapter: int = -1,
    ) -> Request:
        """Check a request and return it, not queued yet.

        prompt: ids, BOS included. max_tokens: by default up to the end of the context, where generation ends anyway.
        stop: strings that end the answer and are left out of its text. ignore_eos: do not end at the model's stop ids.
        adapter: the number of one of the runner's adapters.
        Raises UsageError for a bad value or a prompt that fills the context.
        """
        if not isinstance(sampling, Sampling):
            raise UsageError(f"sampling is {brief(sampling)}; give a gemkit.engine.sampling.Sampling")
        sampling.check_vocabulary(self.runner.config.vocab_size)
        self._check_adapter(adapter)
        ids = self.check_ids(prompt)
        stop = check_stop(stop)
        if len(ids) >= self.context_size:
            raise UsageError(
                f"the prompt has {len(ids)} tokens and the context holds {self.context_size}, the answer included: "
                "shorten the prompt or load with a larger ctx_size"
            )
        limit = self.context_size
        if max_tokens is not None:
            limit = min(limit, len(ids) + check_max_tokens(max_tokens))
        stream = TextStream(self.tokenizer, stop)
        return Request(ids, limit, self._new_table(limit), sampling, stream, ignore_eos, adapter)

    def submit(self, request: Request) -> None:
        """Queue a request that `prepare` returned."""
        with self._lock:
            self._check_fork()
            request.start_time = time.perf_counter()
            self.scheduler.add(request)

    def step(self) -> list[Request]:
        """Run one step and return the requests that got a token; an empty list if there was nothing to do.

        After an exception, an interrupt included, every unfinished request is intact and starts over in the next step.
        """
        return self._exclusively(self._step)

    def run(self) -> None:
        """Step until every request is finished."""
        while self.scheduler:
            self.step()

    def cancel(self, request: Request) -> None:
        """End a request and free its pages; nothing happens if it is finished. Pieces so far stay as they are."""
        with self._lock:
            if request.finished:
                return
            request.finish_reason = "cancelled"
            # A generator can be collected, and so call this, in the middle of a step of the same thread.
            if self._busy:
                self._cancelled.append(request)
                return
            self._busy = True
            self.scheduler.remove(request)
            self._busy = False

    def stream(self, request: Request) -> Iterator[Token]:
        """Yield a request's tokens as they come; closing the generator cancels the request."""
        index = 0
        try:
            while True:
                # Asked first: another thread may add the last token while this one yields.
                finished = request.finished
                while index < len(request.tokens):
                    index += 1
                    yield request.tokens[index - 1]
                if finished:
                    return
                self.step()
        finally:
            self.cancel(request)

    def score(self, prompts: Sequence[Sequence[int]], adapter: int = -1) -> list[np.ndarray]:
        """Return per list of ids the log-probability of each but the first, given those before: float32 [n - 1].

        Raises GemkitError if any is not finite.
        """
        ids = [self._check_context(prompt) for prompt in prompts]
        if any(len(row) < 2 for row in ids):
            raise UsageError("the text is empty: there is nothing to score")
        scores = [np.empty(len(row) - 1, np.float32) for row in ids]

        def run(batch: Batch, parts: list[Part]) -> np.ndarray:
            return self.runner.score(batch, np.concatenate([ids[i][start + 1 : end + 1] for i, start, end in parts]))

        def visit(part: Part, values: np.ndarray) -> None:
            check_finite(values)
            scores[part.index][part.start : part.end] = values

        # The last id is only a target.
        self.sweep([row[:-1] for row in ids], run, visit, adapter)
        return scores

    def mean_hidden(self, prompts: Sequence[Sequence[int]], skip: Sequence[int], adapter: int = -1) -> np.ndarray:
        """Return for each list of ids the mean of its final hidden states but the first ``skip``: float64 [n, D].

        Raises GemkitError if any is not finite.
        """
        ids = [self._check_context(prompt) for prompt in prompts]
        assert all(count < len(row) for count, row in zip(skip, ids))
        sums = np.zeros((len(ids), self.runner.config.hidden_size))

        def visit(part: Part, values: np.ndarray) -> None:
            check_finite(values)
            if part.start == 0:  # also when the list had to start over
                sums[part.index] = 0
            sums[part.index] += values[max(0, skip[part.index] - part.start) :].sum(axis=0, dtype=np.float64)

        self.sweep(ids, lambda batch, parts: self.runner.hidden(batch), visit, adapter)
        return sums / np.array([len(row) - count for row, count in zip(ids, skip)]).reshape(-1, 1)

    def sweep(
        self,
        prompts: Sequence[np.ndarray],
        run: Callable[[Batch, list[Part]], np.ndarray],
        visit: Callable[[Part, np.ndarray], None],
        adapter: int = -1,
    ) -> None:
        """Run lists of ids through the model once, in ragged batches and chunks.

        run: called with each batch and its parts, returns one row per new token [T, …].
        visit: called with each part and its rows; the parts of a list come in order.
        """
        self._check_adapter(adapter)
        self._exclusively(self._sweep, prompts, run, visit, adapter)

    def _exclusively(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function that uses the runner, under the lock, and restore a consistent state if it fails."""
        with self._lock:
            self._check_fork()
            if self._busy:
                self._recover()
            self._busy = True
            try:
                result = work(*arguments)
                self._remove_cancelled()
            except BaseException:
                self._recover()
                raise
            self._busy = False
            return result

    def _sweep(self, prompts: Sequence[np.ndarray], run: Callable, visit: Callable, adapter: int) -> None:
        scheduler = Scheduler(self.allocator, self.scheduler.max_tokens, self.scheduler.max_sequences)
        index = {}
        for number, ids in enumerate(prompts):
            request = Request(ids, len(ids), self._new_table(len(ids)), GREEDY, adapter=adapter)
            index[request] = number
            scheduler.add(request)
        while scheduler:
            plan = scheduler.schedule()
            if not plan:
                # Requests in flight hold the pages: they start over later.
                if not self.scheduler.running:
                    raise self._shortage()
                self.scheduler.preempt_all()
                continue
            parts = [Part(index[request], request.cached, request.cached + count) for request, count in plan]
            rows = run(make_batch(plan, self.runner.page_size, draw=False), parts)
            row = 0
            for (request, count), part in zip(plan, parts):
                visit(part, rows[row : row + count])
                row += count
                scheduler.advance(request, count)
                if request.cached == request.length:
                    scheduler.remove(request)

    def _step(self) -> list[Request]:
        scheduler = self.scheduler
        # A second try is for the case that the only running request had to give way to itself.
        plan = scheduler.schedule() or scheduler.schedule()
        if not plan:
            if scheduler.waiting:
                scheduler.waiting[0].finish_reason = "cancelled"
                raise self._shortage()
            return []
        result = self.runner.step(make_batch(plan, self.runner.page_size))
        now = time.perf_counter()
        tokens, logprobs = result.tokens.tolist(), result.logprobs.tolist()
        advanced, row = [], 0
        for request, count in plan:
            scheduler.advance(request, count)
            if request.cached == request.length:  # as `make_batch` saw it, so that it has a row
                if not request.finished:
                    self._accept(request, tokens[row], logprobs[row], _top(request, result, row), now)
                    advanced.append(request)
                row += 1
            if request.finished:
                scheduler.remove(request)
        assert row == len(tokens), "a runner returns one row per draw"
        return advanced

    def _accept(self, request: Request, token: int, logprob: float, top: tuple, now: float) -> None:
        """Append a token, and end the request if it was the last one."""
        text, reason = self._judge(request, token, request.length + 1)
        if not request.tokens:
            request.first_token_time = now
        request.last_token_time = now
        request.ids[request.length] = token
        request.tokens.append(Token(token, text, None if request.sampling.logprobs is None else logprob, top))
        request.length += 1
        if reason:
            request.finish_reason = reason

    def _judge(self, request: Request, token: int, length: int) -> tuple[str, str | None]:
        """Return the text that a token adds, and why the request ends with it if it does."""
        stream = request.stream
        if token in self.stop_ids and not request.ignore_eos:
            return stream.flush(), "stop"
        text = stream.push(token)
        if stream.stopped:
            return text, "stop"
        if length == request.limit:
            text += stream.flush()
            return text, "stop" if stream.stopped else "length"
        return text, None

    def _recover(self) -> None:
        """Restore a consistent state after an interrupt at any point: requests go back to their last complete token."""
        self._busy = True
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            request.length = request.prompt_length + len(request.tokens)
            request.stream.restart()
            reason = request.finish_reason
            for n, token in enumerate(request.tokens):
                request.ids[request.prompt_length + n] = token.id
                reason = self._judge(request, token.id, request.prompt_length + n + 1)[1] or reason
            request.finish_reason = reason
        self._cancelled.clear()
        self.scheduler.restart()
        self._busy = False

    def _remove_cancelled(self) -> None:
        while self._cancelled:
            self.scheduler.remove(self._cancelled[-1])
            self._cancelled.pop()

    def _new_table(self, length: int) -> PageTable:
        return PageTable(len(self.runner.groups), -(-length // self.runner.page_size))

    def _shortage(self) -> GemkitError:
        return self.allocator.shortage or GemkitError("the cache is full: load with a smaller ctx_size")

    def _check_fork(self) -> None:
        if self._forked:
            raise GemkitError(
                "the model was loaded before this process was forked, and its framework does not work in the child: "
                "load it in the child, or start processes with multiprocessing's method spawn"
            )

    def _check_adapter(self, adapter: int) -> None:
        number = whole_number(adapter)
        if number is None or not -1 <= number < self.runner.adapter_count:
            count = self.runner.adapter_count
            raise UsageError(f"there is no adapter {brief(adapter)}: the model was loaded with {count}")

    def _check_context(self, prompt: Sequence[int]) -> np.ndarray:
        ids = self.check_ids(prompt)
        if len(ids) > self.context_size:
            raise UsageError(
                f"the text has {len(ids)} tokens and the context holds {self.context_size}: "
                "split the text or load with a larger ctx_size"
            )
        return ids

    def check_ids(self, prompt: Sequence[int]) -> np.ndarray:
        """Return the prompt as int32 [n]; raises UsageError unless it is at least one id of the vocabulary."""
        try:
            ids = np.asarray(prompt)
        except (ValueError, OverflowError):
            ids = np.array(None)
        if ids.size == 0:
            raise UsageError("the prompt is empty: give at least one token")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UsageError("the prompt's ids are not a list of whole numbers: give one such list per prompt")
        size = self.runner.config.vocab_size
        if ids.min() < 0 or ids.max() >= size:
            wrong = next(int(token) for token in ids if not 0 <= token < size)
            raise UsageError(f"the prompt holds token {wrong}; ids of this model go from 0 to {size - 1}")
        return ids.astype(np.int32)


def _top(request: Request, result: StepResult, row: int) -> tuple[tuple[int, float], ...]:
    count = request.sampling.logprobs or 0
    if not count:
        return ()
    return tuple(zip(result.top_ids[row, :count].tolist(), result.top_logprobs[row, :count].tolist()))


def check_max_tokens(value: object) -> int:
    """Return the most tokens of an answer; raises UsageError unless it is a whole number from 1."""
    count = whole_number(value)
    if count is None or count < 1:
        raise UsageError(f"max_tokens is {brief(value)}; give a whole number from 1, or None for the whole context")
    return count


def check_stop(stop: object) -> tuple[str, ...]:
    """Return stop strings, of one or any iterable; raises UsageError for anything that is not text."""
    if stop is None or isinstance(stop, str):
        strings = () if stop is None else (stop,)
    elif isinstance(stop, Iterable) and not isinstance(stop, bytes | bytearray | Mapping):
        strings = tuple(stop)
    else:
        raise UsageError(f"stop is {brief(stop)}; give a text, or a list of texts")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise UsageError(f"a stop string is {brief(string)}; give text of at least one character")
    return strings
