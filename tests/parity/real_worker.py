"""The demo model on one implementation, in float32, against logits that transformers left; prints the result as JSON.

Usage: python real_worker.py BACKEND FOLDER, FOLDER with ``ids.npy`` and ``logits.npy``.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine.batches import PAGES, one

from gemkit.engine.interface import Runner
from gemkit.hub.demo import demo_path
from gemkit.weights.gguf.read import read_gguf

STEP = 128


def new_runner(backend: str) -> Runner:
    checkpoint = read_gguf(demo_path())
    arguments = checkpoint.config, checkpoint.tensors
    match backend.split("-")[0]:
        case "native":
            from gemkit.models.native import NativeRunner

            return NativeRunner(*arguments, threads=2, activations="float32")
        case "torch":
            from gemkit.models.torch import load_runner

            return load_runner(*arguments, device="cpu", dtype="float32", threads=2)
        case "jax":
            from gemkit.models.jax import load_runner

            return load_runner(*arguments, device="cpu", dtype="float32")
        case _:
            from gemkit.models.keras import load_runner

            return load_runner(*arguments, dtype="float32")


def main() -> None:
    backend, folder = sys.argv[1], Path(sys.argv[2])
    ids, expected = np.load(folder / "ids.npy"), np.load(folder / "logits.npy", mmap_mode="r")
    start = time.perf_counter()
    runner = new_runner(backend)
    loaded = time.perf_counter()
    runner.reserve([PAGES] * len(runner.groups))
    largest = scale = 0.0
    changed = []  # margins of the reference's argmax where the backend has another
    for first in range(0, len(ids), STEP):
        part = ids[first : first + STEP]
        logits = runner.logits(one(runner, part, first))
        for row, wanted in zip(logits, expected[first : first + STEP], strict=True):
            largest, scale = max(largest, float(np.abs(row - wanted).max())), max(scale, float(np.abs(wanted).max()))
            if (mine := row.argmax()) != (theirs := wanted.argmax()):
                changed.append(float(wanted[theirs] - wanted[mine]))
    error = largest / scale if np.isfinite(largest) else float("inf")
    print(
        json.dumps(
            {
                "error": error,
                "scale": scale,
                "changed": changed,
                "load": round(loaded - start, 1),
                "run": round(time.perf_counter() - loaded, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
