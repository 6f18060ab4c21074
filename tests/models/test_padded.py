"""Ragged batches as padded arrays. Budget: 1 s."""

import numpy as np
import pytest

from gemkit.engine.runner import Batch
from gemkit.engine.sampling import Sampling
from gemkit.models.padded import FAR, TOP, bucket, needs_whole, pad

NO_IDS = np.zeros(0, np.int32)


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


def test_slots_and_positions():
    """Two sequences, pages of 4; the second group has lost its first page to the window."""
    full = np.array([[0, 1, -1], [2, -1, -1]], np.int32)
    window = np.array([[-1, 5, -1], [4, -1, -1]], np.int32)
    batch = Batch(
        tokens=np.array([10, 11, 12, 20], np.int32),
        starts=np.array([0, 3, 4], np.int32),
        positions=np.array([4, 2], np.int32),
        pages=(full, window),
        sample=np.zeros(2, bool),
        sampling=(Sampling(),) * 2,
        counters=np.zeros(2, np.int64),
        history=(NO_IDS,) * 2,
        prompt_lengths=np.zeros(2, np.int32),
    )
    step = pad(batch, 4)
    assert step.tokens.shape == (2, 16)
    assert step.tokens[:, :4].tolist() == [[10, 11, 12, 0], [20, 0, 0, 0]] and not step.tokens[:, 4:].any()
    assert step.positions[:, :4].tolist() == [[4, 5, 6, FAR], [2, FAR, FAR, FAR]]
    assert step.last.tolist() == [2, 0] and step.rows.tolist() == [0, 1, 2, 16]
    # Page p of the batch is page p + 1 of the storage; page 0 takes what padding writes
    assert step.write[0][:, :4].tolist() == [[8, 9, 10, 0], [14, 0, 0, 0]]
    assert step.write[1][:, :4].tolist() == [[24, 25, 26, 0], [22, 0, 0, 0]]
    for read, seen, pages in zip(step.read, step.seen, (full, window), strict=True):
        assert read.shape == seen.shape and (seen == FAR).any(1).all()
        for b, last in enumerate((6, 2)):
            known = {int(s): int(p) for s, p in zip(read[b], seen[b], strict=True) if p != FAR}
            first = 4 * int(np.flatnonzero(pages[b] >= 0)[0])
            assert known == {4 * (int(pages[b, p // 4]) + 1) + p % 4: p for p in range(first, last + 1)}
    assert set(step.read[1][1][4:]) <= set(range(4))


@pytest.mark.parametrize(
    "sampling, whole",
    [
        (Sampling(), False),
        (Sampling(temperature=1.0, top_k=64), False),
        (Sampling(temperature=1.0, top_k=TOP + 1), True),
        (Sampling(temperature=1.0), True),
        (Sampling(repetition_penalty=1.1), True),
        (Sampling(logit_bias=((3, 1.0),)), True),
    ],
)
def test_when_the_largest_logits_are_enough(sampling, whole):
    assert needs_whole(sampling) == whole
