"""A runner whose logits depend on every visible token through the page tables, and what it must give without pages."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from gemkit.engine.interface import Batch, PageGroup, RunnerInfo, StepResult
from gemkit.engine.sampling import Sampling, log_softmax, sample
from gemkit.errors import GemkitError

V, D = 300, 8
_ROWS = np.random.default_rng(7).integers(1, 2**63, (V, 1), np.uint64) | np.uint64(1)


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words that leaves no pattern."""
    x = (x ^ (x >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(32))


def state(windows: tuple[int | None, ...], groups: list[np.ndarray], position: int) -> np.uint64:
    """One word that depends on all tokens that ``position`` sees, in every group, and on their positions.

    groups: per group the visible tokens, oldest first, up to and including ``position``.
    """
    total = np.zeros(1, np.uint64)
    for g, (window, tokens) in enumerate(zip(windows, groups)):
        count = position + 1 if window is None else min(window, position + 1)
        assert len(tokens) == count
        positions = np.arange(position + 1 - count, position + 1, dtype=np.uint64)
        words = mix(tokens.astype(np.uint64) * np.uint64(1_000_003) + positions * np.uint64(7919) + np.uint64(g + 1))
        total += words.sum(dtype=np.uint64)
    return mix(total)[0]


def logits_of(word: np.uint64) -> np.ndarray:
    """float32 [V], about normal with a spread of 2, in steps of 1/16 so that ties happen."""
    words = mix(word * _ROWS[:, 0])
    parts = np.stack([(words >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4)]).astype(np.float64) / 65536
    return (np.round((parts.sum(0) - 2) * 3.5 * 16) / 16).astype(np.float32)


def hidden_of(word: np.uint64) -> np.ndarray:
    return (mix(word + np.arange(D, dtype=np.uint64)) >> np.uint64(40)).astype(np.float32) / 2**24 - 0.5


def words_of(windows: tuple[int | None, ...], ids: list[int]) -> list[np.uint64]:
    """The word after each token, from the ids alone."""
    ids = np.array(ids)
    return [
        state(windows, [ids[0 if w is None else max(0, p - w + 1) : p + 1] for w in windows], p)
        for p in range(len(ids))
    ]


def continue_alone(
    windows: tuple[int | None, ...],
    prompt: list[int],
    count: int,
    sampling: Sampling,
    stop_ids: frozenset[int] = frozenset(),
) -> list[int]:
    """Return the tokens that a request must generate, by one forward pass per token over all ids."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        w = words_of_last(windows, ids)
        token, *_ = sample(logits_of(w), sampling, len(ids) - len(prompt), np.array(ids, np.int32), len(prompt))
        ids.append(token)
        if token in stop_ids:
            break
    return ids[len(prompt) :]


def words_of_last(windows: tuple[int | None, ...], ids: list[int]) -> np.uint64:
    ids = np.array(ids)
    p = len(ids) - 1
    return state(windows, [ids[0 if w is None else max(0, p - w + 1) :] for w in windows], p)


class FakeRunner:
    """Keeps the tokens themselves as its cache and checks every promise of `Batch`.

    windows: one page group each. memory: the most pages per group that `reserve` gives. forced: ids to draw instead of
    the sampled ones, by number of tokens generated so far.
    """

    def __init__(
        self,
        windows: tuple[int | None, ...] = (None, 10),
        page_size: int = 4,
        max_tokens: int = 16,
        context: int = 256,
        memory: int = 10**6,
        forced: list[int] | None = None,
        stop_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.config = SimpleNamespace(
            vocab_size=V, hidden_size=D, max_position_embeddings=context, stop_token_ids=stop_token_ids
        )
        self.windows = windows
        self.page_size = page_size
        self.groups = tuple(PageGroup(window, (g,)) for g, window in enumerate(windows))
        self.max_tokens_per_step = max_tokens
        self.adapter_count = self.settled = self.closed = 0
        self.memory = memory
        self.forced = forced
        self.reserved = [0] * len(windows)
        self.cache = [np.empty((0, page_size), np.int64) for _ in windows]
        self.steps: list[list[int]] = []

    @property
    def info(self) -> RunnerInfo:
        return RunnerInfo("fake", "float32", 1, False, 0, 0, 0)

    def settle(self) -> None:
        self.settled += 1

    def close(self) -> None:
        self.closed += 1

    def page_bytes(self, group: int) -> int:
        return self.page_size * 4

    def reserve(self, pages: list[int]) -> None:
        assert all(new >= old for new, old in zip(pages, self.reserved))
        if max(pages) > self.memory:
            raise GemkitError("memory is short: close something")
        for g, count in enumerate(pages):
            fresh = np.full((count - self.reserved[g], self.page_size), 999_999)
            self.cache[g] = np.concatenate([self.cache[g], fresh])
        self.reserved = list(pages)

    def words(self, batch: Batch) -> list[np.uint64]:
        size = len(batch.positions)
        assert batch.tokens.dtype == batch.starts.dtype == batch.positions.dtype == np.int32
        assert batch.counters.dtype == np.int64 and batch.draws.dtype == batch.prompt_lengths.dtype == np.int32
        assert batch.starts[0] == 0 and batch.starts[-1] == len(batch.tokens) <= self.max_tokens_per_step
        assert len(batch.draws) == len(batch.sampling) == len(batch.counters) == len(batch.history) == size
        self.steps.append(np.diff(batch.starts).tolist())
        result, written = [], [set() for _ in self.windows]
        for b in range(size):
            new = batch.tokens[batch.starts[b] : batch.starts[b + 1]]
            assert len(new) > 0
            tables = []
            for g, pages in enumerate(batch.pages):
                assert pages.dtype == np.int32 and pages.flags.c_contiguous
                row = pages[b]
                own = set(row[row >= 0].tolist())
                assert len(own) == np.count_nonzero(row >= 0) and not own & written[g], "a page has two owners"
                assert max(own) < self.reserved[g]
                written[g] |= own
                tables.append(row)
            for t, token in enumerate(new):
                position = int(batch.positions[b]) + t
                visible = []
                for g, window in enumerate(self.windows):
                    oldest = 0 if window is None else max(0, position - window + 1)
                    at = np.arange(oldest, position + 1)
                    pages = tables[g][at // self.page_size]
                    assert pages.min() >= 0, "a visible position has no page"
                    self.cache[g][pages[-1], position % self.page_size] = token
                    visible.append(self.cache[g][pages, at % self.page_size])
                result.append(state(self.windows, visible, position))
        return result

    def step(self, batch: Batch) -> StepResult:
        assert batch.targets is None and not batch.masks and batch.draws.max(initial=0) <= 1
        words = self.words(batch)
        drawing = np.flatnonzero(batch.draws)
        size = len(drawing)
        count = max(s.logprobs or 0 for s in batch.sampling)
        result = StepResult(
            np.full(size, -1, np.int32),
            np.zeros(size, np.float32),
            np.full((size, count), -1, np.int32),
            np.full((size, count), -np.inf, np.float32),
        )
        for row, b in enumerate(drawing):
            logits, settings = logits_of(words[batch.starts[b + 1] - 1]), batch.sampling[b]
            counter, length = int(batch.counters[b]), int(batch.prompt_lengths[b])
            token, logprob, ids, values = sample(logits, settings, counter, batch.history[b], length)
            result.tokens[row] = self.forced[counter] if self.forced else token
            result.logprobs[row] = logprob
            result.top_ids[row, : len(ids)] = ids
            result.top_logprobs[row, : len(ids)] = values
        return result

    def logits(self, batch: Batch) -> np.ndarray:
        return np.stack([logits_of(word) for word in self.words(batch)])

    def score(self, batch: Batch, targets: np.ndarray) -> np.ndarray:
        assert targets.dtype == np.int32
        rows = self.logits(batch)
        return np.array([log_softmax(row)[t] if t >= 0 else 0 for row, t in zip(rows, targets)], np.float32)

    def hidden(self, batch: Batch) -> np.ndarray:
        return np.stack([hidden_of(word) for word in self.words(batch)])
