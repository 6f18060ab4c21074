"""Rules about norms: the 1 of 1 + w must be where the format puts it.

Published weights are bfloat16, so w has 8 significant bits. GGUF stores 1 + w in float32: minus 1, such values result,
which they do not if it was added twice or never. That is proof, from `certain`. Weights that were trained on in
float32, or rounded after the addition, lack this property; for them `likely` relies on trained Gemma 3 models, where
almost every norm has a factor near 0, and almost none a factor far below.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gemkit.errors import listed
from gemkit.tools.check.finding import Hit
from gemkit.tools.check.subject import Subject, TensorView
from gemkit.weights.quant import GGMLType

_ON_GRID, _OFF_GRID = 0.999, 0.9
_LEAST = 16  # elements that a norm needs to prove a fault
# `likely`: position of the low factors, tolerance, number of norms needed, evidence of training.
_LOW, _SLACK, _NORMS, _TRAINED = 0.002, 0.25, 24, 4.0

_FAULTS = {0: "the one was not added", 2: "the one was added twice"}


def _norms(s: Subject) -> list[TensorView]:
    return [view for view in s.tensors if view.key and "norm" in view.key and len(view.shape) == 1 and view.is_readable]


def _factors(view: TensorView) -> np.ndarray:
    """Return the norm's factors, if the file follows its format."""
    values = view.numbers().reshape(-1)
    return values if view.add_one else values + np.float32(1)


def _is_bfloat16(values: np.ndarray) -> np.ndarray:
    low = np.ascontiguousarray(values, np.float32).view(np.uint32) & 0xFFFF
    # Near 0 the addition of the one has rounded away the last bits
    return (low == 0) | (np.abs(values) < 2.0**-15)


def certain(s: Subject) -> Iterator[Hit]:
    """Yield norms whose values prove the fault."""
    found: dict[int, list[TensorView]] = {}
    for view in _norms(s):
        factors = _factors(view)
        if not np.isfinite(factors).all() or len(factors) < _LEAST:
            continue
        if (factors == factors[0]).all():
            # Untrained norms are 1; a norm of zeros lets nothing through
            if factors[0] in (0, 2):
                found.setdefault(int(factors[0]), []).append(view)
        elif view.form == GGMLType.F32:
            right, zero, two = (float(_is_bfloat16(factors - np.float32(one)).mean()) for one in (1, 0, 2))
            for offset, share in ((0, zero), (2, two)):
                if share > _ON_GRID and right < _OFF_GRID:
                    found.setdefault(offset, []).append(view)
    for offset, views in found.items():
        yield views[0].file, f"{_FAULTS[offset]} in {len(views)} norms: {listed(view.name for view in views)}"


def likely(s: Subject) -> Iterator[Hit]:
    """Yield the same by statistics, for a trained Gemma 3 as a whole."""
    if s.family != "gemma3_text":
        return
    views = [view for view in _norms(s) if not view.key.endswith(("input_layernorm.weight", "model.norm.weight"))]
    if len(views) < _NORMS:
        return
    factors = [_factors(view) for view in views]
    if not all(np.isfinite(values).all() for values in factors) or max(values.max() for values in factors) < _TRAINED:
        return
    low = float(np.median([np.quantile(values, _LOW) for values in factors]))
    for off, words in ((-1, _FAULTS[0]), (1, _FAULTS[2])):
        if abs(low - off) < _SLACK:
            yield views[0].file, f"the smallest factors lie around {low:.2f} instead of 0, as if {words}"
