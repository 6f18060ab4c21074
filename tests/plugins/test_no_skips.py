"""The plugin that makes a skip a failure, in one process and in several. Budget: 20 s."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = {
    "passes": "def test_one(): pass\ndef test_two(): pass\n",
    "skips": "import pytest\ndef test_one(): pass\ndef test_two(): pytest.skip('so')\n",
    "module": "import pytest\npytest.skip('so', allow_module_level=True)\n",
    "nothing": "import pytest\ndef test_one(): pytest.skip('so')\n",
}


@pytest.mark.parametrize(
    ("names", "workers"),
    [("passes", 2), ("passes-skips", 2), ("passes-module", 2), ("nothing", 2), ("passes-module", 0)],
)
def test_a_skip_fails(tmp_path, names, workers):
    for name in names.split("-"):
        (tmp_path / f"test_{name}.py").write_text(FILES[name])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no_skips", "-n", str(workers), "--dist", "loadfile", "."]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path}
    )
    found = [line for line in done.stdout.splitlines() if "counts as a failure" in line]
    assert (done.returncode, len(found)) == ((0, 0) if names == "passes" else (1, 1)), done.stdout
