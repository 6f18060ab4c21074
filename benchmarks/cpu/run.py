"""Speed against other engines on this machine: the same model, the same token ids, in turn within one run.

Each engine lives in a process of its own; only one works at a time, round after round. The flags of a peer that has any
are swept first and its best are used. Run it on a machine that does nothing else (Linux or macOS):

    make bench                                        # installs the peers, then runs this file and plots.py
    python benchmarks/cpu/run.py --resume                 # goes on where a run was interrupted
    python benchmarks/cpu/run.py --work decode prefill --peers llama.cpp --threads 2
    python benchmarks/cpu/run.py --write                  # adds the tables to benchmarks/RESULTS.md
    python benchmarks/cpu/run.py --check                  # exit code 1 below the floors
    python benchmarks/cpu/run.py --kernels                # only the quantised products, in GB/s and GOPS
    python benchmarks/cpu/run.py --scaling                # gemkit alone: batch 1 to 32, depth 0 to 32,000

The peers' interpreters are GEMKIT_PEER_PYTHON and GEMKIT_PEER_PYTHON_OPENVINO, by default those of .venv-bench and
.venv-bench/openvino, which `make bench` makes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import scaling
from engines import ABSENT, OURS, PEERS, ROOT, Engine, Gone, Worker, first_token, installed
from files import Files
from report import HERE, Row, bound, machine, section, tables
from works import GREEDY, GROUPS, Session, Task, need, prompt, request, sessions

NEAR = 1.02  # flags that are so near to the best are as good, if they save a process


def rates(task: Task, answer: dict) -> dict[str, float]:
    """Tokens a second by way."""
    if task.kind == "decode":
        return {way: task.tokens / seconds for way, seconds in zip(task.ways, answer["seconds"], strict=False)}
    done = task.size if task.kind == "prefill" else task.sequences * task.tokens
    return {GREEDY: done / answer["seconds"]}


def shortened(task: Task, session: Session) -> Task:
    """The same work, enough of it to choose flags by."""
    most = 128 if session.model.startswith("2B") else 256 if task.kind == "decode" else 512
    return dataclasses.replace(task, size=min(task.size, most), tokens=min(task.tokens, 24), ways=(GREEDY,))


def sweep(peer: Engine, model: str, session: Session, about: dict, quick: bool) -> dict[str, dict]:
    """The peer's best flags for each kind of work of a session."""
    wanted: dict[str, Task] = {}
    for task in session.tasks:
        # The longest prompt up to 512 represents a kind
        if task.kind in ("decode", "prefill", "batch") and task.size <= 512:
            wanted[task.kind] = max(wanted.get(task.kind, task), task, key=lambda one: (one.size, -one.sequences))
    choices = peer.choices(session)
    if len(choices) == 1 or not wanted:
        return dict.fromkeys(wanted or ("decode",), choices[0])
    seconds: dict[str, list[float]] = {kind: [] for kind in wanted}
    times = 1 if quick or session.model.startswith("2B") else 2
    for flags in choices[:1] if quick else choices:
        worker = Worker(peer, model, session.threads, flags, session.context, session.sequences)
        for kind, task in wanted.items():
            part = shortened(task, session)
            asked = request(part, about, -1)
            found = [1 / rates(part, worker.ask(**asked))[GREEDY] for _ in range(times)]
            seconds[kind].append(min(found))
        worker.close()
        shown = ", ".join(f"{kind} {1 / values[-1]:.1f} tok/s" for kind, values in seconds.items())
        print(f"  {peer.name} {flags}: {shown}", flush=True)
    best = {kind: choices[values.index(min(values))] for kind, values in seconds.items()}
    for kind, values in seconds.items():
        for flags in best.values():
            if values[choices.index(flags)] <= NEAR * min(values):
                best[kind] = flags
                break
    return best


def best_first(peer: Engine, model: str, threads: int, ids: list[int], quick: bool) -> str:
    """The peer's fastest way to the first token."""
    seconds = {}
    for way, command in peer.first.items():
        runs = 1 if quick else 2
        seconds[way] = min(first_token(command(peer.python, model, threads, ids)) for _ in range(runs))
        print(f"  {peer.name} first token, {way}: {seconds[way]:.3f} s", flush=True)
    return min(seconds, key=seconds.get)


