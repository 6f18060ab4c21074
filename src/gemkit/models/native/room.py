"""How much memory is left: Linux promises more than it has and then ends a program, so gemkit asks before it takes."""

from __future__ import annotations

import re
from pathlib import Path

from gemkit.errors import GemkitError

_GROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that this process may still take, swap and a container's bound included; None where Linux does not say."""
    facts = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE))
    if "MemAvailable" not in facts:
        return None
    free = int(facts["MemAvailable"]) + int(facts.get("SwapFree", 0)) << 10
    limit, used = (_read(_GROUP / f"memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        # The pages of files that the container read count as used, but make room
        files = re.search(r"^file (\d+)", _read(_GROUP / "memory.stat"), re.MULTILINE)
        free = min(free, max(0, int(limit) - int(used) + (int(files[1]) if files else 0)))
    return free


def check_room(what: str, need: int) -> None:
    """Raises GemkitError, with the core's own words, if so many bytes are more than there are."""
    free = free_memory()
    if free is not None and need > free:
        raise GemkitError(
            f"not enough memory for {what} ({need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free); "
            "close other programs or use a smaller model or context."
        )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
