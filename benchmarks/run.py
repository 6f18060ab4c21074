"""Speed beside llama.cpp on this machine, same file, same token ids, in one interleaved run.

Each engine lives in a process of its own; only one works at a time, in turn, round after round. Medians are reported,
ratios are medians of the rounds' ratios. The peer's flags are swept first and the best are used. Run it on a machine
that does nothing else:

    make bench                                        # compiles llama.cpp for this machine, then runs this file
    python benchmarks/run.py --write                  # adds the table to benchmarks/RESULTS.md
    python benchmarks/run.py --check                  # exit code 1 below the floors
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Ratio to llama.cpp with 2 threads that a change must not fall below (first token: not exceed).
FLOORS = {"decode at depth 0": 1.8, "decode at depth 512": 1.8, "prefill 512": 2.0, "first token": 0.7}
DECODED = 64


class Worker:
    """An engine in its own process, asked over pipes."""

    def __init__(self, python: str, script: str, setup: dict):
        self.process = subprocess.Popen(
            [python, str(HERE / script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.version = self._ask(setup)["version"]

    def _ask(self, request: dict) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench: a worker stopped: {' '.join(self.process.args)}")
        return json.loads(line)

    def rate(self, **request: object) -> float:
        """Tokens per second."""
        return self._ask(request)["rate"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def sweep(python: str, setup: dict) -> dict:
    """The peer's best micro-batch and attention flag, by the prefill and decode rates of each."""
    best, best_rates = {}, {"prefill": 0.0, "decode": 0.0}
    for ubatch in (128, 256, 512):
        for flash in (False, True):
            worker = Worker(python, "worker_llama_cpp.py", setup | {"ubatch": ubatch, "flash": flash})
            worker.rate(do="prefill", tokens=512)
            prefill = max(worker.rate(do="prefill", tokens=512) for _ in range(2))
            decode = max(worker.rate(do="decode", depth=512, tokens=32) for _ in range(2))
            worker.close()
            print(
                f"  llama.cpp ubatch {ubatch:3} flash {flash!s:5}: prefill {prefill:6.1f}, decode {decode:5.1f}",
                flush=True,
            )
            for name, rate in (("prefill", prefill), ("decode", decode)):
                if rate > best_rates[name]:
                    best_rates[name], best[name] = rate, {"ubatch": ubatch, "flash": flash}
    return best


def first_token(python: str, script: str, model: str, threads: int, ids: list[int]) -> tuple[float, float]:
    """Seconds of a whole process up to its first token, and its peak resident memory in MB."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [python, str(HERE / script), model, str(threads), *map(str, ids[:16])],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    process.stdout.readline()
    seconds = time.perf_counter() - began
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"bench: {script} failed with exit code {process.returncode}")
    return seconds, usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024 * 1024)


def measure(options: argparse.Namespace, model: str, threads: int, ids: list[int]) -> tuple[list[dict], dict]:
    setup = {"model": model, "threads": threads, "ids": ids}
    print(f"{threads} thread{'s' if threads > 1 else ''}: sweeping the peer's flags", flush=True)
    best = sweep(options.peer_python, setup)
    ours = Worker(sys.executable, "worker_gemkit.py", setup)
    peers = {name: Worker(options.peer_python, "worker_llama_cpp.py", setup | flags) for name, flags in best.items()}
    tasks = {
        "decode at depth 0": {"do": "decode", "depth": 1, "tokens": DECODED},
        "decode at depth 512": {"do": "decode", "depth": 512, "tokens": DECODED},
        "prefill 512": {"do": "prefill", "tokens": 512},
    }
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in [*tasks, "first token", "peak memory"]}
    for round_number in range(options.rounds + 1):
        for name, request in tasks.items():
            pair = ours.rate(**request), peers[request["do"]].rate(**request)
            if round_number:  # the first round warms up
                samples[name].append(pair)
        mine = first_token(sys.executable, "first_gemkit.py", model, threads, ids)
        other = first_token(options.peer_python, "first_llama_cpp.py", model, threads, ids)
        if round_number:
            samples["first token"].append((mine[0], other[0]))
            samples["peak memory"].append((mine[1], other[1]))
        print(f"  round {round_number} of {options.rounds}", flush=True)
    rows = []
    for name, pairs in samples.items():
        mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        rows.append({"threads": threads, "what": name, "gemkit": mine, "llama.cpp": theirs, "ratio": ratio})
    facts = {"gemkit": ours.version, "peer": peers["decode"].version, "flags": best}
    for worker in (ours, *peers.values()):
        worker.close()
    return rows, facts


def limits(threads: int, model: str) -> dict:
    """The machine's read bandwidth and int8 peak, and what the model needs of them."""
    from gemkit import _native

    return {
        "bandwidth": _native.measure_bandwidth(threads),
        "int8": _native.measure_int8_peak(threads),
        "bytes": os.path.getsize(model),
    }


