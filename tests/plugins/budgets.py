"""A pytest plugin that holds each test file to the CPU time that its docstring states, as in "Budget: 10 s.".

CPU time, of the process and of those that it started and waited for, says nearly the same on a busy machine. Machines
differ, so a file fails the run only from `FACTOR` times its budget on; the table at the end shows the others.
A limit below `LEAST` seconds is not enforced, since the first test of a process pays for imports.
"""

import ast
import os
import re
from functools import cache
from pathlib import Path

import pytest

FACTOR = 3.0
LEAST = 20.0
ROWS = 12

_spent: dict[str, float] = {}


def budget_of(source: str) -> float | None:
    """Return the seconds that a test file's docstring allows it; None if it states none."""
    found = re.search(r"\bBudget: (\d+) (s|minutes)\b", ast.get_docstring(ast.parse(source)) or "")
    return None if not found else float(found[1]) * (60 if found[2] == "minutes" else 1)


def over(spent: float, budget: float) -> bool:
    """Say whether a file took so much longer than its budget that the run fails."""
    return spent > max(FACTOR * budget, LEAST)


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    now = _cpu_seconds()
    report.cpu_seconds = now - getattr(item.session, "_cpu_seconds", now)
    item.session._cpu_seconds = now
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.session._cpu_seconds = _cpu_seconds()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = report.nodeid.split("::")[0]
    _spent[path] = _spent.get(path, 0.0) + getattr(report, "cpu_seconds", 0.0)


@cache
def _budgets(root: Path) -> dict[str, float]:
    found = {path: budget_of((root / path).read_text(encoding="utf-8")) for path in _spent if (root / path).is_file()}
    return {path: budget for path, budget in found.items() if budget is not None}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    budgets = _budgets(session.config.rootpath)
    wrong = [path for path, budget in budgets.items() if over(_spent[path], budget)]
    if not hasattr(session.config, "workeroutput") and exitstatus == 0 and wrong:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    budgets = _budgets(config.rootpath)
    if not budgets:
        return
    total, allowed = sum(_spent[path] for path in budgets), sum(budgets.values())
    terminalreporter.section(f"CPU time: {total:.0f} s of {allowed:.0f} s in {len(budgets)} files")
    rows = sorted(budgets, key=lambda path: -_spent[path])
    for path in [*rows[:ROWS], *(path for path in rows[ROWS:] if _spent[path] > budgets[path])]:
        spent, budget = _spent[path], budgets[path]
        note = "FAILED: over the limit" if over(spent, budget) else "over its budget" if spent > budget else ""
        line = f"{spent:7.1f} s of {budget:4.0f} s  {path}  {note}".rstrip()
        terminalreporter.write_line(line, red=over(spent, budget), yellow=bool(note))
