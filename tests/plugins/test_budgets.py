"""The plugin that holds test files to their CPU time, in one process and in several. Budget: 15 s."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from plugins import budgets

ROOT = Path(__file__).parents[2]
SPIN = "import time\nend = time.process_time() + {}\ndef test_one():\n    while time.process_time() < end: pass\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_over_its_limit_fails_the_run(tmp_path, workers):
    quick = SPIN.format(0.2)
    for name, text in {"in": '"""Budget: 9 s."""\n', "over": '"""A. Budget: 1 s."""\n', "none": ""}.items():
        (tmp_path / f"test_{name}.py").write_text(text + (SPIN.format(1.3) if name == "over" else quick))
    code = "import sys, budgets, pytest; budgets.FACTOR, budgets.LEAST = 1.0, 0.0; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-q", "-p", "budgets", "-n", str(workers), "--dist", "loadfile", "."]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 1 and "3 passed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("FAILED: over the limit") == 1 and "of 10 s in 2 files" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("text", "seconds"), [("A. Budget: 10 s.", 10), ("Budget: 4 minutes on two cores", 240), ("No budget: 3 s", None)]
)
def test_the_docstring_states_the_budget(text, seconds):
    assert budgets.budget_of(f'"""{text}"""\n') == seconds


def test_every_test_file_has_a_budget():
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len(files) > 100
    assert not [path.relative_to(ROOT) for path in files if budgets.budget_of(path.read_text("utf-8")) is None]