class Rival:
    """A peer in one session: a process for each choice of flags that is best for something."""

    def __init__(self, engine: Engine, model: str, session: Session, about: dict, saved: dict, quick: bool) -> None:
        self.engine, self.model = engine, model
        self.flags = saved.get("flags") or sweep(engine, model, session, about, quick)
        self.workers: list[Worker] = []
        self.agreed: list[int] = saved.get("agreed", [])
        self.way: str | None = saved.get("first token")
        for flags in self.flags.values():
            if all(worker.flags != flags for worker in self.workers):
                self.workers.append(Worker(engine, model, session.threads, flags, session.context, session.sequences))

    def worker(self, kind: str) -> Worker:
        flags = self.flags.get(kind) or next(iter(self.flags.values()))
        return next(worker for worker in self.workers if worker.flags == flags)

    def chosen(self) -> dict:
        found: dict = {"flags": self.flags}
        if self.agreed:
            found["agreed"] = self.agreed
        return found | ({"first token": self.way} if self.way else {})

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


class Run:
    """A whole run; its state is in the JSON file after every task."""

    def __init__(self, options: argparse.Namespace, ours: Engine, peers: list[Engine], missing: dict[str, str]) -> None:
        self.options, self.ours, self.peers = options, ours, peers
        self.rows: list[Row] = []
        self.state: dict = {"chosen": {}, "limits": {}, "peers": {}, "notes": {}, "missing": missing, "seconds": 0.0}
        if options.resume and options.json.exists():
            old = json.loads(options.json.read_text(encoding="utf-8"))
            self.rows = [Row.of(record) for record in old["rows"]]
            # Who was missing then may be there now
            kept = ("chosen", "limits", "peers", "notes", "seconds", "ours")
            self.state |= {key: old[key] for key in kept if key in old}
        self.began = time.perf_counter() - self.state["seconds"]
        self.files = Files(options.model, options.quick)

    def save(self, **about: object) -> None:
        self.state |= about
        self.state["seconds"] = time.perf_counter() - self.began
        target = self.options.json
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}")
        record = self.state | {"rows": [row.record() for row in self.bounded()]}
        part.write_text(json.dumps(record, indent=1), encoding="utf-8")
        part.replace(target)

    def bounded(self) -> list[Row]:
        """The rows with this machine's limits."""
        found = []
        for row in self.rows:
            limits = self.state["limits"].get(str(row.threads))
            found.append(dataclasses.replace(row, limit=bound(row.need, limits) if limits else None))
        return found

    def lacks(self, session: Session, task: Task, peer: Engine) -> bool:
        if not peer.can(session, task):
            return False
        names = [name for way, name in task.names().items() if way in peer.ways]
        there = {row.name for row in self.rows if self._same(row, session, peer)}
        return any(name not in there for name in names)

    @staticmethod
    def _same(row: Row, session: Session, peer: Engine) -> bool:
        return (row.model, row.threads, row.against) == (session.model, session.threads, peer.name)

    def session(self, session: Session) -> None:
        wanted = {task: [peer for peer in self.peers if self.lacks(session, task, peer)] for task in session.tasks}
        if not any(wanted.values()):
            return
        title = f"{session.model}, {session.threads} thread{'s' if session.threads > 1 else ''}"
        title += f", {session.kind}" if session.kind else ""
        print(f"{title} ({time.perf_counter() - self.began:.0f} s so far)", flush=True)
        model = self.files.gguf(session.model)
        mine = Worker(self.ours, model, session.threads, {}, session.context, session.sequences)
        self.limits(session.threads, model)
        self.state["ours"] = mine.about["version"]
        saved = self.state["chosen"].setdefault(title, {})
        rivals: dict[str, Rival] = {}
        try:
            for peer in dict.fromkeys(peer for peers in wanted.values() for peer in peers):
                try:
                    theirs = self.files.of(peer, session.model)
                    quick = self.options.quick
                    rival = Rival(peer, theirs, session, mine.about, saved.get(peer.name, {}), quick)
                except SystemExit as reason:
                    self.drop(peer.name, f"{title}: {reason}")
                    continue
                rivals[peer.name] = rival
                self.state["peers"][peer.name] = rival.workers[0].about["version"]
                self.state["notes"][peer.name] = peer.note
            for worker in (mine, *(worker for rival in rivals.values() for worker in rival.workers)):
                worker.ask(do="decode", ids=prompt(mine.about, -2, 16), tokens=4, ways=[GREEDY])
            for task in session.tasks:
                others = {peer.name: rivals[peer.name] for peer in wanted[task] if peer.name in rivals}
                if others:
                    self.task(session, task, model, mine, others)
                for name, rival in others.items():
                    saved[name] = rival.chosen()
                    if self.state["missing"].get(name, "").startswith(title):
                        rivals.pop(name, None)
                self.save()
        finally:
            for each in (mine, *rivals.values()):
                each.close()

    def drop(self, name: str, reason: str) -> None:
        print(f"  left out: {name}: {reason}", flush=True)
        self.state["missing"][name] = reason

    def limits(self, threads: int, model: str) -> None:
        """Measured in a process of its own, since it takes memory; the best of all times counts."""
        worker = Worker(self.ours, model, threads, {})
        found = [worker.ask(do="limits") for _ in range(2)]
        worker.close()
        if old := self.state["limits"].get(str(threads)):
            found.append(old)
        self.state["limits"][str(threads)] = {key: max(one[key] for one in found) for key in ("bandwidth", "int8")}

    def add(self, session: Session, task: Task, name: str, against: str, pairs: list, floor: bool = True) -> None:
        kind = "deep" if task.group == "deep" else task.kind
        needed = need(task, self.about)
        key = (session.model, session.threads, name, against)
        self.rows = [row for row in self.rows if (row.model, row.threads, row.name, row.against) != key]
        row = Row(session.threads, kind, name, tuple(pairs), None, floor, session.model, against, needed)
        self.rows.append(row)
        print(f"    {name} against {against}: {row.ours:.4g} to {row.peer:.4g}, {row.ratio:.2f} times", flush=True)

    def task(self, session: Session, task: Task, model: str, mine: Worker, rivals: dict[str, Rival]) -> None:
        """All rounds of a task, and its rows."""
        self.about = mine.about
        if task.kind == "first":
            return self.first(session, task, model, mine, rivals)
        if task.kind == "memory":
            return self.memory(session, task, mine, rivals)
        rounds = min(self.options.rounds, task.rounds)
        pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for number in range(0 if task.warm and not self.options.quick else 1, rounds + 1):
            asked = request(task, mine.about, number)
            everyone = [("", mine), *((name, rival.worker(task.kind)) for name, rival in rivals.items())]
            turn = number % len(everyone)  # who goes first changes with the round
            answers: dict[str, dict] = {}
            for name, worker in everyone[turn:] + everyone[:turn]:
                ways = [way for way in task.ways if way in worker.engine.ways]
                try:
                    answers[name] = worker.ask(**asked | ({"ways": ways} if task.kind == "decode" else {}))
                except Gone as reason:
                    if not name:
                        raise
                    self.drop(name, f"{session.model}, {task.names()[GREEDY]}: {reason}")
                    rivals.pop(name)
            own = rates(task, answers[""])
            for name, rival in rivals.items():
                if task.kind == "decode":
                    equal = [a == b for a, b in zip(answers[""]["ids"], answers[name]["ids"], strict=True)]
                    rival.agreed.append([*equal, False].index(False))
                if number:
                    for way, rate in rates(task, answers[name]).items():
                        pairs.setdefault((name, way), []).append((own[way], rate))
        for (name, way), found in pairs.items():
            if name in rivals:
                self.add(session, task, task.names()[way], name, found)

    def first(self, session: Session, task: Task, model: str, mine: Worker, rivals: dict[str, Rival]) -> None:
        ids, threads = mine.about["prompt"], session.threads
        own = next(iter(self.ours.first.values()))(self.ours.python, model, threads, ids)
        for name, rival in rivals.items():
            rival.way = rival.way or best_first(rival.engine, rival.model, threads, ids, self.options.quick)
            other = rival.engine.first[rival.way](rival.engine.python, rival.model, threads, ids)
            warm, cold = [], []
            for number in range(self.options.rounds + 1):
                order = [own, other] if number % 2 else [other, own]
                times = [first_token(command) for command in order]
                times = times if number % 2 else times[::-1]
                empty = first_token(own, cold_cache=True)
                if number:
                    warm.append(tuple(times))
                    cold.append((empty, times[1]))
            self.add(session, task, "first token", name, warm)
            self.add(session, task, "first token, gemkit's cache empty", name, cold, floor=False)

    def memory(self, session: Session, task: Task, mine: Worker, rivals: dict[str, Rival]) -> None:
        """After a prompt and an answer of the usual length."""
        asked = request(dataclasses.replace(task, kind="decode"), mine.about, 0)

        def peak(worker: Worker) -> float:
            worker.ask(**asked)
            return worker.ask(do="memory")["megabytes"]

        own = peak(mine)
        for name, rival in rivals.items():
            self.add(session, task, "peak memory", name, [(own, min(map(peak, rival.workers)))])


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


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a GGUF file; the demo model, and other types and shapes, unless given")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=3, help="at most; the long tasks have fewer")
    parser.add_argument("--work", nargs="+", choices=GROUPS, default=list(GROUPS), help="what to measure")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), help="peers to compare with; by default all")
    parser.add_argument("--quick", action="store_true", help="short prompts and no sweep: only to see that it runs")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --json and measure what it lacks")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench.json", help="where the figures go")
    parser.add_argument("--results", type=Path, default=HERE.parent / "RESULTS.md", help="what --write adds to")
    parser.add_argument("--write", action="store_true", help="add the tables to RESULTS.md")
    parser.add_argument("--check", action="store_true", help="exit code 1 below the floors (2 threads)")
    parser.add_argument("--kernels", action="store_true", help="time the quantised products alone")
    parser.add_argument("--scaling", action="store_true", help="gemkit alone by batch and depth, to build/scaling.json")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or min(options.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    if options.check and 2 not in options.threads:
        parser.error("--check needs 2 among --threads: the floors are for two threads")
    return options


def main(arguments: list[str] | None = None, ours: Engine = OURS, peers: list[Engine] | None = None) -> int:
    options = arguments_of(arguments)
    if options.kernels:
        return kernels()
    missing: dict[str, str] = {}
    if peers is None and not options.scaling:
        peers, missing = installed(options.peers)
        for name, reason in missing.items():
            print(f"left out: {name}: {reason}", flush=True)
        missing |= ABSENT
    own_file = options.model is not None
    if not own_file:
        from gemkit.hub.demo import demo_path

        options.model = str(demo_path())
    if options.scaling:
        return scaling.measure(ours, options.model, options.threads, options.quick, options.json)
    load_before = os.getloadavg()[0]
    if load_before > 0.5:
        print(f"the load average is {load_before:.2f}: something else runs here, the figures will be off", flush=True)
    run = Run(options, ours, peers, missing)
    about = {
        "model": Path(options.model).name,
        "machine": machine(),
        "rounds": options.rounds,
        "quick": options.quick,
        "load_before": load_before,
    }
    for session in sessions(options.threads, tuple(options.work), options.quick, own_file):
        run.session(session)
    for threads in {row.threads for row in run.rows}:
        run.limits(threads, options.model)
    run.save(**about, load_after=os.getloadavg()[0])
    rows = run.bounded()
    print(tables(rows, run.state["notes"]))
    for name, reason in run.state["missing"].items():
        print(f"not measured: {name}: {reason}")
    if options.write:
        with open(options.results, "a", encoding="utf-8") as file:
            file.write(section(rows, run.state))
    failures = [failure for row in rows if (failure := row.failure())] if options.check else []
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
