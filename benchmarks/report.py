"""What a run found, as a table and as a dated section of RESULTS.md, and the floors it is held to."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
UNITS = {"prefill": "tok/s", "decode": "tok/s", "first": "s", "memory": "MB"}
# Ratio to the peer with 2 threads that a change must not fall below (first token: not exceed).
FLOORS = {"decode": 1.8, "prefill": 2.0, "first": 0.7}


@dataclass(frozen=True)
class Row:
    """One measurement: (gemkit, peer) of every round, in UNITS[kind]; limit: what this machine could do at most, in the
    same unit, and what limits it. floor: whether FLOORS apply."""

    threads: int
    kind: str
    name: str
    pairs: tuple[tuple[float, float], ...]
    limit: tuple[float, str] | None = None
    floor: bool = True

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

    def failure(self) -> str | None:
        """Why this row misses its floor, or None."""
        floor = FLOORS.get(self.kind) if self.floor and self.threads == 2 else None
        if floor is None or (self.ratio <= floor if self.kind == "first" else self.ratio >= floor):
            return None
        side = "at most" if self.kind == "first" else "at least"
        return f"{self.name}: {self.ratio:.2f} times the peer's with 2 threads, the floor is {side} {floor}"

    def record(self) -> dict:
        return asdict(self) | {"ours": self.ours, "peer": self.peer, "ratio": self.ratio, "share": self.share}


def table(rows: list[Row], peer: str) -> str:
    lines = [
        f"| threads | work | gemkit | {peer} | ratio | lowest–highest | share of this machine's limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        unit = UNITS[row.kind]
        digits = {"first": 3, "decode": 1}.get(row.kind, 0)
        share = f"{row.share:.0%} of {row.limit[1]}" if row.limit else ""
        lines.append(
            f"| {row.threads} | {row.name} | {row.ours:.{digits}f} {unit} | {row.peer:.{digits}f} {unit} "
            f"| {row.ratio:.2f} | {min(row.ratios):.2f}–{max(row.ratios):.2f} | {share} |"
        )
    return "\n".join(lines)


def machine() -> dict:
    """What is being measured on: processor, cores, memory, system, commit."""
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
        f"- {facts['peer']}.",
    ]
    for threads, chosen in facts["chosen"].items():
        lines.append(f"- Best flags with {threads} thread{'s' if int(threads) > 1 else ''}: {chosen}.")
    lines.append(f"- {facts['rounds']} rounds, the engines in turn.\n")
    return "\n".join(lines) + "\n" + table(rows, facts["peer_name"]) + "\n"
