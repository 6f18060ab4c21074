"""Pages: windows, growth, limits, exact books. Budget: 8 s."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemkit.engine.interface import PageGroup
from gemkit.engine.pages import PageAllocator, PageTable, first_visible_page, limits_for
from gemkit.errors import GemkitError


def allocator(windows=(None, 8), size=4, limits=(20, 20), reserve=lambda pages: None) -> PageAllocator:
    return PageAllocator([PageGroup(w, (g,)) for g, w in enumerate(windows)], size, limits, reserve)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_first_visible_page_is_the_first_with_a_visible_position(window: int, size: int):
    for query in range(60):
        visible = [j for j in range(query + 1) if 0 <= query - j < window]
        assert first_visible_page(window, query, size) == visible[0] // size
        assert first_visible_page(None, query, size) == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1, max_size=25))
def test_a_table_holds_what_is_visible_and_no_page_more(window: int, size: int, chunks: list[int]):
    pages = allocator((None, window), size, (300, 300))
    table, cached, most = PageTable(2, 300), 0, 0
    for count in chunks:
        assert pages.extend(table, cached + count)
        held = [{c for c, page in enumerate(row) if page >= 0} for row in table.rows]
        most = max(most, len(held[1]))
        assert held[0] == set(range(-(-(cached + count) // size)))
        seen = {j // size for q in range(cached, cached + count) for j in range(max(0, q - window + 1), q + 1)}
        assert held[1] == seen, "exactly the pages that the step's queries see"
        cached += count
        pages.trim(table, cached)
        assert (
            min((c for c, page in enumerate(table.rows[1]) if page >= 0), default=cached)
            >= (cached - window + 1) // size
        )
    assert most <= pages.peak(1, cached, max(chunks))
    assert pages.peak(0, cached, 9) == pages.used(0)
    pages.release(table)
    assert pages.used(0) == pages.used(1) == 0 and all((row == -1).all() for row in table.rows)
    assert table.first == table.end == [0, 0]


def test_peak_is_reached():
    """The bound on a local group's pages is tight for the worst alignment."""
    for window, size, chunk in [(8, 4, 3), (5, 4, 4), (1, 2, 1), (9, 3, 7)]:
        pages = allocator((window,), size, (1000,))
        most = 0
        for first in range(1, chunk + 1):
            table = PageTable(1, 400)
            cached, count = 0, first
            for _ in range(60):
                pages.extend(table, cached + count)
                most = max(most, table.end[0] - table.first[0])
                cached, count = cached + count, chunk
                pages.trim(table, cached)
            pages.release(table)
        assert most == pages.peak(0, 10**6, chunk)


def test_growth_keeps_to_the_limits_and_takes_all_or_nothing():
    asked = []
    pages = allocator((None, 8), 4, (10, 6), asked.append)
    a, b = PageTable(2, 20), PageTable(2, 20)
    assert pages.extend(a, 4) and asked == [[1, 1]]
    assert pages.extend(a, 12) and asked[-1] == [3, 3]
    assert pages.extend(a, 16) and asked[-1] == [6, 6], "doubles, up to the limit"
    assert not pages.extend(b, 12), "three pages of the second group are too many"
    assert pages.used(0) == 4 and pages.used(1) == 4 and b.end == [0, 0]
    assert pages.available(0) == 6 and pages.available(1) == 2
    assert pages.extend(b, 8) and pages.capacity == [6, 6]
    ids = {page for table in (a, b) for page in table.rows[1].tolist() if page >= 0}
    assert len(ids) == 6
    pages.trim(a, 16)
    assert pages.available(1) == 2 and a.rows[1].tolist()[:4].count(-1) == 2


def test_a_refused_reserve_becomes_the_limit():
    def reserve(counts):
        if max(counts) > 4:
            raise GemkitError("memory is short")

    pages = allocator((None,), 4, (100,), reserve)
    a, b = PageTable(1, 50), PageTable(1, 50)
    assert pages.extend(a, 12)
    assert not pages.extend(b, 40) and str(pages.shortage) == "memory is short"
    assert pages.limits == [12], "13 were refused"
    pages.release(a)
    assert pages.extend(b, 16) and not pages.extend(b, 17) and pages.limits == [4]


def test_giving_back_twice_is_an_invariant_violation():
    pages = allocator((None,), 4, (10,))
    table = PageTable(1, 10)
    pages.extend(table, 8)
    row = table.rows[0].copy()
    pages.release(table)
    table.rows[0][:] = row
    table.end[0] = 2
    with pytest.raises(AssertionError, match="given back twice"):
        pages.release(table)


