"""Runs every case on one implementation and leaves the logits in a file.

Usage: python grid_worker.py BACKEND FOLDER, in an environment that `grid` makes. FOLDER has ``expected.npz``; the
result is ``BACKEND.npz`` with one array [T, V] for each mode and case, named "mode/case".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine.batches import PAGES, make_batch, one
from parity.cases import CASES, Case, tokens
from parity.grid import CACHED, MODES, stored

from gemkit.engine.interface import Runner
from gemkit.weights.checkpoint import Checkpoint

# Tiny models with windows of 12 and 16: cuts inside, at and beyond them, single tokens, and a neighbour in each step
CUTS = (5, 16, 1, 1, 33, 1, 15)


def modes(backend: str) -> Iterator[tuple[str, Case, np.ndarray]]:
    """All that the backend has."""
    run = BACKENDS[backend]
    for mode in MODES:
        if (backend, mode) in MODES[mode].absent:
            continue
        for name in CACHED if mode == "cached" else CASES:
            case = CASES[name]
            yield f"{mode}/{name}", run(mode, case, stored(case, mode))


def weights(case: Case, params: dict[str, np.ndarray]) -> dict:
    return Checkpoint.from_params(case.config, params).tensors


def cached(runner: Runner, case: Case) -> np.ndarray:
    """Logits [T, V] of the case's tokens, cut into chunks, with another sequence in every step."""
    ids, other = case.tokens(), tokens(case.config, case.length, 99)
    assert sum(CUTS) == case.length
    runner.reserve([2 * PAGES] * len(runner.groups))
    rows, at = [], 0
    for turn, count in enumerate(CUTS):
        parts = [(1, ids[at : at + count], at), (0, other[at : at + count], at)]
        first = turn % 2 * count
        rows.append(runner.logits(make_batch(runner, parts[:: -1 if turn % 2 else 1]))[first : first + count])
        at += count
    return np.concatenate(rows)


def run_native(mode: str, case: Case, params: dict[str, np.ndarray]) -> np.ndarray:
    from gemkit.models.native import NativeRunner

    runner = NativeRunner(case.config, weights(case, params), threads=2, activations="float32")
    if mode == "cached":
        return cached(runner, case)
    runner.reserve([PAGES] * len(runner.groups))
    return runner.logits(one(runner, case.tokens(), 0))


def run_transformers(mode: str, case: Case, params: dict[str, np.ndarray]) -> np.ndarray:
    import torch
    from parity import transformers_models as hf

    torch.set_num_threads(1)
    model = hf.build(case.config, params, getattr(torch, mode))
    hf.exact_buffers(model, case.config)
    ids = torch.from_numpy(case.tokens())[None]
    with torch.inference_mode():
        if mode != "float64":
            return model(ids).logits[0].float().numpy()
        with hf.Float64Throughout():
            return model(ids).logits[0].numpy()


def run_torch(mode: str, case: Case, params: dict[str, np.ndarray]) -> np.ndarray:
    import torch

    from gemkit.models.torch import load_decoder, load_runner

    torch.set_num_threads(1)
    if mode == "cached":
        return cached(load_runner(case.config, weights(case, params), device="cpu", dtype="float32", threads=1), case)
    decoder = load_decoder(case.config, weights(case, params), getattr(torch, mode))
    if mode == "float64":
        decoder = decoder.double()
    with torch.inference_mode():
        logits = decoder(torch.from_numpy(case.tokens())[None])[0]
    return logits.float().numpy() if mode != "float64" else logits.numpy()


def run_jax(mode: str, case: Case, params: dict[str, np.ndarray]) -> np.ndarray:
    import jax
    import jax.numpy as jnp

    from gemkit.models.jax import Decoder, load_decoder, load_runner

    if mode == "cached":
        return cached(load_runner(case.config, weights(case, params), device="cpu", dtype="float32"), case)
    decoder = load_decoder(case.config, weights(case, params), getattr(jnp, mode), jax.devices("cpu")[0])
    if mode == "float64":
        decoder = replace(jax.tree.map(lambda value: value.astype(jnp.float64), decoder), dtype=jnp.float64)
    ids = case.tokens()[None].astype(np.int32)
    return np.asarray(jax.jit(Decoder.__call__)(decoder, ids)[0])


def run_keras(mode: str, case: Case, params: dict[str, np.ndarray]) -> np.ndarray:
    import keras

    from gemkit.models.keras import load_decoder, load_runner

    if mode == "cached":
        return cached(load_runner(case.config, weights(case, params), dtype="float32"), case)
    decoder = load_decoder(case.config, weights(case, params), mode)
    ids = case.tokens()[None].astype(np.int32)
    return keras.ops.convert_to_numpy(keras.ops.stop_gradient(decoder(ids)))[0]


BACKENDS: dict[str, Callable[[str, Case, dict[str, np.ndarray]], np.ndarray]] = {
    "transformers": run_transformers,
    "native": run_native,
    "torch": run_torch,
    "jax": run_jax,
    "keras-jax": run_keras,
    "keras-torch": run_keras,
    "keras-tensorflow": run_keras,
}


def main() -> None:
    backend, folder = sys.argv[1], Path(sys.argv[2])
    if "torch" in backend:
        import torch

        torch.set_num_threads(1)  # tiny models: threads would wait for each other longer than they work
    np.savez(folder / f"{backend}.npz", **dict(modes(backend)))


if __name__ == "__main__":
    main()
