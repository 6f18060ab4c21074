"""A pytest plugin for CI (`-p tests.plugins.no_skips`): a run that skipped anything, or ran nothing, fails.

With pytest-xdist the process that distributes the tests judges: reports of tests reach it, while files that a worker
skipped as it collected them do not, and are told at the worker's end.
"""

import pytest

_skipped: dict[str, None] = {}
_passed = 0


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _passed
    if report.skipped:
        _skipped[report.nodeid] = None
    elif report.when == "call" and report.passed:
        _passed += 1


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _skipped[report.nodeid] = None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    _skipped.update(dict.fromkeys(getattr(node, "workeroutput", {}).get("skipped", ())))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["skipped"] = list(_skipped)
    elif exitstatus == 0 and (_skipped or not _passed):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for nodeid in _skipped:
        terminalreporter.write_line(f"SKIPPED, which counts as a failure here: {nodeid}", red=True)