class Sharers:
    """Sequences that write their tokens into pages, restart and share pages, as requests do in the engine."""

    def __init__(self, window: int, size: int) -> None:
        self.size, self.windows = size, (None, window)
        self.pages = allocator(self.windows, size, (14, 12))
        self.cache: list[dict[tuple[int, int], int]] = [{}, {}]  # (page, offset) to token
        self.tables = [PageTable(2, 40) for _ in range(4)]
        self.tokens: list[list[int]] = [[] for _ in self.tables]
        self.pinned: list[tuple[int, int]] = []
        self.clock = 0

    def run(self, i: int, count: int) -> None:
        table, tokens = self.tables[i], self.tokens[i]
        count = min(count, 40 * self.size - len(tokens))
        if not self.pages.extend(table, len(tokens) + count):
            self.stop(i)  # as a preemption
            return
        for _ in range(count):
            self.clock += 1
            for g in range(2):
                page = int(table.rows[g][len(tokens) // self.size])
                assert self.pages._counts[g][page] == 1, "a shared page is written"
                self.cache[g][page, len(tokens) % self.size] = self.clock
            tokens.append(self.clock)
        self.pages.trim(table, len(tokens))

    def stop(self, i: int) -> None:
        self.pages.release(self.tables[i])
        self.tokens[i].clear()

    def fork(self, i: int, j: int, length: int) -> None:
        if i == j:
            return
        self.stop(j)
        length = min(length, len(self.tokens[i]))
        known = self.pages.share(self.tables[i], self.tables[j], length)
        oldest = [max(0, length // self.size * self.size - w + 1) if w else 0 for w in self.windows]
        gone = any(o // self.size < held for o, held in zip(oldest, self.tables[i].first))
        assert known == (0 if gone else length // self.size * self.size)
        self.tokens[j] = self.tokens[i][:known]

    def pin(self, i: int, number: int) -> None:
        """A cache of prefixes holds a full page for a while, whatever becomes of the sequence."""
        if number % 2 and self.pinned:
            g, page = self.pinned.pop(number % len(self.pinned))
            self.pages.release_pages(g, [page])
            return
        full = len(self.tokens[i]) // self.size
        held = [(g, int(page)) for g, row in enumerate(self.tables[i].rows) for page in row[:full] if page >= 0]
        if held:
            self.pinned.append(held[number % len(held)])
            self.pages.retain(self.pinned[-1][0], [self.pinned[-1][1]])

    def restart(self) -> None:
        self.pages.reset()
        for table, tokens in zip(self.tables, self.tokens):
            table.clear()
            tokens.clear()
        self.pinned.clear()

    def check(self) -> None:
        for g, window in enumerate(self.windows):
            holders = [int(page) for table in self.tables for page in table.rows[g] if page >= 0]
            holders += [page for group, page in self.pinned if group == g]
            counts = [holders.count(page) for page in range(self.pages.capacity[g])]
            assert self.pages._counts[g] == counts
            assert sorted(self.pages._free[g]) == [page for page, count in enumerate(counts) if not count]
            assert self.pages.used(g) == len(set(holders)) <= self.pages.limits[g]
            for table, tokens in zip(self.tables, self.tokens):
                oldest = max(0, len(tokens) - window + 1) if window else 0  # that the next query sees
                found = [
                    self.cache[g][int(table.rows[g][p // self.size]), p % self.size] for p in range(oldest, len(tokens))
                ]
                assert found == tokens[oldest:], "a visible position was lost or overwritten"


ACTIONS = st.one_of(
    st.tuples(st.just("run"), st.integers(0, 3), st.integers(1, 12)),
    st.tuples(st.just("fork"), st.integers(0, 3), st.integers(0, 3), st.integers(0, 60)),
    st.tuples(st.just("stop"), st.integers(0, 3)),
    st.tuples(st.just("pin"), st.integers(0, 3), st.integers(0, 99)),
    st.tuples(st.just("restart")),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 14), st.integers(1, 5), st.lists(ACTIONS, max_size=40))
def test_shared_pages_are_counted_and_never_written(window: int, size: int, actions: list[tuple]):
    sharers = Sharers(window, size)
    for name, *arguments in actions:
        getattr(sharers, name)(*arguments)
        sharers.check()


def test_a_fork_shares_full_pages_until_the_last_holder_ends():
    pages = allocator((None, 8), 4)
    source, fork = PageTable(2, 20), PageTable(2, 20)
    pages.extend(source, 10)
    assert pages.share(source, fork, 10) == 8
    assert fork.rows[0].tolist()[:3] == [*source.rows[0][:2].tolist(), -1] and pages.used(0) == 3
    pages.extend(fork, 10)
    assert pages.used(0) == 4 and fork.rows[0][2] != source.rows[0][2]
    pages.release(source)
    assert pages.used(0) == 3, "the fork still has the shared pages"
    pages.release(fork)
    assert pages.used(0) == pages.used(1) == 0


def test_a_fork_needs_the_pages_of_its_window():
    pages = allocator((None, 8), 4)
    source, fork = PageTable(2, 20), PageTable(2, 20)
    pages.extend(source, 40)
    pages.trim(source, 40)
    assert pages.share(source, fork, 24) == 0 and fork.end == [0, 0] and pages.used(0) == 10
    assert pages.share(source, fork, 40) == 40 and fork.first == [0, 8]


def test_free_pages_are_not_shared():
    pages = allocator((None,), 4, (10,))
    table = PageTable(1, 10)
    pages.extend(table, 8)
    row = table.rows[0][:2].tolist()
    pages.release(table)
    with pytest.raises(AssertionError, match="a free page is shared"):
        pages.retain(0, row)


def test_limits():
    groups = [PageGroup(None, (0,)), PageGroup(8, (1, 2))]
    # 100 positions: 25 pages; a window of 8 with chunks of 16: at most 7 pages.
    assert limits_for(groups, 4, [10, 20], 100, 16, 3, None) == [75, 21]
    assert limits_for(groups, 4, [10, 20], 100, 16, 3, 390) == [25, 7]
    assert limits_for(groups, 4, [10, 20], 100, 16, 3, 780) == [50, 14]
    assert limits_for(groups, 4, [10, 20], 100, 16, 3, 10**9) == [75, 21]
    with pytest.raises(GemkitError, match="needs 390 bytes of cache and 389 are allowed: load with a smaller ctx_size"):
        limits_for(groups, 4, [10, 20], 100, 16, 3, 389)
