"""Pages of the cache: allocation, reference counts, windows.

Every page group has pages of its own. A sequence takes pages as its tokens run and, in a group with a window of W,
gives one back as soon as no query that is still to come can see it: when the next query is at position n, positions up
to n - W are out of sight. Pages are append-only: a full page is never written again, so that sequences may share it.
A page is free when its reference count is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gemkit.engine.interface import PageGroup
from gemkit.errors import GemkitError


def first_visible_page(window: int | None, position: int, page_size: int) -> int:
    """Index of the first page that a query at ``position`` or later can see."""
    return 0 if window is None else max(0, position - window + 1) // page_size


class PageTable:
    """The pages of one sequence: per group a row of page ids, -1 where there is none.

    rows: int32 [columns] per group; row[p // page_size] holds position p.
    first, end: per group, the columns first <= c < end hold pages.
    """

    __slots__ = ("end", "first", "rows")

    def __init__(self, groups: int, columns: int) -> None:
        self.rows = [np.full(columns, -1, np.int32) for _ in range(groups)]
        self.first = [0] * groups
        self.end = [0] * groups

    def clear(self) -> None:
        """Forget all pages without giving them back."""
        for row in self.rows:
            row.fill(-1)
        self.first = [0] * len(self.rows)
        self.end = [0] * len(self.rows)


class PageAllocator:
    """Hand out pages, and grow the cache when it is needed.

    groups, page_size: as in the runner.
    limits: the most pages per group there may ever be.
    reserve: allocates this many pages per group (`Runner.reserve`).
    """

    def __init__(
        self,
        groups: Sequence[PageGroup],
        page_size: int,
        limits: Sequence[int],
        reserve: Callable[[Sequence[int]], None],
    ) -> None:
        assert len(groups) == len(limits) and all(limit > 0 for limit in limits)
        self.groups = tuple(groups)
        self.page_size = page_size
        self.limits = list(limits)
        self.capacity = [0] * len(groups)
        self.shortage: GemkitError | None = None
        self._reserve = reserve
        self._free: list[list[int]] = [[] for _ in groups]
        self._counts: list[list[int]] = [[] for _ in groups]  # holders of each page

    def used(self, group: int) -> int:
        """Pages of a group that are held, a shared one counted once."""
        return self.capacity[group] - len(self._free[group])

    def available(self, group: int) -> int:
        """Pages of a group that can still be handed out, with growth."""
        return self.limits[group] - self.used(group)

    def peak(self, group: int, tokens: int, chunk: int) -> int:
        """The most pages that a sequence holds at once while its first ``tokens`` positions run in chunks."""
        size, window = self.page_size, self.groups[group].window
        pages = -(-tokens // size)
        return pages if window is None else min(pages, (window - 1 + chunk + 2 * size - 2) // size)

    def extend(self, table: PageTable, length: int) -> bool:
        """Give a sequence pages up to ``length`` positions in all groups; False, and nothing, if they run short."""
        columns = -(-length // self.page_size)
        need = [max(0, columns - end) for end in table.end]
        if not any(need):
            return True
        if not self._has_free(need):
            return False
        for g, count in enumerate(need):
            if count:
                free, counts, row, end = self._free[g], self._counts[g], table.rows[g], table.end[g]
                for column in range(end, end + count):
                    page = free.pop()
                    assert not counts[page], "a page is handed out twice"
                    counts[page] = 1
                    row[column] = page
                table.end[g] = end + count
        return True

    def share(self, source: PageTable, table: PageTable, length: int) -> int:
        """Give an empty table the full pages of another's first ``length`` positions, as far as they are in sight.

        All these positions must be in the cache.

        Returns how many positions need not run again: a multiple of the page size, since the last page is shared only
        if it is full; copying a partial page is up to the caller. 0, and no pages, if one that is in sight from there
        has left the source's window.
        """
        assert not any(table.end) and length <= min(source.end) * self.page_size
        end = length // self.page_size
        firsts = [first_visible_page(group.window, end * self.page_size, self.page_size) for group in self.groups]
        if any(first < held for first, held in zip(firsts, source.first)):
            return 0
        for g, first in enumerate(firsts):
            self.retain(g, source.rows[g][first:end].tolist())
            table.rows[g][first:end] = source.rows[g][first:end]
            table.first[g], table.end[g] = first, end
        return end * self.page_size

    def retain(self, group: int, pages: Iterable[int]) -> None:
        """Add a holder to pages that are held; each calls `release_pages` once."""
        counts = self._counts[group]
        for page in pages:
            assert page >= 0 and counts[page], "a free page is shared"
            counts[page] += 1

    def release_pages(self, group: int, pages: Iterable[int]) -> None:
        """Remove a holder from pages; those without any are free."""
        counts, free = self._counts[group], self._free[group]
        for page in pages:
            assert page >= 0 and counts[page], "a page is given back twice"
            counts[page] -= 1
            if not counts[page]:
                free.append(page)

    def trim(self, table: PageTable, position: int) -> None:
        """Take back the pages that no query at ``position`` or later sees."""
        for g, group in enumerate(self.groups):
            if group.window is not None:
                first = first_visible_page(group.window, position, self.page_size)
                if first > table.first[g]:
                    self._release(g, table, first)

    def release(self, table: PageTable) -> None:
        """Take back all pages of a sequence and leave its table as new."""
        for g in range(len(self.groups)):
            self._release(g, table, table.end[g])
            table.first[g] = table.end[g] = 0

    def reset(self) -> None:
        """Take back all pages, whatever their counts: tables and retained pages must be forgotten with it."""
        self._free = [list(range(capacity - 1, -1, -1)) for capacity in self.capacity]
        self._counts = [[0] * capacity for capacity in self.capacity]

    def _release(self, g: int, table: PageTable, first: int) -> None:
        held = table.rows[g][table.first[g] : min(first, table.end[g])]
        self.release_pages(g, held.tolist())
        held.fill(-1)
        table.first[g] = first
        assert first <= table.end[g]

    def _has_free(self, need: Sequence[int]) -> bool:
        """Return whether this many pages per group are free, after growing the cache if needed."""
        if all(count <= len(free) for count, free in zip(need, self._free)):
            return True
        if any(count > self.available(g) for g, count in enumerate(need)):
            return False
        capacity = self._grow(need)
        if capacity is None:
            return False
        for g, new in enumerate(capacity):
            old = self.capacity[g]
            self._free[g][:0] = range(new - 1, old - 1, -1)
            self._counts[g] += [0] * (new - old)
        self.capacity = capacity
        return True

    def _grow(self, need: Sequence[int]) -> list[int] | None:
        """Reserve this many more pages, if possible as many again as it has; None if memory is short."""
        for factor in (2, 1):
            capacity = list(self.capacity)
            for g, count in enumerate(need):
                if count > len(self._free[g]):
                    capacity[g] = min(self.limits[g], max(self.used(g) + count, factor * capacity[g]))
            try:
                self._reserve(capacity)
                return capacity
            except GemkitError as error:
                self.shortage = error
        # The machine's limit is below ours: do not ask for as much again.
        self.limits = [
            limit if new == old else new - 1 for limit, new, old in zip(self.limits, capacity, self.capacity)
        ]
        return None


def limits_for(
    groups: Sequence[PageGroup],
    page_size: int,
    page_bytes: Sequence[int],
    context_size: int,
    chunk: int,
    max_sequences: int,
    cache_bytes: int | None,
) -> list[int]:
    """Return the maximum pages per group: for ``max_sequences`` full contexts, or what fits in ``cache_bytes``.

    Raises GemkitError if not even one full context fits.
    """
    probe = PageAllocator(groups, page_size, [1] * len(groups), lambda pages: None)
    one = [probe.peak(g, context_size, chunk) for g in range(len(groups))]
    if cache_bytes is None:
        return [count * max_sequences for count in one]
    size = sum(count * width for count, width in zip(one, page_bytes))
    if cache_bytes < size:
        raise GemkitError(
            f"a context of {context_size} tokens needs {size:,} bytes of cache and {cache_bytes:,} are allowed: "
            "load with a smaller ctx_size"
        )
    return [count * min(cache_bytes, size * max_sequences) // size for count in one]
