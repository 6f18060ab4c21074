"""Batches as the builder lays them out, and the draws that runners refuse. Budget: 5 s."""

import numpy as np
import pytest

from gemkit.engine.interface import GREEDY, build_batch
from gemkit.engine.sampling import Sampling

TABLES = (np.array([[0, 1], [2, -1]], np.int32), np.array([[-1, 5], [4, -1]], np.int32))


def test_defaults_are_greedy_sequences_without_draws():
    batch = build_batch([np.array([7, 8, 9], np.int32), np.array([6], np.int32)], [4, 0], TABLES)
    assert batch.tokens.tolist() == [7, 8, 9, 6] and batch.starts.tolist() == [0, 3, 4]
    assert batch.positions.tolist() == [4, 0] and batch.pages is TABLES
    assert batch.draws.tolist() == batch.counters.tolist() == batch.prompt_lengths.tolist() == [0, 0]
    assert batch.sampling == (GREEDY, GREEDY) and [len(ids) for ids in batch.history] == [0, 0]
    assert batch.adapters is None and batch.masks == () and batch.targets is None
    for array in (batch.tokens, batch.starts, batch.positions, batch.draws, batch.prompt_lengths):
        assert array.dtype == np.int32
    assert batch.counters.dtype == np.int64


@pytest.mark.parametrize("size", [1, 2])
def test_values_go_to_their_sequences(size: int):
    tokens = [np.array([7, 8], np.int32), np.array([6], np.int32)][:size]
    values = [(3, 1), (1, 0), (2**40, 5), (2, 1), (-1, 1)]
    positions, draws, counters, lengths, adapters = (list(row[:size]) for row in values)
    settings, histories = (Sampling(seed=1), Sampling(seed=2))[:size], tuple(tokens)
    batch = build_batch(
        tokens,
        positions,
        tuple(table[:size] for table in TABLES),
        draws=draws,
        sampling=settings,
        counters=counters,
        history=histories,
        prompt_lengths=lengths,
        adapters=adapters,
    )
    assert (batch.positions.tolist(), batch.draws.tolist(), batch.counters.tolist()) == (positions, draws, counters)
    assert batch.prompt_lengths.tolist() == lengths and batch.sampling == settings and batch.history == histories
    assert (batch.adapters is None) if size == 1 else (batch.adapters.tolist() == [-1, 1])
    assert np.shares_memory(batch.tokens, tokens[0]) == (size == 1)
