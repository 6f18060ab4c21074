"""Worker: gemkit's native core. Reads one JSON request a line, answers with one JSON line; see run.py."""

import json
import sys
import time

import numpy as np

from gemkit.engine.runner import Batch
from gemkit.engine.sampling import Sampling
from gemkit.models.native import NativeRunner
from gemkit.weights.gguf import read_gguf

GREEDY = Sampling(temperature=0.0)
NO_IDS = np.zeros(0, np.int32)


def batch(runner: NativeRunner, ids: list[int], position: int) -> Batch:
    pages = -(-(position + len(ids)) // runner.page_size)
    return Batch(
        np.array(ids, np.int32),
        np.array([0, len(ids)], np.int32),
        np.array([position], np.int32),
        tuple(np.arange(pages, dtype=np.int32)[None] for _ in runner.groups),
        np.array([True]),
        (GREEDY,),
        np.zeros(1, np.int64),
        (NO_IDS,),
        np.zeros(1, np.int32),
    )


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    with read_gguf(setup["model"]) as checkpoint:
        runner = NativeRunner(checkpoint.config, checkpoint.tensors, threads=setup["threads"])
    runner.reserve([32] * len(runner.groups))
    ids = setup["ids"]
    print(json.dumps({"version": f"gemkit, {runner.path}"}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "prefill":
            began = time.perf_counter()
            runner.step(batch(runner, ids[: request["tokens"]], 0))
        else:
            depth = request["depth"]
            token = int(runner.step(batch(runner, ids[:depth], 0)).tokens[0])
            began = time.perf_counter()
            for i in range(request["tokens"]):
                token = int(runner.step(batch(runner, [token], depth + i)).tokens[0])
        print(json.dumps({"rate": request["tokens"] / (time.perf_counter() - began)}), flush=True)


main()
