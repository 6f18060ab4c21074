"""The GPU benchmark runs, here on the CPU with models of no size, and goes on after a failure. Budget: 40 s."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own that has not the native module, as on a machine where none was built."""
    code = (
        "import sys, runpy\n"
        "sys.modules['gemkit._native'] = None\n"
        f"sys.argv = ['run.py', *{list(arguments)!r}]\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks' / 'gpu')!r})\n"
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'gpu' / 'run.py')!r}, run_name='__main__')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


def test_rates_ratios_shares_and_failures(tmp_path):
    target = tmp_path / "gpu.md"
    options = ["--device", "cpu", "--tiny", "--models", "gemma-9", "gemma-2b", "--dtypes", "bfloat16", "int4"]
    done = run(*options, "--batches", "2", "--prefill", "16", "--json", "--output", str(target))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["copy_bytes_per_second"] > 0 and found["product_operations_per_second"] > 0
    failed = [row for row in found["rows"] if "error" in row]
    assert [(row["model"], row["dtype"]) for row in failed] == [("gemma-9", "bfloat16"), ("gemma-9", "int4")]
    assert all("gemma-9" in row["error"] for row in failed)
    rows = {(row["dtype"], row["work"], row["engine"]): row for row in found["rows"] if "error" not in row}
    all_engines, ours = ["torch", "jax", "transformers eager", "transformers compiled"], ["torch", "jax"]
    assert set(rows) == {
        (dtype, work, engine)
        for dtype, engines in (("bfloat16", all_engines), ("int4", ours))
        for work in ("prefill 16", "decode batch 2")
        for engine in engines
    }
    for (_, work, _), row in rows.items():
        assert round(row["rate"] * row["seconds"], 6) == (16 if work.startswith("prefill") else 2)
        assert row["ratio"] > 0 and row["share"] > 0
    assert rows["bfloat16", "prefill 16", "transformers compiled"]["ratio"] == 1
    amount = {dtype: rows[dtype, "decode batch 2", "torch"]["amount"] for dtype in ("bfloat16", "int4")}
    assert amount["int4"] < amount["bfloat16"]
    table = target.read_text(encoding="utf-8")
    assert "| gemma-2b | int4 | decode batch 2 | torch |" in table and "| gemma-9 | int4 | all | all |" in table
