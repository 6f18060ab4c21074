"""Results of a run, as tables and as a dated section of RESULTS.md; goals and floors."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
UNITS = {"prefill": "tok/s", "decode": "tok/s", "deep": "tok/s", "batch": "tok/s", "first": "s", "memory": "MB"}
# Ratio to llama.cpp with 2 threads on the demo model that a change must not fall below (first token: not exceed).
FLOORS = {"decode": 1.8, "prefill": 2.0, "first": 0.7}
# What is wanted, by first word of the model, threads and kind of work: the ratio to each peer.
GOALS = {
    ("demo", 2, "decode"): {"llama.cpp": 3.0, "CTranslate2": 2.3},
    ("demo", 2, "deep"): {"llama.cpp": 3.0},
    ("demo", 2, "prefill"): {"llama.cpp": 4.5, "CTranslate2": 1.5},
    ("demo", 2, "batch"): {"llama.cpp": 3.5, "CTranslate2": 1.7},
    ("demo", 1, "decode"): {"llama.cpp": 3.0, "CTranslate2": 1.8},
    ("demo", 1, "prefill"): {"llama.cpp": 4.0, "CTranslate2": 1.4},
    ("Q8_0", 2, "decode"): {"llama.cpp": 2.5},
    ("Q8_0", 2, "prefill"): {"llama.cpp": 4.0},
    ("2B", 2, "decode"): {"llama.cpp": 1.5},
    ("2B", 2, "prefill"): {"llama.cpp": 2.5},
}
# And the share of this machine's limit.
SHARES = {("demo", 2, "decode"): 0.85, ("demo", 2, "prefill"): 0.3, ("2B", 2, "decode"): 0.9}


@dataclass(frozen=True)
class Row:
    """One measurement against one peer: (gemkit, peer) of every round, in UNITS[kind].

    limit: what this machine could do at most, in the same unit, and what limits it. floor: whether FLOORS apply.
    """

    threads: int
    kind: str
    name: str
    pairs: tuple[tuple[float, float], ...]
    limit: tuple[float, str] | None = None
    floor: bool = True
    model: str = "demo"
    against: str = "llama.cpp"
    need: dict[str, float] = field(default_factory=dict)

    @property
    def ours(self) -> float:
        return statistics.median(ours for ours, _ in self.pairs)

    @property
    def peer(self) -> float:
        return statistics.median(peer for _, peer in self.pairs)

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios)

    @property
    def ratios(self) -> list[float]:
        return [ours / peer for ours, peer in self.pairs]

    @property
    def share(self) -> float | None:
        return self.ours / self.limit[0] if self.limit else None

    @property
    def title(self) -> str:
        return self.name if self.model == "demo" else f"{self.model}: {self.name}"

    @property
    def _case(self) -> tuple[str, int, str]:
        return self.model.split()[0], self.threads, self.kind

    @property
    def goal(self) -> float | None:
        return GOALS.get(self._case, {}).get(self.against)

    @property
    def wanted_share(self) -> float | None:
        return SHARES.get(self._case)

    def failure(self) -> str | None:
        """Return the reason why this row misses its floor, or None."""
        held = self.floor and self.threads == 2 and self.model == "demo" and self.against == "llama.cpp"
        floor = FLOORS.get(self.kind) if held else None
        if floor is None or (self.ratio <= floor if self.kind == "first" else self.ratio >= floor):
            return None
        side = "at most" if self.kind == "first" else "at least"
        return f"{self.name}: {self.ratio:.2f} times the peer's with 2 threads, the floor is {side} {floor}"

    def record(self) -> dict:
        figures = {"ours": self.ours, "peer": self.peer, "ratio": self.ratio, "share": self.share, "goal": self.goal}
        return asdict(self) | figures

    @classmethod
    def of(cls, record: dict) -> Row:
        """The inverse of `record`."""
        pairs = tuple(tuple(pair) for pair in record["pairs"])
        limit = tuple(record["limit"]) if record["limit"] else None
        names = ("threads", "kind", "name", "floor", "model", "against", "need")
        return cls(pairs=pairs, limit=limit, **{name: record[name] for name in names})


def bound(need: dict[str, float], limits: dict[str, float]) -> tuple[float, str] | None:
    """The most tokens a second, and what limits them, of what one token needs (works.need) and of what this machine
    does: bandwidth in GB/s, int8 in 10^9 operations a second."""
    found = []
    if "bytes" in need:
        found.append((limits["bandwidth"] * 1e9 / need["bytes"], f"{limits['bandwidth']:.1f} GB/s"))
    if "operations" in need:
        found.append((limits["int8"] * 1e9 / need["operations"], f"{limits['int8']:.0f} GOPS int8"))
    return min(found, default=None)


def _verdict(wanted: float | None, value: float | None) -> str:
    return "" if wanted is None or value is None else ("met" if value >= wanted else "missed")


def table(rows: list[Row], peer: str) -> str:
    """The rows against one peer."""
    lines = [
        f"| threads | work | gemkit | {peer} | ratio | lowest–highest | goal | share of this machine's limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.against != peer:
            continue
        unit = UNITS[row.kind]
        digits = {"first": 3, "decode": 1, "deep": 1}.get(row.kind, 0)
        share = f"{row.share:.0%} of {row.limit[1]}" if row.limit else ""
        if verdict := _verdict(row.wanted_share, row.share):
            share += f" (goal {row.wanted_share:.0%}: {verdict})"
        goal = f"{row.goal:g}: {_verdict(row.goal, row.ratio)}" if row.goal else ""
        lines.append(
            f"| {row.threads} | {row.title} | {row.ours:.{digits}f} {unit} | {row.peer:.{digits}f} {unit} "
            f"| {row.ratio:.2f} | {min(row.ratios):.2f}–{max(row.ratios):.2f} | {goal} | {share} |"
        )
    return "\n".join(lines)


def tables(rows: list[Row], notes: dict[str, str]) -> str:
    """One table a peer; notes: by peer, what is to be said of it."""
    peers = dict.fromkeys(row.against for row in rows)
    return "\n\n".join(f"**{peer}** {notes.get(peer, '')}".strip() + "\n\n" + table(rows, peer) for peer in peers)


def machine() -> dict:
    """Return the machine's description: processor, cores, memory, system, commit."""
    facts = {"cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}", "processor": _processor()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return facts | {"commit": _commit()}


def _processor() -> str:
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in first.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields]
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_vnni") if flag in fields.get("flags", "").split()]
    return ", ".join([fields.get("model name", platform.machine()), *numbers, *vectors])


def _commit() -> str:
    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def section(rows: list[Row], facts: dict) -> str:
    """A dated section of RESULTS.md."""
    about = facts["machine"]
    lines = [
        f"\n## {datetime.date.today()}, {facts['model']}\n",
        f"- Machine: {about['processor']}; {about['cores']} cores, {about.get('memory_gib', '?')} GiB, "
        f"{about['system']}; load average {facts['load_before']:.2f} before, {facts['load_after']:.2f} after.",
        f"- {facts['ours']}, commit {about['commit']}.",
    ]
    lines += [f"- {version}. {facts['notes'].get(name, '')}".rstrip() for name, version in facts["peers"].items()]
    lines += [f"- Not measured: {name}: {reason}." for name, reason in facts["missing"].items()]
    for session, chosen in facts["chosen"].items():
        for name, flags in chosen.items():
            lines.append(f"- Best flags of {name}, {session}: {flags}.")
    lines.append(
        f"- Up to {facts['rounds']} rounds, the engines in turn; sampled: top-k 64, top-p 0.95, temperature 1. "
        "2B: the shape of Gemma 1 2B with random weights.\n"
    )
    return "\n".join(lines) + "\n" + tables(rows, facts["notes"]) + "\n"
