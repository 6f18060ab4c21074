"""SIGKILL at many points of a run, also within checkpoint writes: the end is the same. Budget: 40 s."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemkit.train.metrics import read_metrics

OPTIONS = {"lr": 0.1, "steps": 24, "save_every": 1, "eval_every": 5, "grad_accum": 2, "log_every": 1}
BALLAST = 1_000_000  # 4 MB of the checkpoint: most of the time is spent in writing
ENVIRONMENT = os.environ | {
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
}


def start(folder: Path, ballast: int, kill_at: int = 0) -> subprocess.Popen:
    command = [sys.executable, str(Path(__file__).with_name("toy.py")), str(folder)]
    command += [json.dumps(OPTIONS | {"ballast": ballast}), str(kill_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def end_of(folder: Path) -> tuple[bytes, dict, list[tuple]]:
    """Return arrays and position of the last checkpoint, and the figures of all steps."""
    path = folder / "checkpoints" / f"step-{OPTIONS['steps']:06}"
    state = json.loads((path / "state.json").read_text())
    figures = [(r.step, r.loss, r.validation_loss, r.lr) for r in read_metrics(folder / "metrics.csv")]
    return (path / "state.safetensors").read_bytes(), {name: state[name] for name in ("step", "position")}, figures


def writes(folder: Path) -> set[str]:
    """Temporary names of checkpoints that are, or were, being written."""
    folder = folder / "checkpoints"
    return {name for name in os.listdir(folder) if name.startswith(".step")} if folder.exists() else set()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, tuple]:
    found = {}
    for ballast in (0, BALLAST):
        folder = tmp_path_factory.mktemp("run")
        process = start(folder, ballast)
        assert process.wait(60) == 0, process.stderr.read()
        found[ballast] = end_of(folder)
    assert [figure[0] for figure in found[0][2]] == list(range(OPTIONS["steps"] + 1))
    return found


def test_killed_between_any_two_file_operations(tmp_path, undisturbed):
    rng, kills = random.Random(1), 0
    while True:
        process = start(tmp_path, 0, rng.randint(10, 64))
        errors = process.communicate(timeout=60)[1]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        kills += 1
        assert "broken" not in errors  # a checkpoint is whole or absent
    assert kills >= 10
    assert end_of(tmp_path) == undisturbed[0]
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".")]


def test_killed_at_any_time(tmp_path, undisturbed):
    rng, kills, left = random.Random(2), 0, set()
    while True:
        process = start(tmp_path, BALLAST)
        assert process.stdout.readline() == "ready\n"
        if kills % 2:
            time.sleep(rng.uniform(0.0, 0.1))
        else:
            while process.poll() is None and not writes(tmp_path) - left:
                time.sleep(0.0005)
        if kills < 12:
            process.kill()
        errors = process.communicate(timeout=60)[1]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        assert "broken" not in errors
        kills += 1
        left |= writes(tmp_path)
    assert kills >= 8 and len(left) >= 3  # some within the write of a checkpoint
    assert end_of(tmp_path) == undisturbed[BALLAST]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_ctrl_c_ends_the_program_with_its_code(tmp_path, undisturbed):
    process = start(tmp_path, BALLAST)
    assert process.stdout.readline() == "ready\n"
    while not (tmp_path / "metrics.csv").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and errors.splitlines()[-1].endswith("--resume goes on from there")
    process = start(tmp_path, BALLAST)
    assert process.wait(60) == 0, process.stderr.read()
    assert end_of(tmp_path) == undisturbed[BALLAST]
