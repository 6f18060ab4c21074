"""The parity grid: every implementation, every case, every number type, against the float64 reference.

    python tests/parity/grid.py            # prints it
    python tests/parity/grid.py --write    # and writes docs/parity.md

A cell is max|Δ| / max|logit|. In bfloat16 the reference has the rounded weights, and what counts is the error in those
of transformers. Each implementation runs in a process of its own (`grid_worker`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from parity.cases import CASES, Case
from parity.tolerances import (
    BFLOAT16_RATIO,
    FRAMEWORK_FLOAT32,
    FRAMEWORK_FLOAT64,
    NATIVE_FLOAT32,
    REFERENCE_VS_TRANSFORMERS_F32,
    relative_error,
)

from gemkit.arch import reference

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
BACKENDS = ("transformers", "native", "torch", "jax", "keras-jax", "keras-torch", "keras-tensorflow")
# What one generation of Gemma or another has; single traits add nothing to what a cache does
CACHED = ("untied_embedding", "gemma1_2b", "gemma1_7b", "gemma2", "gemma3", "gemma3_27b")


@dataclass(frozen=True)
class Mode:
    """A way to run. what: for readers. limits: the tolerance by backend, "" for all others.
    absent: the cells that do not exist, and why."""

    what: str
    limits: dict[str, float]
    absent: dict[tuple[str, str], str] = field(default_factory=dict)


_KERAS_FLOAT64 = "Keras takes products of float64 in float32"
MODES = {
    "float64": Mode(
        "one pass in float64",
        {"": FRAMEWORK_FLOAT64},
        {
            ("native", "float64"): "the core computes in float32",
            **{(f"keras-{on}", "float64"): _KERAS_FLOAT64 for on in ("jax", "torch", "tensorflow")},
        },
    ),
    "float32": Mode(
        "one pass in float32",
        {"": FRAMEWORK_FLOAT32, "native": NATIVE_FLOAT32, "transformers": REFERENCE_VS_TRANSFORMERS_F32},
    ),
    "cached": Mode(
        "float32 in chunks and single tokens over the cache, with a neighbour in every step",
        {"": FRAMEWORK_FLOAT32, "native": NATIVE_FLOAT32},
        {("transformers", "cached"): "not ours to prove"},
    ),
    "bfloat16": Mode(
        "one pass in bfloat16: the error in those of transformers",
        {"": BFLOAT16_RATIO},
        {("native", "bfloat16"): "the core computes in float32, from bfloat16 weights too"},
    ),
}


def stored(case: Case, mode: str) -> dict[str, np.ndarray]:
    """The parameters of a case, rounded where the mode rounds them: matrices, to the nearest even bfloat16."""
    if mode != "bfloat16":
        return case.params()
    return {name: value if value.ndim == 1 else _bfloat16(value) for name, value in case.params().items()}


def _bfloat16(value: np.ndarray) -> np.ndarray:
    bits = value.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def run(backend: str, folder: Path) -> dict[str, np.ndarray]:
    """The logits of a backend by "mode/case"."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # Tiny models take longer to compile than to run
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    if backend.startswith("keras-"):
        environment["KERAS_BACKEND"] = backend.removeprefix("keras-")
    worker = Path(__file__).with_name("grid_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), backend, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"{backend}: {done.stderr[-4000:]}")
    return dict(np.load(folder / f"{backend}.npz"))


class Grid:
    """The errors of all cells: ``grid[backend, mode, case]``; None where a cell does not exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._logits: dict[str, dict[str, np.ndarray]] = {}
        self._expected: dict[tuple[str, bool], np.ndarray] = {}

    def error(self, backend: str, mode: str, case: str) -> float | None:
        if (backend, mode) in MODES[mode].absent or (mode == "cached" and case not in CACHED):
            return None
        found = self._error(backend, mode, case)
        return found / self._error("transformers", mode, case) if mode == "bfloat16" else found

    def limit(self, backend: str, mode: str) -> float:
        limits = MODES[mode].limits
        return limits.get(backend, limits[""])

    def _error(self, backend: str, mode: str, case: str) -> float:
        if backend not in self._logits:
            self._logits[backend] = run(backend, self.folder)
        key = case, mode == "bfloat16"
        if key not in self._expected:
            params = stored(CASES[case], mode)
            self._expected[key] = reference.forward(CASES[case].config, params, CASES[case].tokens())
        return relative_error(self._logits[backend][f"{mode}/{case}"], self._expected[key])


_HEAD = """\
# The parity grid

Written by `make parity`. Every implementation runs every case of `tests/parity/cases.py`, one tiny model for each trait
that tells the Gemmas apart and one for each generation, and is compared with the float64 reference,
`src/gemkit/arch/reference.py`. Numbers are max|Δ| / max|logit|. The limits stand in `tests/parity/tolerances.py`;
`tests/parity/test_grid.py` fails on any cell beyond its limit, and `tests/parity/test_reference.py` proves that each
case notices its trait."""


def page(grid: Grid) -> str:
    """The grid as Markdown."""
    lines = [_HEAD]
    for mode, about in MODES.items():
        here = [b for b in BACKENDS if (b, mode) not in about.absent]
        lines += ["", f"## {mode}: {about.what}", ""]
        lines.append("| case | " + " | ".join(here) + " |")
        lines.append("|---" * (len(here) + 1) + "|")
        for case in CACHED if mode == "cached" else CASES:
            cells = [_shown(grid.error(b, mode, case), mode) for b in here]
            lines.append(f"| {case} | " + " | ".join(cells) + " |")
        lines.append("| limit | " + " | ".join(_shown(grid.limit(b, mode), mode) for b in here) + " |")
        for why in dict.fromkeys(about.absent.values()):
            lines += ["", f"No {', '.join(b for (b, _), w in about.absent.items() if w == why)} here: {why}."]
    return "\n".join(lines) + "\n"


def _shown(value: float | None, mode: str) -> str:
    return "" if value is None else f"{value:.2f}" if mode == "bfloat16" else f"{value:.0e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/parity.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        grid = Grid(Path(folder))
        text = page(grid)
        print(text)
        if options.write:
            PAGE.write_text(text, encoding="utf-8")
        bad = [
            (backend, mode, case)
            for backend in BACKENDS
            for mode in MODES
            for case in CASES
            if (error := grid.error(backend, mode, case)) is not None and not error <= grid.limit(backend, mode)
        ]
    for cell in bad:
        print("beyond its limit: " + ", ".join(cell))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
