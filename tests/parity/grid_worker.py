"""Runs every case on one implementation and leaves the logits in a file.

Usage: python grid_worker.py BACKEND FOLDER, in an environment that `grid` makes. FOLDER has ``expected.npz``; the
result is ``BACKEND.npz`` with one array [T, V] for each mode and case, named "mode/case".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from parity.cases import CASES, Case, tokens
from parity.grid import CACHED, MODES, stored

from gemkit.engine.runner import Batch, Runner
from gemkit.engine.sampling import Sampling
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
    size, groups = runner.page_size, len(runner.groups)
    pages = -(-case.length // size)
    runner.reserve([2 * pages] * groups)
    table = np.stack([np.arange(pages) + pages, np.arange(pages)]).astype(np.int32)
    assert sum(CUTS) == case.length
    rows, at = [], 0
    for turn, count in enumerate(CUTS):
        parts = [ids[at : at + count], other[at : at + count]]
        order = [0, 1] if turn % 2 else [1, 0]
        parts = [parts[b] for b in order]
        batch = Batch(
            tokens=np.concatenate(parts).astype(np.int32),
            starts=np.array([0, count, 2 * count], np.int32),
            positions=np.full(2, at, np.int32),
            pages=(np.ascontiguousarray(table[order]),) * groups,
            sample=np.zeros(2, bool),
            sampling=(Sampling(),) * 2,
            counters=np.zeros(2, np.int64),
            history=(np.zeros(0, np.int32),) * 2,
            prompt_lengths=np.zeros(2, np.int32),
        )
        first = order.index(0) * count
        rows.append(runner.logits(batch)[first : first + count])
        at += count
    return np.concatenate(rows)


def run_native(mode: str, case: Case, params: dict[str, np.ndarray]) -> np.ndarray:
    from gemkit.models.native import NativeRunner

    runner = NativeRunner(case.config, weights(case, params), threads=2, activations="float32")
    return cached(runner, case) if mode == "cached" else whole(runner, case)


def whole(runner: Runner, case: Case) -> np.ndarray:
    pages = -(-case.length // runner.page_size)
    runner.reserve([pages] * len(runner.groups))
    return runner.logits(
        Batch(
            tokens=case.tokens().astype(np.int32),
            starts=np.array([0, case.length], np.int32),
            positions=np.zeros(1, np.int32),
            pages=(np.arange(pages, dtype=np.int32)[None],) * len(runner.groups),
            sample=np.zeros(1, bool),
            sampling=(Sampling(),),
            counters=np.zeros(1, np.int64),
            history=(np.zeros(0, np.int32),),
            prompt_lengths=np.zeros(1, np.int32),
        )
    )


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

    from gemkit.models.torch import TorchRunner, load_decoder

    torch.set_num_threads(1)
    if mode == "cached":
        return cached(TorchRunner(case.config, weights(case, params), device="cpu", dtype="float32", threads=1), case)
    decoder = load_decoder(case.config, weights(case, params), getattr(torch, mode))
    if mode == "float64":
        decoder = decoder.double()
    with torch.inference_mode():
        logits = decoder(torch.from_numpy(case.tokens())[None])[0]
    return logits.float().numpy() if mode != "float64" else logits.numpy()


def run_jax(mode: str, case: Case, params: dict[str, np.ndarray]) -> np.ndarray:
    import jax
    import jax.numpy as jnp

    from gemkit.models.jax import JaxRunner, forward, load_params

    if mode == "cached":
        return cached(JaxRunner(case.config, weights(case, params), device="cpu", dtype="float32"), case)
    loaded = load_params(case.config, weights(case, params), getattr(jnp, mode), jax.devices("cpu")[0])
    if mode == "float64":
        loaded = {name: value.astype(jnp.float64) for name, value in loaded.items()}
    ids = case.tokens()[None].astype(np.int32)
    return np.asarray(jax.jit(forward, static_argnums=0)(case.config, loaded, ids)[0][0])


def run_keras(mode: str, case: Case, params: dict[str, np.ndarray]) -> np.ndarray:
    import keras

    from gemkit.models.keras import KerasRunner, load_decoder

    if mode == "cached":
        return cached(KerasRunner(case.config, weights(case, params), dtype="float32"), case)
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
