"""Speed beside another engine on this machine: same file, same token ids, in turn within one run.

Each engine lives in a process of its own; only one works at a time, round after round. The peer's flags are swept first
and its best are used. Run it on a machine that does nothing else (Linux or macOS):

    make bench                                        # compiles llama.cpp for this machine, then runs this file
    python benchmarks/run.py --write                  # adds the table to benchmarks/RESULTS.md
    python benchmarks/run.py --check                  # exit code 1 below the floors
    python benchmarks/run.py --kernels                # only the quantised products, in GB/s and GOPS

The peer's interpreter is GEMKIT_PEER_PYTHON, by default that of .venv-bench, which `make bench` makes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from engines import OURS, Engine, Worker, first_token, llamacpp
from report import HERE, Row, machine, section, table

ROOT = HERE.parent


def sweep(peer: Engine, model: str, threads: int, prompt: list[int], quick: bool) -> dict[str, dict]:
    """The peer's best flags for prefill and for decode."""
    best: dict[str, tuple[float, dict]] = {}
    for flags in peer.flags[:1] if quick else peer.flags:
        worker = Worker(peer, model, threads, flags)
        seconds = {}
        for kind, request in {"prefill": {}, "decode": {"tokens": 4 if quick else 24}}.items():
            seconds[kind] = min(worker.ask(do=kind, ids=prompt, **request)["seconds"] for _ in range(1 if quick else 3))
            if kind not in best or seconds[kind] < best[kind][0]:
                best[kind] = seconds[kind], flags
        worker.close()
        print(
            f"  {peer.name} {flags}: prefill {seconds['prefill']:.3f} s, decode {seconds['decode']:.3f} s", flush=True
        )
    return {kind: flags for kind, (_, flags) in best.items()}


def best_first(peer: Engine, model: str, threads: int, ids: list[int], quick: bool) -> str:
    """The peer's fastest way to the first token."""
    seconds = {}
    for way, command in peer.first.items():
        runs = 1 if quick else 3
        seconds[way] = min(first_token(command(peer.python, model, threads, ids)) for _ in range(runs))
        print(f"  {peer.name} first token, {way}: {seconds[way]:.3f} s", flush=True)
    return min(seconds, key=seconds.get)


def measure(
    ours: Engine, peer: Engine, model: str, threads: int, options: argparse.Namespace
) -> tuple[list[Row], dict]:
    """All rows for one number of threads, and what was chosen."""
    length, tokens = (32, 8) if options.quick else (512, 64)
    print(f"{threads} thread{'s' if threads > 1 else ''}", flush=True)
    mine = Worker(ours, model, threads, {})
    about = mine.about

    def prompt(round_number: int) -> list[int]:
        # Every round has ids of its own, so that nothing can be kept from the one before
        draw = random.Random(round_number)
        low, high = about["vocabulary"] // 4, about["vocabulary"] * 3 // 4
        return [about["bos"], *(draw.randrange(low, high) for _ in range(length - 1))]

    flags = sweep(peer, model, threads, prompt(-1), options.quick)
    way = best_first(peer, model, threads, about["prompt"], options.quick)
    theirs = {"prefill": Worker(peer, model, threads, flags["prefill"])}
    same = flags["decode"] == flags["prefill"]
    theirs["decode"] = theirs["prefill"] if same else Worker(peer, model, threads, flags["decode"])
    ours_first = next(iter(ours.first.values()))(ours.python, model, threads, about["prompt"])
    peer_first = peer.first[way](peer.python, model, threads, about["prompt"])

    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    agreed = []
    for round_number in range(options.rounds + 1):
        ids = prompt(round_number)
        work = {
            f"decode {tokens} at depth 0": ("decode", ids[:1], tokens),
            f"decode {tokens} at depth {length}": ("decode", ids, tokens),
            f"prefill {length}": ("prefill", ids, 0),
        }
        found: dict[tuple[str, str], tuple[float, float]] = {}
        for name, (kind, start, count) in work.items():
            request = {"do": kind, "ids": start} | ({"tokens": count} if count else {})
            workers = [mine, theirs[kind]]
            # Who goes first changes with the round
            order = workers if round_number % 2 else workers[::-1]
            answers = {id(worker): worker.ask(**request) for worker in order}
            mine_answer, their_answer = answers[id(mine)], answers[id(theirs[kind])]
            done = count or len(start)
            found[kind, name] = done / mine_answer["seconds"], done / their_answer["seconds"]
            if kind == "decode":
                equal = [a == b for a, b in zip(mine_answer["ids"], their_answer["ids"], strict=True)]
                agreed.append([*equal, False].index(False))
        commands = [ours_first, peer_first]
        times = [first_token(command) for command in (commands if round_number % 2 else commands[::-1])]
        found["first", "first token"] = tuple(times if round_number % 2 else times[::-1])
        cold = first_token(ours_first, cold_cache=True)
        found["first", "first token, gemkit's cache empty"] = cold, found["first", "first token"][1]
        if round_number:  # the first round warms up
            for key, pair in found.items():
                pairs.setdefault(key, []).append(pair)
        print(f"  round {round_number} of {options.rounds}", flush=True)

    peaks = [worker.ask(do="memory")["megabytes"] for worker in (mine, *theirs.values())]
    pairs["memory", "peak memory"] = [(peaks[0], min(peaks[1:]))]
    # Measured last: they take memory of their own
    limits = [mine.ask(do="limits") for _ in range(2)]
    bandwidth, int8 = (max(limit[name] for limit in limits) for name in ("bandwidth", "int8"))
    bounds = {
        "decode": (bandwidth * 1e9 / about["token_bytes"], f"{bandwidth:.1f} GB/s"),
        "prefill": (int8 * 1e9 / (2 * about["body"]), f"{int8:.0f} GOPS int8"),
    }
    rows = [
        Row(threads, kind, name, tuple(found), bounds.get(kind), floor="empty" not in name)
        for (kind, name), found in pairs.items()
    ]
    chosen = flags | {"first token": way, "same greedy tokens before the first difference": agreed}
    facts = {"ours": about["version"], "peer": theirs["decode"].about["version"], "chosen": chosen}
    for worker in {id(worker): worker for worker in (mine, *theirs.values())}.values():
        worker.close()
    return rows, facts


