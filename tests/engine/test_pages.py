"""Pages: windows, growth, limits, exact books. Budget: 3 s."""

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


def test_limits():
    groups = [PageGroup(None, (0,)), PageGroup(8, (1, 2))]
    # 100 positions: 25 pages; a window of 8 with chunks of 16: at most 7 pages.
    assert limits_for(groups, 4, [10, 20], 100, 16, 3, None) == [75, 21]
    assert limits_for(groups, 4, [10, 20], 100, 16, 3, 390) == [25, 7]
    assert limits_for(groups, 4, [10, 20], 100, 16, 3, 780) == [50, 14]
    assert limits_for(groups, 4, [10, 20], 100, 16, 3, 10**9) == [75, 21]
    with pytest.raises(GemkitError, match="needs 390 bytes of cache and 389 are allowed: load with a smaller ctx_size"):
        limits_for(groups, 4, [10, 20], 100, 16, 3, 389)
