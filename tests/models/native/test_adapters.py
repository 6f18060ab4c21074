"""LoRA and DoRA in the C++ core: unmerged, several in one batch, the same bits for every batch and thread count.

Budget: 20 s on two cores.
"""

import numpy as np
import pytest
from models.native.running import PATHS, WIDE, Pages, make_batch, params_of, weights_of
from parity.cases import tokens
from parity.tolerances import NATIVE_FLOAT32, NATIVE_INT8_CACHE, NATIVE_INT8_MATRICES, TRAIT_MARGIN, relative_error
from weights.adapters import trained_parts

from gemkit.arch import reference
from gemkit.errors import GemkitError
from gemkit.models.native import NativeRunner
from gemkit.weights import lora
from gemkit.weights.lora import LoraConfig


class Adapter:
    def __init__(self, config: LoraConfig, params: dict[str, np.ndarray], seed: int):
        self.parts = trained_parts(config, WIDE, params, seed)

    def merged(self, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return params | {name: lora.merge(params[name], [part], slice(None)) for name, part in self.parts.items()}


SETTINGS = (LoraConfig(4, 4), LoraConfig(3, 3, dora=True), LoraConfig(17, 9, targets=("o_proj", "up_proj"), dora=True))


def world(kind: str):
    weights = weights_of(WIDE, kind)
    params = params_of(weights)
    return weights, params, [Adapter(config, params, seed) for seed, config in enumerate(SETTINGS)]


def alone(runner: NativeRunner, ids: np.ndarray, adapter: int, sizes: list[int] | None = None) -> np.ndarray:
    pages, rows, at = Pages(runner, 8), [], 0
    for size in sizes or [len(ids)]:
        rows.append(runner.logits(make_batch(pages, [(0, ids[at : at + size], at)], adapters=[adapter])))
        at += size
    return np.concatenate(rows)


@pytest.mark.parametrize("kind", ["F32", "mix"])
def test_logits_equal_the_merged_references(kind):
    weights, params, adapters = world(kind)
    ids = tokens(WIDE, 90)
    tolerance = NATIVE_INT8_MATRICES if kind == "mix" else NATIVE_INT8_CACHE
    exact = NativeRunner(WIDE, weights, adapters=adapters, threads=2, activations="float32")
    fast = NativeRunner(WIDE, weights, adapters=adapters, threads=2)
    base = reference.forward(WIDE, params, ids)
    for number, adapter in enumerate(adapters):
        expected = reference.forward(WIDE, adapter.merged(params), ids)
        assert relative_error(base, expected) > TRAIT_MARGIN * NATIVE_FLOAT32
        assert relative_error(alone(exact, ids, number), expected) <= NATIVE_FLOAT32
        assert relative_error(alone(fast, ids, number), expected) <= tolerance


@pytest.mark.parametrize("path", PATHS)
def test_every_request_has_its_own_and_the_bits_of_a_run_alone(monkeypatch, path):
    monkeypatch.setenv("GEMKIT_ISA", path)
    weights, _, adapters = world("mix")
    sequences = [tokens(WIDE, 100, seed) for seed in range(5)]
    chosen = [1, -1, 0, 2, 1]
    plain = NativeRunner(WIDE, weights, threads=1)
    runners = [NativeRunner(WIDE, weights, adapters=adapters, threads=threads) for threads in (1, 2, 3)]
    expected = [alone(runners[0], ids, number) for ids, number in zip(sequences, chosen, strict=True)]
    assert np.array_equal(expected[1], alone(plain, sequences[1], -1))
    for ids, number, found in zip(sequences, chosen, expected, strict=True):
        assert number < 0 or not np.array_equal(found, alone(plain, ids, -1))
    for runner in runners:
        assert np.array_equal(alone(runner, sequences[0], 1, [1, 30, 69]), expected[0])
        pages, at, rows = Pages(runner, 24), 0, [[] for _ in sequences]
        for size in (33, 1, 7, 59):
            parts = [(s, ids[at : at + size], at) for s, ids in enumerate(sequences)]
            logits = runner.logits(make_batch(pages, parts, adapters=chosen))
            for row, part in zip(rows, np.split(logits, len(sequences)), strict=True):
                row.append(part)
            at += size
        for row, found in zip(rows, expected, strict=True):
            assert np.array_equal(np.concatenate(row), found)


def test_a_magnitude_without_a_row_to_scale_is_refused():
    weights, params, _ = world("F32")
    adapter = Adapter(LoraConfig(1, 1, targets=("k_proj",), dora=True), params, 0)
    name, part = next(iter(adapter.parts.items()))
    weights[name].values[5], part.b[5] = 0, 0
    with pytest.raises(GemkitError, match="an adapter scales a row of zeros"):
        NativeRunner(WIDE, weights, adapters=[adapter], threads=1)
