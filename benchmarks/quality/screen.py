"""Frequency of wrong tokens by the head's screen, compared with the whole head, and rows left by it.

    python benchmarks/quality/screen.py --text english.txt code.py … [--model FILE] [--tokens 20000]

Each text is read token by token, four windows of it side by side. At every position the same step runs twice, with the
screen and without, for a greedy choice and for top-k 64 in turn; only the tokens that they choose are compared.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

import gemkit
from gemkit.engine.interface import build_batch
from gemkit.engine.sampling import Sampling

LANES, WINDOW = 4, 256
# Log-probabilities would need the whole head
SETTINGS = {
    "greedy": Sampling(temperature=0.0, logprobs=None),
    "top-k 64": Sampling(temperature=1.0, top_k=64, top_p=0.95, logprobs=None),
}


def windows(ids: np.ndarray, count: int) -> np.ndarray:
    """[count, LANES, WINDOW] pieces of a text, evenly spaced."""
    starts = np.linspace(1, len(ids) - WINDOW, count * LANES).astype(int)
    return np.stack([ids[start : start + WINDOW] for start in starts]).reshape(count, LANES, WINDOW)


def compare(model: gemkit.Model, part: np.ndarray) -> dict[str, tuple[int, int, list[int]]]:
    """By setting: tokens compared, tokens that differ, panels computed for each (-1: the whole head)."""
    runner = model.engine.runner
    pages = -(-WINDOW // runner.page_size)
    table = np.arange(LANES * pages, dtype=np.int32).reshape(LANES, pages)
    found = {name: (0, 0, []) for name in SETTINGS}
    for position in range(WINDOW):
        name = list(SETTINGS)[position % len(SETTINGS)]
        batch = build_batch(
            part[:, position : position + 1],
            [position] * LANES,
            (table,) * len(runner.groups),
            draws=[1] * LANES,
            sampling=tuple(replace(SETTINGS[name], seed=lane) for lane in range(LANES)),
            counters=[position] * LANES,
        )
        runner.use_screen(True)
        through = runner.step(batch).tokens.copy()
        counts = runner.take_screen_counts()
        runner.use_screen(False)
        whole = runner.step(batch).tokens
        compared, differ, all_counts = found[name]
        found[name] = compared + LANES, differ + int(np.sum(through != whole)), all_counts + counts
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=20_000, help="to compare, all texts together")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    count = max(1, round(options.tokens / len(options.text) / LANES / WINDOW))
    print(
        "| text | choice | tokens | other tokens | panels, median | p99 | whole head |\n|---|---|---|---|---|---|---|"
    )
    total = misses = 0
    with gemkit.load(options.model, threads=options.threads) as model:
        model.settle()
        runner = model.engine.runner
        if not runner.screen_bytes:
            raise SystemExit("this model's head has no screen")
        runner.reserve([LANES * -(-WINDOW // runner.page_size)] * len(runner.groups))
        for path in options.text:
            ids = np.array(model.tokenizer.encode(path.read_text(encoding="utf-8")[: 8 * options.tokens]), np.int32)
            if len(ids) <= WINDOW:
                raise SystemExit(f"{path} is too short: {WINDOW + 1} tokens are needed")
            sums = {name: (0, 0, []) for name in SETTINGS}
            for part in windows(ids, count):
                for name, values in compare(model, part).items():
                    sums[name] = tuple(a + b for a, b in zip(sums[name], values, strict=True))
            for name, (compared, differ, counts) in sums.items():
                panels = np.array(counts)
                if not len(panels):
                    raise SystemExit("the screen was not used: nothing was compared")
                share = np.mean(panels < 0)
                panels = panels[panels >= 0]
                print(
                    f"| {path.name} | {name} | {compared} | {differ} | {np.median(panels):.0f} | "
                    f"{np.quantile(panels, 0.99):.0f} | {share:.2%} |",
                    flush=True,
                )
                total, misses = total + compared, misses + differ
    print(f"\n{misses} of {total} tokens differ")
    return 1 if misses else 0


if __name__ == "__main__":
    raise SystemExit(main())
