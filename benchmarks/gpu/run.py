"""Speed of the torch and JAX implementations on a GPU, against transformers, with random weights, in one run.

Engines take turns, round after round, and each answer is on the host before the clock is read. Of every figure the
median counts. A measurement that fails says why in its row, and the rest goes on.

    PYTHONPATH=src python benchmarks/gpu/run.py                        # one CUDA device, all models, types and batches
    PYTHONPATH=src python benchmarks/gpu/run.py --models gemma-2b --dtypes bfloat16 int4 --seconds 500 --output gpu.md
    PYTHONPATH=src python benchmarks/gpu/run.py --device cpu --tiny      # to see that it runs

The limit of prefill is a large bfloat16 product of this device, that of decode a large copy (bytes read and written),
both measured first; a decode step reads the weights and the cache. transformers runs in bfloat16 alone: the ratio of
an 8- or 4-bit row is to its bfloat16. The native core need not be built.
"""

from __future__ import annotations

import os

# JAX would take three quarters of the memory, and torch runs in the same process
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import contextlib
import dataclasses
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from engines import ENGINES, Work

from gemkit.arch.config import ModelConfig
from gemkit.arch.presets import preset

MODELS = ("gemma-2b", "gemma-7b", "gemma-3-1b-pt")
DTYPES = ("bfloat16", "int8", "int4")
PEER = "transformers compiled"


def tiny(config: ModelConfig) -> ModelConfig:
    """A model of the same kind that takes no time."""
    layers = config.layers[-2:]
    small = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
    }
    return dataclasses.replace(config, num_hidden_layers=len(layers), layers=layers, **small)


