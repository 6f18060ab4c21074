"""No chunk, batch or thread count changes a bit of what the C++ core computes.

Budget: 40 s on two cores.
"""

import functools

import numpy as np
import pytest
from models.native.running import (
    LENGTHS,
    PAGE,
    PATHS,
    WIDE,
    WINDOW,
    Pages,
    Weight,
    in_batches,
    in_chunks,
    make_batch,
    one_pass,
    weights_of,
)
from parity.cases import CASES, tokens

from gemkit.models.native import NativeRunner

MODES = {
    "float32": ("F32", "float32"),
    "q8_0": ("Q8_0", "int8"),
    "mix": ("mix", "int8"),
    "mix_float32": ("mix", "float32"),
    "f16": ("F16", "int8"),
}


@functools.cache
def invariance_case(mode: str, isa: str) -> tuple[dict[str, Weight], list[np.ndarray], list[np.ndarray]]:
    """Weights, one sequence per length, and the logits of each alone in one pass on one thread."""
    kind, activations = MODES[mode]
    weights = weights_of(WIDE, kind, seed=5)
    sequences = [tokens(WIDE, length, 10 + length) for length in LENGTHS]
    runner = NativeRunner(WIDE, weights, threads=1, activations=activations)
    assert runner.path == isa
    return weights, sequences, [one_pass(runner, ids) for ids in sequences]


# The portable path is slow and one source for all modes: fewer of them.
FULL = [(isa, mode, n) for isa in PATHS if isa != "portable" for mode in MODES for n in (1, 2, 3)]
FULL += [("portable", "mix", 1), ("portable", "mix", 3), ("portable", "q8_0", 2), ("portable", "float32", 3)]


@pytest.mark.parametrize("isa, mode, threads", FULL)
def test_chunks_batches_and_threads_change_no_bit(isa, mode, threads, monkeypatch):
    monkeypatch.setenv("GEMKIT_ISA", isa)
    weights, sequences, expected = invariance_case(mode, isa)
    runner = NativeRunner(WIDE, weights, threads=threads, activations=MODES[mode][1])
    for length, ids, want in zip(LENGTHS, sequences, expected, strict=True):
        assert np.array_equal(one_pass(runner, ids), want), f"{length} tokens in one pass"
        got, freed = in_chunks(runner, ids, [1, 5, 17, 40, 3, 64])
        assert np.array_equal(got, want), f"{length} tokens in chunks"
        assert (freed > 0) == (length > WINDOW + PAGE), "pages behind the window are freed"
    got, freed = in_batches(runner, sequences, seed=threads)
    assert freed > 0
    for length, rows, want in zip(LENGTHS, got, expected, strict=True):
        assert np.array_equal(rows, want), f"{length} tokens in a ragged batch"


@pytest.mark.parametrize("isa, mode", dict.fromkeys((isa, mode) for isa, mode, _ in FULL))
def test_token_by_token_equals_one_pass(isa, mode, monkeypatch):
    monkeypatch.setenv("GEMKIT_ISA", isa)
    weights, sequences, expected = invariance_case(mode, isa)
    runner = NativeRunner(WIDE, weights, threads=2, activations=MODES[mode][1])
    ids, want = sequences[3], expected[3]
    got, _ = in_chunks(runner, ids, [WINDOW // 2, *[1] * (len(ids) - WINDOW // 2)])
    assert np.array_equal(got, want)


@pytest.mark.parametrize("name", ["gemma1_2b", "gemma2", "gemma3", "gemma3_27b"])
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_every_generation_is_invariant(name, activations, path):
    """Windows of 12 and 16, soft-caps, other head ratios; Q8_0 fits all these widths."""
    case = CASES[name]
    weights = weights_of(case.config, "Q8_0", case.seed)
    window = min((s.sliding_window for s in case.config.layers if s.sliding_window), default=16)
    sequences = [tokens(case.config, n, 20 + n) for n in (window // 2, window, window + 1, 2 * window, 4 * window)]
    alone = NativeRunner(case.config, weights, threads=1, activations=activations)
    expected = [one_pass(alone, ids) for ids in sequences]
    for threads in (1, 2, 3):
        runner = NativeRunner(case.config, weights, threads=threads, activations=activations)
        for ids, want in zip(sequences, expected, strict=True):
            assert np.array_equal(one_pass(runner, ids), want)
            assert np.array_equal(in_chunks(runner, ids, [1, 5, 13])[0], want)
        for rows, want in zip(in_batches(runner, sequences, seed=threads)[0], expected, strict=True):
            assert np.array_equal(rows, want)


def test_reserving_more_keeps_what_is_cached(path):
    weights, sequences, expected = invariance_case("mix", path)
    runner, ids = NativeRunner(WIDE, weights, threads=2), sequences[3]
    pages = Pages(runner, 3)
    first = runner.logits(make_batch(pages, [(0, ids[:100], 0)]))
    runner.reserve([40, 40])
    second = runner.logits(make_batch(pages, [(0, ids[100:], 100)]))
    assert np.array_equal(np.concatenate([first, second]), expected[3])
    heads = 2 * WIDE.num_key_value_heads * WIDE.head_dim * PAGE * 2
    assert [runner.page_bytes(g) for g in (0, 1)] == [len(group.layers) * heads for group in runner.groups]


def test_a_stale_page_would_be_noticed(path):
    """The invariance tests could not fail if attention ignored the cache: another page gives other logits."""
    weights, sequences, expected = invariance_case("mix", path)
    runner, ids = NativeRunner(WIDE, weights, threads=1), sequences[3]
    pages = Pages(runner, 8)
    runner.logits(make_batch(pages, [(0, ids[:100], 0)]))
    batch = make_batch(pages, [(0, ids[100:], 100)])
    for table in batch.pages:
        table[0, 1] = table[0, -1]
    assert not np.array_equal(runner.logits(batch), expected[3][100:])
