"""Checkpoints: they come back whole, broken ones are skipped, a full disk leaves the earlier ones. Budget: 3 s."""

import builtins
import errno
import json
import os
import random
import shutil

import numpy as np
import pytest

from gemkit.train.checkpoint import ARRAYS, STATE, Checkpoints, RunState
from gemkit.weights.hf import arrays as arrays_module


def state(step: int) -> RunState:
    return RunState(step, 100, {"epoch": 0, "batch": step}, {"lr": 1e-4, "betas": (0.9, 0.999)}, {"data set": "x"}, 1.5)


def arrays(step: int) -> dict[str, np.ndarray]:
    return {"w": np.full((3, 5), step, np.float32), "t": np.array(step), "random": np.arange(7, dtype=np.uint8)}


def newest(checkpoints: Checkpoints) -> tuple[int | None, list[str]]:
    """Step of the newest checkpoint, whose arrays are looked at, and what was said."""
    said: list[str] = []
    found = checkpoints.newest(said.append)
    if found is None:
        return None, said
    assert {name: array.tolist() for name, array in found[1].items()} == {
        name: array.tolist() for name, array in arrays(found[0].step).items()
    }
    return found[0].step, said


def test_what_is_written_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    assert newest(checkpoints) == (None, []) and not checkpoints.exist()
    path = checkpoints.save(state(7), arrays(7))
    assert path == tmp_path / "checkpoints" / "step-000007" and sorted(os.listdir(path)) == [STATE, ARRAYS]
    found, values = checkpoints.newest(pytest.fail)
    assert found.position == {"epoch": 0, "batch": 7} and found.seconds == 1.5 and found.identity == {"data set": "x"}
    assert found.options == {"lr": 1e-4, "betas": [0.9, 0.999]} and found.versions["numpy"] == np.__version__
    assert values["w"].dtype == np.float32 and values["t"].shape == ()


def test_the_newest_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, 3)
    for step in (5, 10, 999_990, 1_000_000, 1_000_010):
        checkpoints.save(state(step), arrays(step))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-1000000", "step-1000010", "step-999990"]
    assert newest(checkpoints)[0] == 1_000_010


def break_file(path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "flipped":
        data[-3] ^= 4
        path.write_bytes(data)
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("name", [ARRAYS, STATE])
@pytest.mark.parametrize("kind", ["cut", "flipped", "empty", "missing"])
def test_a_broken_checkpoint_is_skipped_with_one_line(tmp_path, name: str, kind: str):
    checkpoints = Checkpoints(tmp_path, 5)
    for step in (10, 20, 30):
        checkpoints.save(state(step), arrays(step))
    break_file(checkpoints.path(30) / name, kind)
    step, said = newest(checkpoints)
    assert step == 20 and len(said) == 1 and "\n" not in said[0]
    assert said[0].startswith("checkpoint step-000030 is broken and skipped (")
    checkpoints.save(state(30), arrays(30))  # in its place
    assert newest(checkpoints) == (30, [])


def test_every_byte_of_the_state_counts(tmp_path):
    checkpoints = Checkpoints(tmp_path, 5)
    path = checkpoints.save(state(10), arrays(10)) / STATE
    whole = path.read_bytes()
    content = json.loads(whole)
    content["position"]["batch"] += 1
    path.write_text(json.dumps(content))
    assert newest(checkpoints)[0] is None
    rng = random.Random(0)
    for at in rng.sample(range(len(whole)), 40):
        if not chr(whole[at]).isspace():
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert newest(checkpoints)[0] is None
    path.write_bytes(whole)
    assert newest(checkpoints)[0] == 10


class TinyDisk:
    """`open` on a disk that takes `free` bytes more."""

    def __init__(self, free: int) -> None:
        self.free = free

    def __call__(self, path, mode="r", **options):
        file = builtins.open(path, mode, **options)
        if "x" not in mode:
            return file
        disk = self

        class File:
            def write(self, data) -> int:
                size = memoryview(data).nbytes
                file.write(memoryview(data).cast("B")[: disk.free])
                disk.free -= min(size, disk.free)
                if not disk.free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return size

            def __getattr__(self, name: str):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *exception: object) -> None:
                file.close()

        return File()


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 1)
    path = checkpoints.save(state(10), arrays(10))
    needed = sum(file.stat().st_size for file in path.iterdir())
    for free in (1, 60, needed // 2, needed - 5):
        disk = TinyDisk(free)
        monkeypatch.setattr(arrays_module, "open", disk, raising=False)
        monkeypatch.setattr("gemkit.train.checkpoint.open", disk, raising=False)
        with pytest.raises(OSError, match="No space left on device"):
            checkpoints.save(state(20), arrays(20))
        assert os.listdir(tmp_path / "checkpoints") == ["step-000010"]
        assert newest(checkpoints) == (10, [])
    disk.free = 2 * needed
    checkpoints.save(state(20), arrays(20))
    assert newest(checkpoints) == (20, [])


def test_what_a_killed_process_left_is_deleted(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(state(10), arrays(10))
    shutil.copytree(checkpoints.path(10), tmp_path / "checkpoints" / ".step-000020.0123456789abcdef")
    assert newest(checkpoints) == (10, [])
    checkpoints.save(state(20), arrays(20))
    assert os.listdir(tmp_path / "checkpoints") == ["step-000020"]