def median_seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    def sync() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(rounds + 2):
        sync()
        began = time.perf_counter()
        work()
        sync()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def limits(device: torch.device, small: bool) -> dict[str, float]:
    """Bytes per second of a copy, and operations per second of a bfloat16 product."""
    source = torch.zeros((1 << 20) if small else (1 << 31), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / median_seconds(lambda: target.copy_(source), device, 10)
    size = 256 if small else 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return {"copy": copied, "product": 2 * size**3 / median_seconds(lambda: a @ b, device, 10)}


def decode_bytes(config: ModelConfig, weights: int, work: Work, width: int = 2) -> int:
    """Bytes that a decode step reads: the weights once, and of each sequence the keys and values in sight."""
    row = 2 * config.num_key_value_heads * config.head_dim * width
    seen = sum(min(work.depth, layer.sliding_window or work.depth) for layer in config.layers)
    return weights + work.batch * row * seen


def prefill_operations(config: ModelConfig, work: Work) -> int:
    """Two for each parameter of the layers and token, and those of causal attention."""
    body = config.parameter_counts().non_embedding
    pairs = sum(sum(min(i + 1, layer.sliding_window or i + 1) for i in range(work.depth)) for layer in config.layers)
    return 2 * body * work.depth + 4 * config.num_attention_heads * config.head_dim * pairs


@contextlib.contextmanager
def reported(rows: list[dict], row: dict) -> Iterator[None]:
    """Whatever goes wrong becomes a row."""
    try:
        yield
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        rows.append(row | {"error": f"{type(error).__name__}: {text[:160]}"})
        print(f"  {row}: {rows[-1]['error']}", file=sys.stderr, flush=True)


def measure(name: str, config: ModelConfig, dtype: str, options: argparse.Namespace, until: float) -> list[dict]:
    """All rows of a model in one type."""
    rows: list[dict] = []
    works = [Work("prefill", 1, length) for length in options.prefill]
    works += [Work("decode", batch, options.depth) for batch in options.batches]
    engines = []
    for kind in options.engines:
        if kind.startswith("transformers") and dtype != "bfloat16":
            continue
        with reported(rows, {"model": name, "dtype": dtype, "engine": kind, "work": "load"}):
            engines.append(ENGINES[kind](config, dtype, options.device))
    for work in works:
        seconds: dict[str, list[float]] = {}
        broken = set()
        for round_number in range(options.rounds + 1):
            for engine in engines:
                row = {"model": name, "dtype": dtype, "engine": engine.name, "work": str(work)}
                if engine.name in broken:
                    continue
                if time.monotonic() > until:
                    if round_number < 2:
                        rows.append(row | {"error": "not run: out of time"})
                    broken.add(engine.name)
                    continue
                began = time.monotonic()
                broken.add(engine.name)
                with reported(rows, row):
                    found = engine.run(work, options.tokens)
                    broken.discard(engine.name)
                    if round_number:  # the first round compiles and warms up
                        seconds.setdefault(engine.name, []).append(found)
                    else:
                        took = time.monotonic() - began
                        print(
                            f"  {name} {dtype} {engine.name} {work}: warm in {took:.1f} s", file=sys.stderr, flush=True
                        )
        for engine in engines:
            if engine.name in seconds:
                spent = statistics.median(seconds[engine.name])
                row = {"model": name, "dtype": dtype, "engine": engine.name, "work": str(work), "seconds": spent}
                row["rate"] = (work.batch if work.kind == "decode" else work.depth) / spent
                limit = decode_bytes(config, engine.token_bytes, work) if work.kind == "decode" else None
                row["amount"] = limit or prefill_operations(config, work)
                rows.append(row)
    for engine in engines:
        engine.close()
    torch._dynamo.reset()  # it would stop compiling after the eighth shape of a model's class
    return rows


def finish(rows: list[dict], limit: dict[str, float]) -> None:
    """Adds ratio and share."""
    peers = {(r["model"], r["work"]): r["rate"] for r in rows if r["engine"] == PEER and "rate" in r}
    for row in rows:
        if "rate" in row:
            best = limit["copy"] if row["work"].startswith("decode") else limit["product"]
            row["share"] = row["amount"] / row["seconds"] / best
            peer = peers.get((row["model"], row["work"]))
            row["ratio"] = row["rate"] / peer if peer else None


def table(rows: list[dict]) -> str:
    lines = [
        f"| model | type | work | engine | tokens/s | ms a step | ratio to {PEER} | share of the limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['model']} | {row['dtype']} | {row['work']} | {row['engine']} |"
        if "error" in row:
            lines.append(f"{head} {row['error'].replace('|', '/')} | | | |")
            continue
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"{head} {row['rate']:.1f} | {1e3 * row['seconds']:.3f} | {ratio} | {row['share']:.0%} |")
    return "\n".join(lines)


def report(about: dict) -> str:
    versions = ", ".join(f"{key} {about[key]}" for key in ("torch", "jax", "transformers") if key in about)
    copies, products = about["copy_bytes_per_second"] / 1e9, about["product_operations_per_second"] / 1e12
    limits = f"copies {copies:.0f} GB/s, bfloat16 products {products:.1f} TFLOP/s"
    return f"{about['device']}: {limits}; {versions}; {about['seconds']:.0f} s\n\n{table(about['rows'])}"


def machine(device: torch.device) -> dict:
    facts = {"python": platform.python_version(), "torch": torch.__version__}
    for module in ("jax", "transformers"):
        with contextlib.suppress(ImportError):
            facts[module] = __import__(module).__version__
    cuda = device.type == "cuda"
    return facts | {"device": torch.cuda.get_device_name(device) if cuda else platform.machine()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", help=f"presets: {' '.join(MODELS)} unless given")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--batches", type=int, nargs="+", help="of decode: 1 8 32 unless given")
    parser.add_argument("--prefill", type=int, nargs="+", help="lengths: 512 2048 unless given")
    parser.add_argument("--depth", type=int, help="at which decode starts: 512 unless given")
    parser.add_argument("--tokens", type=int, help="decoded in a round: 32 unless given")
    parser.add_argument("--rounds", type=int, help="5 unless given")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after so many seconds")
    parser.add_argument("--tiny", action="store_true", help="models without size: only to see that it runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    parser.add_argument(
        "--output", type=Path, help="a file for the table, if its name ends in .md, else for the JSON object"
    )
    options = parser.parse_args(arguments)
    small = {"models": MODELS[:1], "batches": [1, 2], "prefill": [32], "depth": 32, "tokens": 4, "rounds": 1}
    usual = {"models": MODELS, "batches": [1, 8, 32], "prefill": [512, 2048], "depth": 512, "tokens": 32, "rounds": 5}
    for key, value in (small if options.tiny else usual).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    began = time.monotonic()
    device = torch.device(options.device)
    if options.tiny:
        torch.set_num_threads(1)
    rows: list[dict] = []
    limit = limits(device, options.tiny)
    for name in options.models:
        for dtype in options.dtypes:
            with reported(rows, {"model": name, "dtype": dtype, "engine": "all", "work": "all"}):
                config = preset(name).config
                config = tiny(config) if options.tiny else config
                rows += measure(name, config, dtype, options, began + options.seconds)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finish(rows, limit)
    about = machine(device) | {
        "copy_bytes_per_second": limit["copy"],
        "product_operations_per_second": limit["product"],
    }
    about |= {"rounds": options.rounds, "seconds": time.monotonic() - began, "rows": rows}
    texts = {True: json.dumps(about, indent=1), False: report(about)}
    print(texts[options.json])
    if options.output:
        options.output.write_text(texts[options.output.suffix != ".md"] + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
