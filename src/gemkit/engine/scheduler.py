"""Scheduler: the requests of the next step, and their numbers of tokens.

Continuous batching: requests that decode come first, one token each; what is left of the step's budget goes to
prompts, oldest first, cut into chunks. A waiting request is admitted when pages for its whole prompt are to be had. If
pages run out later, the youngest running request gives up its pages and starts over from its tokens, the generated
ones included. Runners are exact and random numbers are counted, so that the result does not depend on it.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from gemkit.engine.interface import NO_IDS, Batch, build_batch
from gemkit.engine.pages import PageAllocator
from gemkit.engine.request import Request, State

Plan = list[tuple[Request, int]]


class Scheduler:
    """First come, first served.

    max_tokens: the most new tokens in a step. max_sequences: the most requests that run at once.
    """

    def __init__(self, allocator: PageAllocator, max_tokens: int, max_sequences: int) -> None:
        # Otherwise requests that decode could use up the step and starve a prompt.
        assert 0 < max_sequences <= max_tokens
        self.allocator = allocator
        self.max_tokens = max_tokens
        self.max_sequences = max_sequences
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def __bool__(self) -> bool:
        """Return whether any request is unfinished."""
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        request.state = State.WAITING

    def schedule(self) -> Plan:
        """Return the requests of the next step with their numbers of new tokens; their pages are theirs already."""
        plan: Plan = []
        running = tuple(self.running)
        budget = self.max_tokens
        for request in running:
            if request.length - request.cached == 1 and self._extend(request, 1):
                plan.append((request, 1))
                budget -= 1
        for request in running:
            count = min(request.length - request.cached, budget)
            if count > 0 and request.length - request.cached > 1 and self._extend(request, count):
                plan.append((request, count))
                budget -= count
        if len(self.running) < len(running):
            # Victims are the youngest: none has its place in the plan yet, and none is admitted in this step.
            assert all(request.state is State.RUNNING for request, _ in plan)
            return plan
        while self.waiting and budget and len(self.running) < self.max_sequences:
            request = self.waiting[0]
            count = min(request.length, budget)
            if not self._fits(request) or not self.allocator.extend(request.table, count):
                break
            # In this order, so that an interrupt in between loses no request.
            self.running.append(request)
            self.waiting.popleft()
            request.state = State.RUNNING
            plan.append((request, count))
            budget -= count
        return plan

    def advance(self, request: Request, count: int) -> None:
        """Note that a request's next ``count`` tokens are in the cache and take back the pages out of sight."""
        request.cached += count
        self.allocator.trim(request.table, request.cached)

    def remove(self, request: Request) -> None:
        """Take a request out and its pages back; nothing happens if it is gone already."""
        self._stop(request, State.REMOVED)
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def preempt(self, request: Request) -> None:
        """Send a running request back to the head of the queue without its pages."""
        self._stop(request, State.WAITING)
        request.preemptions += 1
        self.waiting.appendleft(request)
        self.running.remove(request)

    def preempt_all(self) -> None:
        while self.running:
            self.preempt(self.running[-1])

    def restart(self) -> None:
        """Repair a half-done change: all pages are free, all unfinished requests wait, in their order."""
        requests = dict.fromkeys([*self.running, *self.waiting])
        self.allocator.reset()
        for request in requests:
            request.table.clear()
            request.cached = 0
            request.state = State.REMOVED if request.finished else State.WAITING
        self.running = []
        self.waiting = deque(request for request in requests if not request.finished)

    def _stop(self, request: Request, state: State) -> None:
        """Take back a request's pages."""
        self.allocator.release(request.table)
        request.cached = 0
        request.state = state

    def _extend(self, request: Request, count: int) -> bool:
        """Get the pages for a running request's next tokens; False if it was preempted."""
        while request.state is State.RUNNING:
            if self.allocator.extend(request.table, request.cached + count):
                return True
            assert len(self.running) > 1 or self.allocator.shortage, "a context must fit in the cache"
            self.preempt(self.running[-1])
        return False

    def _fits(self, request: Request) -> bool:
        """Return whether pages for a request's known tokens and one more are free, beyond the needs of running ones."""
        allocator = self.allocator
        for g in range(len(allocator.groups)):
            promised = 0
            for other in (*self.running, request):
                peak = allocator.peak(g, min(other.length + 1, other.limit), self.max_tokens)
                # One page more for each that decodes, so that an admission is not undone at once.
                held = other.table.end[g] - other.table.first[g]
                promised += max(0, peak - held) + (other is not request)
            if promised > allocator.available(g):
                return False
        return True


def make_batch(plan: Plan, page_size: int, draw: bool = True) -> Batch:
    """Lay a plan out as arrays; ``draw`` allows tokens to be drawn where a request has no more to run."""
    requests = [request for request, _ in plan]
    ends = [request.cached + count for request, count in plan]
    columns = -(-max(ends) // page_size)
    draws = [int(draw and end == request.length) for end, request in zip(ends, requests)]
    return build_batch(
        [request.ids[request.cached : end] for request, end in zip(requests, ends)],
        [request.cached for request in requests],
        tuple([_pages(requests, g, columns) for g in range(len(requests[0].table.rows))]),
        draws=draws,
        sampling=tuple([request.sampling for request in requests]),
        counters=[len(request.tokens) for request in requests],
        history=tuple(
            [
                request.ids[: request.length] if count and request.sampling.has_penalty else NO_IDS
                for request, count in zip(requests, draws)
            ]
        ),
        prompt_lengths=[request.prompt_length for request in requests],
        adapters=[request.adapter for request in requests],
    )


def _pages(requests: list[Request], group: int, columns: int) -> np.ndarray:
    """The page table of a group, int32 [B, columns]: of one request a view."""
    if len(requests) == 1:
        return requests[0].table.rows[group][:columns].reshape(1, columns)
    table = np.full((len(requests), columns), -1, np.int32)
    for b, request in enumerate(requests):
        row = request.table.rows[group][:columns]
        table[b, : len(row)] = row
    return table
