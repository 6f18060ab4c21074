"""The C++ core behind `NativeRunner`: parity, invariance by bit equality, quantised weights, sampling, bad input.

Budget: 90 s on two cores. Every test runs on every kernel path that this processor has.
"""

import dataclasses
import functools
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from parity.cases import CASES, random_params, tokens
from parity.tolerances import (
    NATIVE_FLOAT32,
    NATIVE_INT8_CACHE,
    NATIVE_INT8_MATRICES,
    NATIVE_LOGPROB,
    relative_error,
)

from gemkit import _native
from gemkit.arch import reference
from gemkit.arch.config import LayerSpec, ModelConfig
from gemkit.engine.runner import Batch
from gemkit.engine.sampling import Sampling, log_softmax, sample
from gemkit.errors import GemkitError, UsageError
from gemkit.models.native import NativeRunner, kernel_path
from gemkit.models.native.plan import build_plan

PAGE = _native.page_positions
NO_IDS = np.zeros(0, np.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Kernel paths


def paths_here() -> list[str]:
    """The kernel paths that this processor runs, the portable one always among them."""
    before, found = os.environ.get("GEMKIT_ISA"), []
    for name in ("portable", "avx2", "avx512"):
        os.environ["GEMKIT_ISA"] = name
        try:
            assert kernel_path() == name
            found.append(name)
        except UsageError as error:
            assert name != "portable" and "lacks" in str(error), error
    os.environ.pop("GEMKIT_ISA")
    if before is not None:
        os.environ["GEMKIT_ISA"] = before
    return found


PATHS = paths_here()


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> str:
    monkeypatch.setenv("GEMKIT_ISA", request.param)
    return request.param


# ---------------------------------------------------------------------------------------------------------------------
# Weights: float32 arrays, and blocks of random bytes whose values gguf-py tells


class Weight:
    """A tensor as the plan wants it."""

    def __init__(self, kind: int, shape: tuple[int, ...], data: np.ndarray, values: np.ndarray):
        self.type, self.shape, self.data, self.values = int(kind), tuple(shape), data, values

    @classmethod
    def plain(cls, values: np.ndarray) -> "Weight":
        values = np.ascontiguousarray(values, np.float32)
        return cls(gguf.GGMLQuantizationType.F32, values.shape, values.view(np.uint8).reshape(-1), values)

    def to_float32(self) -> np.ndarray:
        return self.values


# Where a block keeps its f16 scale and its f16 minimum, and the minimum that centres the values, in scales.
_LAYOUT = {
    "Q8_0": (0, None, 0),
    "Q4_0": (0, None, 0),
    "Q4_1": (0, 2, -7.5),
    "Q5_0": (0, None, 0),
    "Q5_1": (0, 2, -15.5),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0),
}
QUANTISED = list(_LAYOUT)


def _put(blocks: np.ndarray, offset: int | None, values: np.ndarray) -> None:
    if offset is not None:
        blocks[:, offset : offset + 2] = values.astype(np.float16).view(np.uint8).reshape(-1, 2)


