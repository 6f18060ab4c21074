"""Who runs in the next step, and with how many tokens.

Continuous batching: sequences that decode come first, one token each; what is left of the step's budget goes to
prompts, oldest first, cut into chunks. A waiting sequence is admitted when pages for its whole prompt are to be had. If
pages run out later, the youngest running sequence gives up its pages and starts over from its tokens, the generated
ones included. Runners are exact and random numbers are counted, so that no one can tell from the result.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from gemkit.engine.interface import Batch
from gemkit.engine.pages import PageAllocator
from gemkit.engine.request import NO_HISTORY, Sequence

Plan = list[tuple[Sequence, int]]


class Scheduler:
    """First come, first served.

    max_tokens: the most new tokens in a step. max_sequences: the most sequences that run at once.
    """

    def __init__(self, allocator: PageAllocator, max_tokens: int, max_sequences: int) -> None:
        # Otherwise sequences that decode could use up the step and starve a prompt.
        assert 0 < max_sequences <= max_tokens
        self.allocator = allocator
        self.max_tokens = max_tokens
        self.max_sequences = max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def __bool__(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Plan:
        """Returns the sequences of the next step with their numbers of new tokens; their pages are theirs already."""
        plan: Plan = []
        running = tuple(self.running)
        budget = self.max_tokens
        for sequence in running:
            if sequence.length - sequence.cached == 1 and self._extend(sequence, 1):
                plan.append((sequence, 1))
                budget -= 1
        for sequence in running:
            count = min(sequence.length - sequence.cached, budget)
            if count > 0 and sequence.length - sequence.cached > 1 and self._extend(sequence, count):
                plan.append((sequence, count))
                budget -= count
        if len(self.running) < len(running):
            # Victims are the youngest: none has its place in the plan yet, and none is admitted in this step.
            assert all(sequence.cached for sequence, _ in plan)
            return plan
        while self.waiting and budget and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            count = min(sequence.length, budget)
            if not self._fits(sequence) or not self.allocator.extend(sequence.table, count):
                break
            # In this order, so that an interrupt in between loses nobody.
            self.running.append(sequence)
            self.waiting.popleft()
            plan.append((sequence, count))
            budget -= count
        return plan

    def advance(self, sequence: Sequence, count: int) -> None:
        """Notes that a sequence's next ``count`` tokens are in the cache and takes back the pages out of sight."""
        sequence.cached += count
        self.allocator.trim(sequence.table, sequence.cached)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out and its pages back; nothing happens if it is gone already."""
        self.allocator.release(sequence.table)
        sequence.cached = 0
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Sends a running sequence back to the head of the queue without its pages."""
        self.allocator.release(sequence.table)
        sequence.cached = 0
        sequence.preemptions += 1
        self.waiting.appendleft(sequence)
        self.running.remove(sequence)

    def preempt_all(self) -> None:
        while self.running:
            self.preempt(self.running[-1])

    def restart(self) -> None:
        """Mends any half-done change: all pages are free, all unfinished sequences wait, in their order."""
        sequences = dict.fromkeys([*self.running, *self.waiting])
        self.allocator.reset()
        for sequence in sequences:
            sequence.table.clear()
            sequence.cached = 0
        self.running = []
        self.waiting = deque(sequence for sequence in sequences if not sequence.finished)

    def _extend(self, sequence: Sequence, count: int) -> bool:
        """Gets the pages for a running sequence's next tokens; False if it was preempted."""
        # Whoever runs has something in the cache, so that cached = 0 tells a preempted sequence.
        while sequence.cached:
            if self.allocator.extend(sequence.table, sequence.cached + count):
                return True
            assert len(self.running) > 1 or self.allocator.shortage, "a context must fit in the cache"
            self.preempt(self.running[-1])
        return False

    def _fits(self, sequence: Sequence) -> bool:
        """Whether the pages of a sequence's known tokens and one more are left, beyond what running ones will need."""
        allocator = self.allocator
        for g in range(len(allocator.groups)):
            promised = 0
            for other in (*self.running, sequence):
                peak = allocator.peak(g, min(other.length + 1, other.limit), self.max_tokens)
                # One page more for each that decodes, so that an admission is not undone at once.
                held = other.table.end[g] - other.table.first[g]
                promised += max(0, peak - held) + (other is not sequence)
            if promised > allocator.available(g):
                return False
        return True


def make_batch(plan: Plan, page_size: int, draw: bool = True) -> Batch:
    """Lays a plan out as arrays; ``draw`` allows tokens to be drawn where a sequence has no more to run."""
    if len(plan) == 1:
        return _single(*plan[0], page_size, draw)
    size = len(plan)
    sequences = [sequence for sequence, _ in plan]
    starts = np.zeros(size + 1, np.int32)
    np.cumsum([count for _, count in plan], out=starts[1:])
    positions = np.array([sequence.cached for sequence in sequences], np.int32)
    ends = [sequence.cached + count for sequence, count in plan]
    columns = -(-max(ends) // page_size)
    pages = []
    for g in range(len(sequences[0].table.rows)):
        table = np.full((size, columns), -1, np.int32)
        for b, sequence in enumerate(sequences):
            row = sequence.table.rows[g][:columns]
            table[b, : len(row)] = row
        pages.append(table)
    sample = [draw and end == sequence.length for end, sequence in zip(ends, sequences)]
    adapters = [sequence.adapter for sequence in sequences]
    return Batch(
        tokens=np.concatenate([sequence.ids[sequence.cached : end] for sequence, end in zip(sequences, ends)]),
        starts=starts,
        positions=positions,
        pages=tuple(pages),
        sample=np.array(sample),
        sampling=tuple(sequence.sampling for sequence in sequences),
        counters=np.array([len(sequence.tokens) for sequence in sequences], np.int64),
        history=tuple(_history(sequence, drawn) for sequence, drawn in zip(sequences, sample)),
        prompt_lengths=np.array([sequence.prompt_length for sequence in sequences], np.int32),
        adapters=np.array(adapters, np.int32) if max(adapters) >= 0 else None,
    )


def _single(sequence: Sequence, count: int, page_size: int, draw: bool) -> Batch:
    """The batch of one sequence, all of whose large arrays are views."""
    start, end = sequence.cached, sequence.cached + count
    columns = -(-end // page_size)
    sample = draw and end == sequence.length
    return Batch(
        sequence.ids[start:end],
        np.array((0, count), np.int32),
        np.array((start,), np.int32),
        tuple([row[:columns].reshape(1, columns) for row in sequence.table.rows]),
        np.array((sample,)),
        (sequence.sampling,),
        np.array((len(sequence.tokens),), np.int64),
        (_history(sequence, sample),),
        np.array((sequence.prompt_length,), np.int32),
        np.array((sequence.adapter,), np.int32) if sequence.adapter >= 0 else None,
    )


def _history(sequence: Sequence, drawn: bool) -> np.ndarray:
    return sequence.ids[: sequence.length] if drawn and sequence.sampling.has_penalty else NO_HISTORY
