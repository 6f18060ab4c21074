"""Checkpoints of a run: ``checkpoints/step-000100/`` with everything that the next step depends on.

A checkpoint is state.safetensors (the loop's arrays) and state.json (step, position in the data, options, digests,
versions, size and CRC-32 of the arrays; a CRC-32 of itself). The folder is written under a temporary name, put on the
disk and renamed, so that a process or machine that stops at any moment leaves the earlier checkpoints whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from gemkit.cache import staged
from gemkit.errors import GemkitError
from gemkit.weights.hf.arrays import checksum, read_arrays, write_arrays
from gemkit.weights.json_file import read_object

ARRAYS, STATE = "state.safetensors", "state.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")
_LIBRARIES = ("gemkit", "numpy", "torch", "jax", "jaxlib", "optax", "keras", "tensorflow")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that are imported."""
    found = {name: getattr(sys.modules.get(name), "__version__", None) for name in _LIBRARIES}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


@dataclass(frozen=True)
class RunState:
    """State of a run between two steps, without the arrays of its loop.

    step: steps that are done, of `steps`. position: of the batches. options: as JSON. identity: digests of what the run
    was given, by name, such as "data set". seconds: that the run has taken.
    """

    step: int
    steps: int
    position: Mapping[str, object]
    options: Mapping[str, object]
    identity: Mapping[str, str]
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=versions)


class Checkpoints:
    """The checkpoints of one run. folder: of the run. keep: how many stay, the newest."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder / "checkpoints"
        self._keep = keep

    def save(self, state: RunState, arrays: Mapping[str, np.ndarray]) -> Path:
        """Write a checkpoint and delete old ones. Raises OSError; earlier checkpoints are then as they were."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        target = self.path(state.step)
        with staged(target) as temporary:
            temporary.mkdir()
            crc = write_arrays(temporary / ARRAYS, arrays)
            size = (temporary / ARRAYS).stat().st_size
            content = {"format": _FORMAT, **asdict(state), "arrays": {"bytes": size, "crc32": crc}}
            content["crc32"] = _crc_of(content)
            with open(temporary / STATE, "xb") as file:
                file.write((json.dumps(content, indent=2) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
            _sync(temporary)
            self._remove(target)  # a broken one; newest() chose an older
        _sync(self.folder)
        for step in [step for step in self._steps() if step <= state.step][: -self._keep]:
            self._remove(self.path(step))
        return target

    def newest(self, say: Callable[[str], None]) -> tuple[RunState, dict[str, np.ndarray]] | None:
        """Return the newest valid checkpoint, None without any; broken ones are skipped, each with a line to `say`."""
        for step in reversed(self._steps()):
            try:
                return self._read(self.path(step))
            except (OSError, GemkitError) as error:
                cause = str(error).replace(f"{self.path(step)}{os.sep}", "")
                say(f"checkpoint {self.path(step).name} is broken and skipped ({cause})")
        return None

    def exist(self) -> bool:
        """Return whether the folder has a checkpoint, broken or not."""
        return bool(self._steps())

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"step-{step:06}"

    def _read(self, path: Path) -> tuple[RunState, dict[str, np.ndarray]]:
        content = read_object(path / STATE)
        if content.pop("crc32", None) != _crc_of(content):
            raise GemkitError(f"{STATE} was changed")
        if content.pop("format") != _FORMAT:
            raise GemkitError(f"{STATE} has another format")
        wanted, file = content.pop("arrays"), path / ARRAYS
        if file.stat().st_size != wanted["bytes"] or checksum(file) != wanted["crc32"]:
            raise GemkitError(f"{ARRAYS} is not what was written")
        return RunState(**content), read_arrays(file)

    def _steps(self) -> list[int]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(int(match[1]) for name in os.listdir(self.folder) if (match := _NAME.fullmatch(name)))
        return []

    def _remove(self, path: Path) -> None:
        """Delete a checkpoint, under a temporary name: half deleted, it would look broken."""
        if path.exists():
            hidden = path.with_name(f".{path.name}.old")
            shutil.rmtree(hidden, ignore_errors=True)
            os.replace(path, hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def _sweep(self) -> None:
        """Delete what a killed process left of a write or of a deletion."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


def _crc_of(content: Mapping[str, object]) -> int:
    """Return the CRC-32 of JSON values, in whatever order and layout they were read."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _sync(folder: Path) -> None:
    """Put the names in a folder on the disk; Windows does so by itself."""
    if os.name != "nt":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