def share(row: dict, limit: dict, multiply_adds: int) -> str:
    if row["what"].startswith("decode"):
        return f"{row['gemkit'] * limit['bytes'] / 1e9 / limit['bandwidth']:.0%} of {limit['bandwidth']:.1f} GB/s"
    if row["what"].startswith("prefill"):
        return f"{row['gemkit'] * 2 * multiply_adds / 1e9 / limit['int8']:.0%} of {limit['int8']:.0f} GOPS"
    return ""


def table(rows: list[dict], machine: dict, multiply_adds: int) -> str:
    lines = [
        "| threads | work | gemkit | llama.cpp | ratio | share of this machine's limit |",
        "|---|---|---|---|---|---|",
    ]
    units = {"first token": "s", "peak memory": "MB"}
    for row in rows:
        unit = units.get(row["what"], "tok/s")
        digits = 2 if unit == "s" else 0 if unit == "MB" or row["what"].startswith("prefill") else 1
        mine, theirs = (f"{row[name]:.{digits}f} {unit}" for name in ("gemkit", "llama.cpp"))
        limit = share(row, machine[row["threads"]], multiply_adds)
        lines.append(f"| {row['threads']} | {row['what']} | {mine} | {theirs} | {row['ratio']:.2f} | {limit} |")
    return "\n".join(lines)


def below_floor(row: dict) -> bool:
    floor = FLOORS.get(row["what"])
    if floor is None:
        return False
    return row["ratio"] > floor if row["what"] == "first token" else row["ratio"] < floor


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        return f"{fields['model name']}, family {fields['cpu family']} model {fields['model']}"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a GGUF file; the demo model unless given")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-python", default=os.environ.get("GEMKIT_PEER_PYTHON", sys.executable))
    parser.add_argument("--write", action="store_true", help="add the table to RESULTS.md")
    parser.add_argument("--check", action="store_true", help="exit code 1 below the floors (2 threads)")
    options = parser.parse_args()

    from gemkit.arch.tensors import manifest
    from gemkit.weights.demo import demo_path
    from gemkit.weights.gguf import read_gguf

    model = options.model or str(demo_path())
    with read_gguf(model) as checkpoint:
        specs = manifest(checkpoint.config).values()
        # Of a prompt's tokens only the last needs the head
        body = sum(s.shape[0] * s.shape[1] for s in specs if len(s.shape) == 2 and "V" not in s.letters)
        vocabulary = checkpoint.config.vocab_size
    ids = [2, *(random.Random(0).randrange(1000, vocabulary - 1000) for _ in range(1023))]
    load_before = os.getloadavg()[0]
    rows, machine, facts = [], {}, {}
    for threads in options.threads:
        machine[threads] = limits(threads, model)
        more, facts[threads] = measure(options, model, threads, ids)
        rows += more
    text = table(rows, machine, body)
    print(text)
    if options.write:
        about = facts[options.threads[0]]
        section = (
            f"\n## {datetime.date.today()}, {Path(model).name}\n\n"
            f"{processor()}, {os.cpu_count()} cores; commit {commit()}; {about['gemkit']}; {about['peer']}, "
            f"flags {about['flags']}; medians of {options.rounds} rounds; load average {load_before:.2f} before, "
            f"{os.getloadavg()[0]:.2f} after.\n\n{text}\n"
        )
        with open(HERE / "RESULTS.md", "a", encoding="utf-8") as file:
            file.write(section)
    if options.check:
        slow = [row for row in rows if row["threads"] == 2 and below_floor(row)]
        for row in slow:
            print(f"{row['what']}: {row['ratio']:.2f} times llama.cpp, the floor is {FLOORS[row['what']]}")
        return 1 if slow else 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