def kernels() -> int:
    """Builds native/bench and runs it."""
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if cmake is None:
        raise SystemExit("bench: --kernels needs cmake: pip install cmake")
    build = ROOT / "build" / "bench"
    configure = [cmake, "-S", str(ROOT / "native"), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run([*configure, "-DGEMKIT_BUILD_BENCH=ON"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", str(build), "--target", "kernels"], check=True, stdout=subprocess.DEVNULL)
    return subprocess.run([str(build / "kernels")]).returncode


def peer_python() -> str:
    python = os.environ.get("GEMKIT_PEER_PYTHON") or str(ROOT / ".venv-bench" / "bin" / "python")
    if shutil.which(python) is None:
        raise SystemExit(f"bench: there is no {python}: run `make bench`, or set GEMKIT_PEER_PYTHON")
    return python


def main(arguments: list[str] | None = None, ours: Engine = OURS, peer: Engine | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a GGUF file; the demo model unless given")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="short prompts and no sweep: only to see that it runs")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench.json", help="where the figures go")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md", help="what --write adds to")
    parser.add_argument("--write", action="store_true", help="add the table to RESULTS.md")
    parser.add_argument("--check", action="store_true", help="exit code 1 below the floors (2 threads)")
    parser.add_argument("--kernels", action="store_true", help="time the quantised products alone")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or min(options.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    if options.check and 2 not in options.threads:
        parser.error("--check needs 2 among --threads: the floors are for two threads")
    if options.kernels:
        return kernels()

    peer = peer or llamacpp(peer_python())
    model = options.model
    if model is None:
        from gemkit.weights.demo import demo_path

        model = str(demo_path())
    began, load_before = time.perf_counter(), os.getloadavg()[0]
    if load_before > 0.5:
        print(f"the load average is {load_before:.2f}: something else runs here, the figures will be off", flush=True)
    rows, facts = [], {}
    for threads in options.threads:
        more, facts[threads] = measure(ours, peer, model, threads, options)
        rows += more
    about = {
        "model": Path(model).name,
        "machine": machine(),
        "ours": facts[options.threads[0]]["ours"],
        "peer": facts[options.threads[0]]["peer"],
        "peer_name": peer.name,
        "chosen": {threads: found["chosen"] for threads, found in facts.items()},
        "rounds": options.rounds,
        "quick": options.quick,
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "seconds": time.perf_counter() - began,
    }
    print(table(rows, peer.name))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(about | {"rows": [row.record() for row in rows]}, indent=1), encoding="utf-8")
    if options.write:
        with open(options.results, "a", encoding="utf-8") as file:
            file.write(section(rows, about))
    failures = [failure for row in rows if (failure := row.failure())] if options.check else []
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