def random_quantised(kind: str, shape: tuple[int, int], deviation: float, generator: np.random.Generator) -> Weight:
    """Random codes in every bit of every block, scaled to a standard deviation; gguf-py says what they mean."""
    type_ = gguf.GGMLQuantizationType[kind]
    if kind in ("F16", "BF16"):
        values = (generator.standard_normal(shape) * deviation).astype(np.float32)
        data = gguf.quants.quantize(values, type_)
        return Weight(type_, shape, data.view(np.uint8).reshape(-1), gguf.quants.dequantize(data, type_))
    elements, size = gguf.GGML_QUANT_SIZES[type_]
    blocks = generator.integers(0, 256, (shape[0] * shape[1] // elements, size), np.uint8)
    if kind == "Q8_0":
        # The format has -128, quantisers never write it.
        blocks[:, 2:][blocks[:, 2:] == 128] = 0
    scale_at, minimum_at, centre = _LAYOUT[kind]
    probe = blocks[:64].copy()
    for at, value in ((scale_at, 1.0), (minimum_at, centre)):
        _put(probe, at, np.full(len(probe), value))
    scales = generator.uniform(0.5, 1.5, len(blocks)) * deviation / gguf.quants.dequantize(probe, type_).std()
    _put(blocks, scale_at, scales)
    _put(blocks, minimum_at, scales * centre)
    rows = blocks.reshape(shape[0], -1)
    values = np.asarray(gguf.quants.dequantize(rows, type_), np.float32).reshape(shape)
    assert 0.7 * deviation < values.std() < 1.4 * deviation
    return Weight(type_, shape, rows.reshape(-1), values)


def weights_of(config: ModelConfig, kind: str, seed: int = 0) -> dict[str, Weight]:
    """kind: a block format for all matrices; "mix": Q4_K, Q5_0 and Q6_K by turns with a Q8_0 embedding; "F32": none."""
    weights, turn = {}, 0
    for name, values in random_params(config, seed).items():
        if "embed" in name:
            values = values * np.float32(0.4)  # wide rows would make logits of a hundred units
        if values.ndim == 1 or kind == "F32":
            weights[name] = Weight.plain(values)
            continue
        chosen = kind
        if kind == "mix":
            chosen = "Q8_0" if "embed" in name else ("Q4_K", "Q5_0", "Q6_K")[turn % 3]
            turn += "embed" not in name
        generator = np.random.default_rng([seed, len(weights)])
        weights[name] = random_quantised(chosen, values.shape, float(values.std()), generator)
    return weights


def params_of(weights: dict[str, Weight]) -> dict[str, np.ndarray]:
    return {name: weight.to_float32() for name, weight in weights.items()}


# Rows of 256 for the K-quants; a window that is no multiple of a page, and 4 of it leave pages behind.
WINDOW = 72
WIDE = ModelConfig(
    model_type="gemma3_text",
    vocab_size=272,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    rms_norm_eps=1e-6,
    query_pre_attn_scalar=64.0,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    qk_norm=True,
    post_norms=True,
    tie_word_embeddings=True,
    bos_token_id=2,
    stop_token_ids=CASES["gemma3"].config.stop_token_ids,
    layers=(
        LayerSpec(sliding_window=WINDOW, rope_theta=10_000.0),
        LayerSpec(sliding_window=None, rope_theta=1e6),
    ),
)
LENGTHS = (WINDOW // 2, WINDOW, WINDOW + 1, 2 * WINDOW, 4 * WINDOW)


# ---------------------------------------------------------------------------------------------------------------------
# Running sequences


class Pages:
    """Page tables of several sequences, ids dealt in random order.

    A page that left the window is freed and dealt again: whoever reads it then reads another sequence's keys.
    """

    def __init__(self, runner: NativeRunner, pages: int, seed: int = 0):
        runner.reserve([pages] * len(runner.groups))
        self.windows = [group.window for group in runner.groups]
        order = np.random.default_rng(seed).permutation(pages).tolist()
        self.free = [list(order) for _ in runner.groups]
        self.tables: dict[int, list[list[int]]] = {}
        self.freed = 0

    def grow(self, sequence: int, first: int, count: int) -> None:
        """Makes room for `count` new tokens from position `first` and frees what none of them can see."""
        tables = self.tables.setdefault(sequence, [[] for _ in self.windows])
        for window, free, table in zip(self.windows, self.free, tables, strict=True):
            lowest = 0 if window is None else max(0, first - window + 1)
            for page in range(min(lowest // PAGE, len(table))):
                if table[page] >= 0:
                    free.append(table[page])
                    table[page] = -1
                    self.freed += 1
            while len(table) * PAGE < first + count:
                table.append(free.pop(0))

    def close(self, sequence: int) -> None:
        for free, table in zip(self.free, self.tables.pop(sequence), strict=True):
            free.extend(page for page in table if page >= 0)

    def arrays(self, sequences: list[int]) -> tuple[np.ndarray, ...]:
        result = []
        for group in range(len(self.windows)):
            rows = [self.tables[s][group] for s in sequences]
            width = max(len(row) for row in rows)
            result.append(np.array([row + [-1] * (width - len(row)) for row in rows], np.int32))
        return tuple(result)


def make_batch(pages: Pages, parts: list[tuple[int, np.ndarray, int]], sampling=None, **rows) -> Batch:
    """parts: (sequence, its new ids, position of the first)."""
    for sequence, ids, first in parts:
        pages.grow(sequence, first, len(ids))
    count = len(parts)
    return Batch(
        tokens=np.concatenate([ids for _, ids, _ in parts]).astype(np.int32),
        starts=np.cumsum([0, *(len(ids) for _, ids, _ in parts)]).astype(np.int32),
        positions=np.array([first for _, _, first in parts], np.int32),
        pages=pages.arrays([sequence for sequence, _, _ in parts]),
        sample=np.full(count, sampling is not None),
        sampling=sampling or (Sampling(),) * count,
        counters=rows.get("counters", np.zeros(count, np.int64)),
        history=rows.get("history", (NO_IDS,) * count),
        prompt_lengths=rows.get("prompt_lengths", np.zeros(count, np.int32)),
    )


def one_pass(runner: NativeRunner, ids: np.ndarray) -> np.ndarray:
    return runner.logits(make_batch(Pages(runner, 8), [(0, ids, 0)]))


def in_chunks(runner: NativeRunner, ids: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, int]:
    """Logits [T, V] with the sizes taken in turn, and how many pages were freed on the way."""
    pages, rows, at, turn = Pages(runner, 12), [], 0, 0
    while at < len(ids):
        part = ids[at : at + sizes[turn % len(sizes)]]
        rows.append(runner.logits(make_batch(pages, [(0, part, at)])))
        at, turn = at + len(part), turn + 1
    return np.concatenate(rows), pages.freed


def in_batches(runner: NativeRunner, sequences: list[np.ndarray], seed: int) -> tuple[list[np.ndarray], int]:
    """Runs all sequences together in ragged random chunks; they start and end at different steps and swap places."""
    generator = np.random.default_rng(seed)
    pages, done = Pages(runner, 24, seed), [0] * len(sequences)
    rows: list[list[np.ndarray]] = [[] for _ in sequences]
    while live := [s for s, ids in enumerate(sequences) if done[s] < len(ids)]:
        chosen = [s for s in generator.permutation(live).tolist() if generator.random() < 0.7] or live[:1]
        parts = []
        for s in chosen:
            size = int(generator.choice([1, 1, 2, 7, 16, 33, 70]))
            parts.append((s, sequences[s][done[s] : done[s] + size], done[s]))
        batch = make_batch(pages, parts)
        logits = runner.logits(batch)
        for (s, ids, _), start, end in zip(parts, batch.starts[:-1], batch.starts[1:], strict=True):
            rows[s].append(logits[start:end])
            done[s] += len(ids)
            if done[s] == len(sequences[s]):
                pages.close(s)
    return [np.concatenate(row) for row in rows], pages.freed


@functools.cache
def reference_logits(name: str) -> np.ndarray:
    case = CASES[name]
    return reference.forward(case.config, case.params(), case.tokens())


def plain_weights(params: dict[str, np.ndarray]) -> dict[str, Weight]:
    return {name: Weight.plain(values) for name, values in params.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Parity


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_reference(name, path):
    case = CASES[name]
    runner = NativeRunner(case.config, plain_weights(case.params()), threads=2, activations="float32")
    assert runner.path == path
    error = relative_error(one_pass(runner, case.tokens()), reference_logits(name))
    assert error <= NATIVE_FLOAT32, f"{name} on {path}: {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_float_weights_with_a_half_cache_stay_close(name, path):
    """In int8 mode float matrices still see float activations: what is left is the 16-bit cache."""
    case = CASES[name]
    runner = NativeRunner(case.config, plain_weights(case.params()), threads=2)
    error = relative_error(one_pass(runner, case.tokens()), reference_logits(name))
    assert error <= NATIVE_INT8_CACHE, f"{name} on {path}: {error:.1e}"


def test_hidden_and_score_agree_with_the_logits(path):
    case = CASES["gemma3"]
    ids, params = case.tokens(), case.params()
    runner = NativeRunner(case.config, plain_weights(params), threads=2, activations="float32")
    pages = Pages(runner, 4)
    batch = make_batch(pages, [(0, ids, 0)])
    expected = reference.hidden(case.config, params, ids)
    assert relative_error(runner.hidden(batch), expected) <= NATIVE_FLOAT32
    targets = np.append(ids[1:], -1).astype(np.int32)
    targets[5] = -1
    scores, logits = runner.score(batch, targets), runner.logits(batch)
    wanted = [0.0 if t < 0 else log_softmax(row)[t] for row, t in zip(logits, targets, strict=True)]
    assert scores[5] == 0 and scores[-1] == 0
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=NATIVE_LOGPROB)


@functools.cache
def quantised_case(kind: str) -> tuple[dict[str, Weight], np.ndarray, np.ndarray]:
    """Weights of `WIDE`, 100 tokens, and the reference's logits on the dequantised parameters."""
    weights, ids = weights_of(WIDE, kind, seed=3), tokens(WIDE, 100, 3)
    return weights, ids, reference.forward(WIDE, params_of(weights), ids)


@pytest.mark.parametrize("kind", ["F16", "BF16", *QUANTISED, "mix"])
def test_quantised_weights_mean_what_an_independent_program_says(kind, path):
    weights, ids, expected = quantised_case(kind)
    assert 3 < np.abs(expected).max() < 60
    exact = relative_error(one_pass(NativeRunner(WIDE, weights, threads=2, activations="float32"), ids), expected)
    assert exact <= NATIVE_FLOAT32, f"{kind} on {path}: {exact:.1e}"
    fast = relative_error(one_pass(NativeRunner(WIDE, weights, threads=2), ids), expected)
    limit = NATIVE_INT8_CACHE if kind in ("F16", "BF16") else NATIVE_INT8_MATRICES
    assert fast <= limit, f"{kind} with int8 activations on {path}: {fast:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# Invariance, bit by bit

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


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

LARGE = dataclasses.replace(
    CASES["gemma2"].config,
    vocab_size=20_011,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    layers=WIDE.layers,
)
SETTINGS = 512


def random_sampling(generator: np.random.Generator, ids: np.ndarray, vocab: int) -> Sampling:
    pick = generator.choice
    biased = (
        generator.integers(0, vocab, generator.integers(0, 6)).tolist() + pick(ids, generator.integers(0, 3)).tolist()
    )
    bias = {int(i): float(pick([-1e6, -3.0, 0.7, 5.0, 1e6 if generator.random() < 0.1 else 2.0])) for i in biased}
    return Sampling(
        temperature=float(pick([0.0, 1e-300, 1e-3, 0.3, 0.7, 1.0, 1.0, 1.5, 4.0, 1e6])),
        top_k=int(pick([0, 0, 1, 2, 40, 64, 1000, vocab - 1, vocab, 2**31 - 1])),
        top_p=float(pick([1.0, 1.0, 1e-9, 0.1, 0.5, 0.9, 0.95, 0.999999])),
        min_p=float(pick([0.0, 0.0, 1e-12, 0.02, 0.3, 1.0])),
        repetition_penalty=float(pick([1.0, 1.0, 1.3, 0.7, 0.01, 100.0])),
        presence_penalty=float(pick([0.0, 0.0, 0.6, -1.5, 1000.0])),
        frequency_penalty=float(pick([0.0, 0.0, 0.31, -0.4, 20.0])),
        logit_bias=bias if generator.random() < 0.5 else (),
        seed=(0, 1, 2**63, 2**64 - 1)[generator.integers(4)]
        if generator.random() < 0.2
        else int(generator.integers(2**63)),
        logprobs=int(pick([0, 0, 1, 5, 20])),
    )


def test_sampling_equals_the_numpy_definition(path):
    weights = weights_of(LARGE, "Q8_0", 8)
    runner = NativeRunner(LARGE, weights, threads=2)
    generator = np.random.default_rng(17)
    rows_per_step = 40  # more than the core holds logits of at a time
    different, total = set(), 0
    while total < SETTINGS:
        pages, lengths = Pages(runner, rows_per_step), generator.integers(1, 12, rows_per_step)
        parts = [(s, generator.integers(0, LARGE.vocab_size, n).astype(np.int32), 0) for s, n in enumerate(lengths)]
        # Histories repeat ids and reach beyond this step's tokens, as after an earlier prefill.
        history = [np.concatenate([generator.choice(ids, 9), ids]).astype(np.int32) for _, ids, _ in parts]
        prompts = np.array([generator.integers(0, len(h) + 1) for h in history], np.int32)
        counters = generator.choice([0, 1, 2, 77, 2**40], rows_per_step).astype(np.int64)
        sampling = [random_sampling(generator, h, LARGE.vocab_size) for h in history]
        kept = tuple(h if s.has_penalty else NO_IDS for h, s in zip(history, sampling, strict=True))
        batch = make_batch(pages, parts, tuple(sampling), counters=counters, history=kept, prompt_lengths=prompts)
        batch.sample[generator.integers(0, rows_per_step, 3)] = False
        logits = runner.logits(batch)[batch.starts[1:] - 1]
        got = runner.step(batch)
        for b in range(rows_per_step):
            if not batch.sample[b]:
                assert got.tokens[b] == -1 and (got.top_ids[b] == -1).all() and np.isneginf(got.top_logprobs[b]).all()
                continue
            want = sample(logits[b], sampling[b], int(counters[b]), history[b], int(prompts[b]))
            token, logprob, top_ids, top_logprobs = want
            n = len(top_ids)
            assert got.tokens[b] == token, (sampling[b], int(counters[b]))
            assert abs(got.logprobs[b] - logprob) <= NATIVE_LOGPROB, (sampling[b], got.logprobs[b], logprob)
            assert got.top_ids[b, :n].tolist() == top_ids.tolist() and (got.top_ids[b, n:] == -1).all()
            np.testing.assert_allclose(got.top_logprobs[b, :n], top_logprobs, rtol=0, atol=NATIVE_LOGPROB)
            different.add(token != int(np.argmax(logits[b])))
            total += 1
    assert different == {True, False}


def test_a_draw_does_not_depend_on_threads_or_neighbours(path):
    weights, ids = weights_of(LARGE, "Q8_0", 8), tokens(LARGE, 12, 4).astype(np.int32)
    settings = tuple(Sampling(temperature=1.0, top_p=0.95, seed=s, logprobs=3) for s in range(8))
    results = []
    for threads in (1, 2, 3):
        runner = NativeRunner(LARGE, weights, threads=threads)
        together = runner.step(make_batch(Pages(runner, 8), [(s, ids, 0) for s in range(8)], settings))
        for s in range(8):
            alone = runner.step(make_batch(Pages(runner, 8), [(0, ids, 0)], settings[s : s + 1]))
            for field in ("tokens", "logprobs", "top_ids", "top_logprobs"):
                assert np.array_equal(getattr(alone, field)[0], getattr(together, field)[s])
        results.append((together.tokens.tolist(), together.logprobs.tolist()))
    assert results[0] == results[1] == results[2]
    assert len(set(results[0][0])) > 1


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def tiny() -> tuple[ModelConfig, dict[str, Weight]]:
    case = CASES["gemma3"]
    return case.config, weights_of(case.config, "Q8_0")


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 300
    return text


@pytest.mark.parametrize(
    "arguments, kind, words",
    [
        ({"activations": "int4"}, UsageError, "activations must be one of"),
        ({"threads": 0}, UsageError, "threads"),
        ({"threads": 5000}, UsageError, "threads"),
        ({"max_tokens_per_step": 0}, GemkitError, "max_tokens"),
        ({"max_tokens_per_step": 10**6}, GemkitError, "max_tokens"),
    ],
)
def test_bad_arguments(arguments, kind, words):
    with pytest.raises(kind) as error:
        NativeRunner(*tiny(), **arguments)
    assert words in one_line(error)


@pytest.mark.parametrize("isa, words", [("mmx", "must be one of"), ("AVX2", "must be one of")])
def test_an_unknown_instruction_set(monkeypatch, isa, words):
    monkeypatch.setenv("GEMKIT_ISA", isa)
    for call in (kernel_path, lambda: NativeRunner(*tiny())):
        with pytest.raises(UsageError) as error:
            call()
        assert words in one_line(error)


def _reshaped(name: str, shape: tuple[int, ...]):
    def change(weights):
        weights[name] = Weight.plain(np.zeros(shape, np.float32))

    return change


def _shortened(name: str):
    def change(weights):
        weight = weights[name]
        weights[name] = Weight(weight.type, weight.shape, weight.data[:-1], weight.values)

    return change


def _retyped(name: str, kind: int):
    def change(weights):
        weight = weights[name]
        weights[name] = Weight(kind, weight.shape, weight.data, weight.values)

    return change


_Q = "model.layers.1.self_attn.q_proj.weight"
_DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (_reshaped(_Q, (96, 96)), "q_proj"),
        (_reshaped(_DOWN, (128, 96)), "down_proj"),
        (_reshaped("model.embed_tokens.weight", (511, 96)), "embed_tokens"),
        (_reshaped("model.norm.weight", (95,)), "model.norm"),
        (_reshaped("model.layers.0.self_attn.q_norm.weight", (96,)), "q_norm"),
        (_reshaped(_Q, (128 * 96,)), ""),
        (_shortened(_Q), "bytes"),
        (_shortened("model.embed_tokens.weight"), "bytes"),
        (_retyped(_Q, 2), "bytes"),
        (_retyped(_Q, 12), "256"),
        (_retyped(_Q, 16), "type"),
        (_retyped(_Q, -1), "type"),
        (lambda weights: weights.pop(_Q), ""),
        (lambda weights: weights.pop("model.norm.weight"), ""),
    ],
)
def test_weights_that_do_not_fit(change, words):
    config, weights = tiny()
    change(weights)
    with pytest.raises(GemkitError) as error:
        NativeRunner(config, weights)
    assert words in one_line(error)


def _bad_batches():
    def tokens_(value):
        return lambda b: b.tokens.__setitem__(3, value)

    def page(value):
        return lambda b: b.pages[0].__setitem__((0, 0), value)

    def position(value):
        return lambda b: b.positions.__setitem__(0, value)

    def table(b):
        b.pages = (b.pages[0][:, :0],)

    def more_tables(b):
        b.pages = (*b.pages, *b.pages)

    def empty_sequence(b):
        b.starts = np.array([0, 0], np.int32)

    def long(b):
        b.tokens = np.zeros(33, np.int32)
        b.starts = np.array([0, 33], np.int32)

    return {
        "id_past_the_vocabulary": (tokens_(512), "512 is not in the vocabulary of 512"),
        "negative_id": (tokens_(-1), "vocabulary"),
        "huge_id": (tokens_(2**31 - 1), "vocabulary"),
        "freed_page_in_sight": (page(-1), "no page"),
        "page_never_reserved": (page(4), "no page"),
        "context_overflow": (position(4096 - 7), "4096 is past the context of 4096"),
        "position_overflow": (position(2**31 - 1), "context"),
        "negative_position": (position(-1), "context"),
        "short_table": (table, "page table"),
        "extra_table": (more_tables, "page table"),
        "no_tokens": (empty_sequence, ""),
        "too_many_tokens": (long, "between 1 and 32 tokens"),
    }


@pytest.mark.parametrize("name", _bad_batches())
@pytest.mark.parametrize("call", ["step", "logits", "score", "hidden"])
def test_batches_that_cannot_run(name, call):
    change, words = _bad_batches()[name]
    runner = NativeRunner(*tiny(), threads=1, max_tokens_per_step=32)
    ids = tokens(runner.config, 8).astype(np.int32)
    pages = Pages(runner, 4)
    good = make_batch(pages, [(0, ids, 0)], (Sampling(),))
    expected = runner.logits(good)
    bad = make_batch(pages, [(0, ids, 0)], (Sampling(),))
    change(bad)
    extra = (np.ones(len(bad.tokens), np.int32),) if call == "score" else ()
    with pytest.raises(GemkitError) as error:
        getattr(runner, call)(bad, *extra)
    assert words in one_line(error)
    assert np.array_equal(runner.logits(good), expected), "a refused step leaves the cache alone"


def test_bad_targets_and_bad_reservations():
    runner = NativeRunner(*tiny(), threads=1)
    batch = make_batch(Pages(runner, 4), [(0, tokens(runner.config, 4), 0)])
    for targets in ([0, 1, 2, 512], [0, 1, 2, -2], [0, 1, 2]):
        with pytest.raises(GemkitError) as error:
            runner.score(batch, np.array(targets, np.int32))
        assert "target" in one_line(error)
    with pytest.raises(GemkitError) as error:
        runner.reserve([1, 1, 1])
    assert "group" in one_line(error)
    with pytest.raises(GemkitError) as error:
        runner.reserve([2**24 + 1])
    assert "pages" in one_line(error)
    with pytest.raises(GemkitError):
        runner.page_bytes(2)


def test_weights_that_are_not_numbers_are_reported():
    config, weights = tiny()
    weights["model.norm.weight"] = Weight.plain(np.full(config.hidden_size, np.nan, np.float32))
    runner = NativeRunner(config, weights, threads=1)
    with pytest.raises(GemkitError) as error:
        runner.step(make_batch(Pages(runner, 4), [(0, tokens(config, 4), 0)], (Sampling(),)))
    assert "not numbers" in one_line(error)


BAD_PLAN_VALUES = {
    "hidden": [0, -32, 2**40, 97],
    "ffn": [0, -1, 2**40],
    "heads": [0, -1, 5000, 3],
    "kv_heads": [0, 3, 5, -2],
    "head_dim": [0, 16, 33, 8192, -32],
    "vocab": [0, -1, 2**40, 513],
    "context": [0, -1, 2**40],
    "norm_eps": [0.0, -1.0, float("nan")],
    "embed_scale": [float("inf"), float("nan")],
    "query_scale": [float("inf"), float("nan")],
    "attention_softcap": [-1.0, float("nan")],
    "final_softcap": [-1.0, float("nan")],
    "embed": [-1, 10**6, 0x7FFFFFFF],
    "head": [-1, 10**6],
    "final_norm": [-1, 10**6],
    "group_windows": [[], [-1], [2**40], [0] * 9],
    "ropes": [[], *([{"base": b, "factor": f}] for b, f in ((0.0, 1.0), (1e4, 0.0), (1e4, float("nan"))))],
    "layers": [[]],
    "tensors": [[]],
    "adapters": [[{"adapter": -1, "target": 0, "a": 0, "b": 0, "scale": 1.0}]],
}  # fmt: skip


@pytest.mark.parametrize("key", BAD_PLAN_VALUES)
def test_plans_are_validated(key):
    plan = build_plan(*tiny())
    _native.Model.create(plan, 1, False, 8)
    for value in BAD_PLAN_VALUES[key]:
        with pytest.raises(ValueError) as error:
            _native.Model.create(plan | {key: value}, 1, False, 8)
        one_line(error)
    with pytest.raises(ValueError) as error:
        _native.Model.create({k: v for k, v in plan.items() if k != key}, 1, False, 8)
    assert key in one_line(error)


@pytest.mark.parametrize("key", ["group", "rope", "input_norm", "pre_ffn_norm", "q_norm", "k_proj", "down_proj"])
def test_layers_of_plans_are_validated(key):
    plan = build_plan(*tiny())
    optional = key.endswith("norm") and key not in ("input_norm", "pre_ffn_norm")
    for value in (-2, 10**6, 2**31 - 1, *(() if optional else (-1,))):
        layers = [dict(layer) for layer in plan["layers"]]
        layers[1][key] = value
        with pytest.raises(ValueError) as error:
            _native.Model.create(plan | {"layers": layers}, 1, False, 8)
        assert "layer 1" in one_line(error)


# ---------------------------------------------------------------------------------------------------------------------
# Hostile calls straight into the module. They run in a process of their own: a crash is a failure, not the end.


def test_hostile_calls_are_refused_and_never_crash():
    source = os.path.dirname(os.path.dirname(os.path.dirname(sys.modules["gemkit.arch.config"].__file__)))
    tests = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    hostile = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hostile_calls.py")
    run = subprocess.run(
        [sys.executable, "-X", "faulthandler", hostile, source, os.path.abspath(__file__)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([tests, source])},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    wrong = [line for line in run.stdout.splitlines() if line.startswith("WRONG")]
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong[:30])
    refused = int(run.stdout.split("refused ")[1].split()[0])
    assert refused > 2000, run.stdout
