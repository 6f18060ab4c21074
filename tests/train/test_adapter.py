"""Starts of new adapters: they change nothing yet, and depend on the seed and the names alone. Budget: 3 s."""

import numpy as np
from parity.cases import CASES
from parity.tolerances import relative_error

from gemkit.train.adapter import named, new_parts, trained_parts
from gemkit.weights.lora import LoraConfig, merge, row_lengths

CASE = CASES["gemma3"]
WEIGHTS = CASE.params()


def start(seed: int, **options):
    return new_parts(LoraConfig(4, 8, **options), CASE.config, seed, lambda name: row_lengths(WEIGHTS[name]))


def test_a_is_uniform_and_b_is_zero():
    one, same, other = start(3), start(3), start(4)
    assert len(one) == 7 * CASE.config.num_hidden_layers
    for name, part in one.items():
        assert part.a.dtype == part.b.dtype == np.float32 and part.scale == 2 and part.magnitude is None
        assert not part.b.any() and np.array_equal(part.a, same[name].a) and not np.array_equal(part.a, other[name].a)
        bound = 1 / np.sqrt(part.a.shape[1])
        assert np.abs(part.a).max() <= bound and abs(part.a.std() - bound / np.sqrt(3)) < 0.1 * bound
    some = start(3, targets=("up_proj",))
    assert some and all(np.array_equal(part.a, one[name].a) for name, part in some.items())


def test_magnitudes_are_the_rows_lengths():
    for name, part in start(3, dora=True).items():
        assert np.array_equal(part.magnitude, row_lengths(WEIGHTS[name]))
        assert relative_error(merge(WEIGHTS[name], [part], slice(None)), WEIGHTS[name]) < 1e-6


def test_the_arrays_of_a_loop_come_back():
    parts = start(3, dora=True)
    arrays = {key: value + 1 for name, part in parts.items() for key, value in named(name, part).items()}
    for name, part in trained_parts(parts, arrays).items():
        assert part.scale == parts[name].scale
        for field in ("a", "b", "magnitude"):
            assert np.array_equal(getattr(part, field), getattr(parts[name], field) + 1)
