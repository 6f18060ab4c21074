"""Ragged batches as padded arrays. Budget: 1 s."""

import numpy as np

from gemkit.engine.interface import Batch, StepResult, build_batch
from gemkit.engine.sampling import Sampling
from gemkit.models.frameworks.batch import FAR, bucket, in_parts, pad, part, quarter, split, unpack

NO_IDS = np.zeros(0, np.int32)


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


def test_slots_and_positions():
    """Two sequences, pages of 4; the second group has lost its first page to the window."""
    full = np.array([[0, 1, -1], [2, -1, -1]], np.int32)
    window = np.array([[-1, 5, -1], [4, -1, -1]], np.int32)
    tokens = [np.array([10, 11, 12], np.int32), np.array([20], np.int32)]
    batch = build_batch(tokens, [4, 2], (full, window))
    step = pad(batch, 4)
    assert step.tokens.shape == (2, 16)
    assert step.tokens[:, :4].tolist() == [[10, 11, 12, 0], [20, 0, 0, 0]] and not step.tokens[:, 4:].any()
    assert step.positions[:, :4].tolist() == [[4, 5, 6, FAR], [2, FAR, FAR, FAR]]
    assert step.rows.tolist() == [0, 1, 2, 16]
    # Page p of the batch is page p + 1 of the storage; page 0 is the padding page
    assert step.write[0][:, :4].tolist() == [[8, 9, 10, 0], [14, 0, 0, 0]]
    assert step.write[1][:, :4].tolist() == [[24, 25, 26, 0], [22, 0, 0, 0]]
    for read, seen, pages in zip(step.read, step.read_positions, (full, window), strict=True):
        assert read.shape == seen.shape and (seen == FAR).any(1).all()
        for b, last in enumerate((6, 2)):
            known = {int(s): int(p) for s, p in zip(read[b], seen[b], strict=True) if p != FAR}
            first = 4 * int(np.flatnonzero(pages[b] >= 0)[0])
            assert known == {4 * (int(pages[b, p // 4]) + 1) + p % 4: p for p in range(first, last + 1)}
    assert set(step.read[1][1][4:]) <= set(range(4))


def test_quarters():
    sizes = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40]
    assert sorted({quarter(n) for n in range(1, 41)}) == sizes
    assert all(n <= quarter(n) <= 1.25 * n + 1 for n in range(1, 1000))


def ragged(counts, firsts=None, page_size=4) -> Batch:
    firsts = np.array(firsts if firsts is not None else [0] * len(counts), np.int32)
    columns = int((firsts + counts).max() - 1) // page_size + 1
    table = np.arange(len(counts) * columns, dtype=np.int32).reshape(len(counts), columns)
    return build_batch(
        np.split(np.arange(sum(counts), dtype=np.int32), np.cumsum(counts)[:-1]),
        firsts,
        (table,),
        draws=[1] * len(counts),
        sampling=tuple(Sampling(seed=b) for b in range(len(counts))),
        counters=range(len(counts)),
        prompt_lengths=range(len(counts)),
    )


def test_one_array_holds_a_step():
    step = pad(ragged([3, 1, 7], [5, 0, 2]), 4)
    tokens, positions, slots = unpack(step.flat(), step.sizes)
    assert step.flat().dtype == np.int32 and step.sizes == (4, 16, (step.read[0].shape[1],))
    for found, wanted in ((tokens, step.tokens), (positions, step.positions)):
        assert np.array_equal(found, wanted)
    for found, wanted in zip(slots[0], (step.write[0], step.read[0], step.read_positions[0]), strict=True):
        assert np.array_equal(found, wanted)


def test_a_window_needs_no_more_pages_than_it_spans():
    """Position 40, a window of 16, pages of 4: at most 5 pages, and one for padding."""
    batch = ragged([1], [40])
    batch.pages[0][0, :6] = -1
    assert pad(batch, 4).sizes == (1, 1, (32,))
    assert pad(batch, 4, [16]).sizes == (1, 1, (24,))
    assert pad(ragged([1], [40]), 4, [16]).sizes == (1, 1, (64,)), "a table that was not trimmed is read whole"
    assert pad(ragged([1], [40]), 4, rounded=quarter).sizes == (1, 1, (48,))


def test_tokens_are_split_from_long_chunks():
    assert [rows.tolist() for rows in split(ragged([1, 200, 1]))] == [[1], [0, 2]]
    for counts in ([1, 1, 1], [200, 100], [1, 30], [7]):
        assert [rows.tolist() for rows in split(ragged(counts))] == [list(range(len(counts)))]


def test_a_part_has_its_own_masks_and_targets():
    batch = ragged([2, 200, 3], [3, 0, 9])
    batch.draws[:] = [2, 1, 2]
    batch.masks = tuple(np.array([r], np.uint32) for r in range(5))
    batch.targets = np.arange(205, dtype=np.int32)
    some = part(batch, np.array([0, 2]))
    assert some.draws.tolist() == [2, 2] and [int(mask[0]) for mask in some.masks] == [0, 1, 3, 4]
    assert some.targets.tolist() == [0, 1, 202, 203, 204] == some.tokens.tolist()


def test_parts_are_put_together_again():
    batch = ragged([1, 200, 1, 150], [3, 0, 9, 4])
    seen = []

    def step(some: Batch) -> StepResult:
        seen.append(some)
        width = 1 if len(seen) == 1 else 2
        seeds = np.array([s.seed for s, count in zip(some.sampling, some.draws) if count], np.int32)
        tops = np.repeat(seeds[:, None], width, 1)
        return StepResult(seeds, seeds / 2, tops, tops / np.float32(2))

    whole = in_parts(step, batch)
    assert [np.diff(some.starts).tolist() for some in seen] == [[200, 150], [1, 1]]
    assert seen[0].tokens.tolist() == [*range(1, 201), *range(202, 352)] and seen[1].tokens.tolist() == [0, 201]
    assert seen[1].positions.tolist() == [3, 9] and seen[1].prompt_lengths.tolist() == [0, 2]
    assert whole.tokens.tolist() == [0, 1, 2, 3] and whole.logprobs.tolist() == [0, 0.5, 1, 1.5]
    assert whole.top_ids.tolist() == [[0, 0], [1, -1], [2, 2], [3, -1]]
    assert whole.top_logprobs[1].tolist() == [0.5, -np.inf]
    batch.draws[[1, 2]] = 0
    seen.clear()
    assert in_parts(step, batch).tokens.tolist() == [0, 3], "a row per draw, in the order of the batch"
    again = part(batch, np.arange(4))
    assert np.array_equal(again.tokens, batch.tokens) and np.array_equal(again.pages[0], batch.pages[0])
