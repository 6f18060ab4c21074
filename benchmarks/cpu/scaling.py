"""gemkit alone by batch and by depth: whether there are cliffs. `run.py --scaling` calls it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from engines import Engine, Worker
from report import bound, machine
from works import Task, need, request

BATCHES = (1, 2, 4, 8, 16, 32)
DEPTHS = (0, 512, 2048, 8192, 16384, 32000)
ROUNDS = 3


def tasks(quick: bool) -> list[Task]:
    size, tokens = (8, 4) if quick else (128, 32)
    found = [Task("batch", size, tokens, sequences=n) for n in (BATCHES[:2] if quick else BATCHES)]
    depths = (0, 32) if quick else DEPTHS
    return found + [Task("decode", depth or 1, tokens) for depth in depths]


def measure(ours: Engine, model: str, threads: list[int], quick: bool, results: Path) -> int:
    """Write scaling.json next to the figures of the main run: rates by threads and batch, and by threads and depth."""
    record: dict = {"model": Path(model).name, "machine": machine(), "limits": {}, "batch": [], "depth": []}
    for count in threads:
        worker = Worker(ours, model, count, {}, max(DEPTHS) + 128, max(BATCHES))
        about = worker.about
        record["ours"] = about["version"]
        record["limits"][str(count)] = limits = worker.ask(do="limits")
        for task in tasks(quick):
            # A long prompt is read once
            rounds = 1 if quick or task.size > 2048 else ROUNDS
            answers = [worker.ask(**request(task, about, number)) for number in range(rounds)]
            ceiling = (bound(need(task, about), limits) or (None,))[0]
            if task.kind == "batch":
                seconds = statistics.median(answer["seconds"] for answer in answers)
                row = {"batch": task.sequences, "rate": task.sequences * task.tokens / seconds}
            else:
                seconds = statistics.median(answer["seconds"][0] for answer in answers)
                row = {"depth": task.depth, "rate": task.tokens / seconds}
                if task.depth and "first" in answers[0]:
                    row["prefill"] = task.size / statistics.median(answer["first"][0] for answer in answers)
            row |= {"threads": count, "limit": ceiling}
            record["batch" if task.kind == "batch" else "depth"].append(row)
            print(f"  {row}", flush=True)
        worker.close()
        target = results.with_name("scaling.json")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return 0
