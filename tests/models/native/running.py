"""Shared parts of the tests of the C++ core: kernel paths, weights whose values gguf-py tells, sequences in pieces."""

import functools
import os

import gguf
import numpy as np
from parity.cases import CASES, random_params

from gemkit import _native
from gemkit.arch import reference
from gemkit.arch.config import LayerSpec, ModelConfig
from gemkit.engine.interface import Batch, build_batch
from gemkit.errors import UsageError
from gemkit.models.native import NativeRunner, kernel_path

PAGE = _native.page_positions
NO_IDS = np.zeros(0, np.int32)


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


# Weights: float32 arrays, and blocks of random bytes


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


def tiny() -> tuple[ModelConfig, dict[str, Weight]]:
    case = CASES["gemma3"]
    return case.config, weights_of(case.config, "Q8_0")


# Running sequences


class Pages:
    """Page tables of several sequences, ids given in random order.

    A page that left the window is freed and given again: a late read gets another sequence's keys.
    """

    def __init__(self, runner: NativeRunner, pages: int, seed: int = 0):
        runner.reserve([pages] * len(runner.groups))
        self.windows = [group.window for group in runner.groups]
        order = np.random.default_rng(seed).permutation(pages).tolist()
        self.free = [list(order) for _ in runner.groups]
        self.tables: dict[int, list[list[int]]] = {}
        self.freed = 0

    def grow(self, sequence: int, first: int, count: int) -> None:
        """Allocate pages for `count` new tokens from position `first`, and free those outside their window."""
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
    return build_batch(
        [ids.astype(np.int32) for _, ids, _ in parts],
        [first for _, _, first in parts],
        pages.arrays([sequence for sequence, _, _ in parts]),
        draws=[int(sampling is not None)] * len(parts),
        sampling=sampling or (),
        **rows,
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
