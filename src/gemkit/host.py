"""The machine as this process may use it: CPUs and memory, with the bounds of a container (cgroup v2)."""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path

from gemkit.errors import GemkitError

_GROUP = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Return how many logical CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Return how many CPUs' time a container may use, such as 1.5; None without a quota."""
    limit, _, period = read(_GROUP / "cpu.max").strip().partition(" ")
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() and int(period) else None


def default_threads() -> int:
    """Return the physical cores that this process may use, at most a container's quota; without Linux, its CPUs."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, getattr(os, "process_cpu_count", os.cpu_count)() or 1)
    cpus = os.sched_getaffinity(0)
    siblings = {read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) for cpu in cpus}
    count = len(cpus) if "" in siblings else len(siblings)
    quota = cpu_quota()
    return max(1, count if quota is None else min(count, math.ceil(quota)))


def system_memory() -> tuple[int | None, int | None]:
    """Return the total and available bytes of the machine; None where the system does not tell."""
    sizes = _meminfo()
    if "MemTotal" in sizes:
        return sizes["MemTotal"], sizes.get("MemAvailable", sizes.get("MemFree", 0))
    if sys.platform == "win32":
        import ctypes

        # MEMORYSTATUSEX: two 32-bit numbers, then seven 64-bit ones, of which total and available come first
        status = (ctypes.c_uint64 * 8)()
        ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
        if ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status)):
            return int(status[1]), int(status[2])
        return None, None
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None, None
    try:
        return total, page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return total, total  # macOS gives memory back as it is asked for


def container_memory() -> tuple[int, int] | None:
    """Return the bytes that a container may take in all, and those that are left of them; None without a bound."""
    limit, used = (read(_GROUP / f"memory.{name}").strip() for name in ("max", "current"))
    if not limit.isdigit() or not used.isdigit():
        return None
    # The pages of files that the container read count as used, but are dropped when memory is asked for
    files = re.search(r"^file (\d+)", read(_GROUP / "memory.stat"), re.MULTILINE)
    return int(limit), max(0, int(limit) - int(used) + (int(files[1]) if files else 0))


def free_memory() -> int | None:
    """Return the bytes that this process may still take, swap and a container's bound included; None without Linux."""
    sizes = _meminfo()
    if "MemAvailable" not in sizes:
        return None
    free = sizes["MemAvailable"] + sizes.get("SwapFree", 0)
    container = container_memory()
    return free if container is None else min(free, container[1])


def check_memory(what: str, need: int) -> None:
    """Raise GemkitError, in the words of the C++ core, if `need` bytes are more than are free.

    Linux promises more memory than it has and then ends a program, so it is asked before memory is taken.
    """
    free = free_memory()
    if free is not None and need > free:
        raise GemkitError(
            f"not enough memory for {what} ({need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free); "
            "close other programs or use a smaller model or context."
        )


def peak_memory() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    if sys.platform == "win32":
        import ctypes

        # PROCESS_MEMORY_COUNTERS: cb and PageFaultCount (32 bits each), then PeakWorkingSetSize and seven more sizes.
        counters = (ctypes.c_size_t * (9 if ctypes.sizeof(ctypes.c_size_t) == 8 else 10))()
        kernel = ctypes.WinDLL("kernel32")
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        process = ctypes.c_void_p(kernel.GetCurrentProcess())
        kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), ctypes.sizeof(counters))
        return counters[1 if ctypes.sizeof(ctypes.c_size_t) == 8 else 2]
    if found := re.search(r"^VmHWM:\s+(\d+) kB", read(Path("/proc/self/status")), re.MULTILINE):
        return int(found[1]) << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read(path: Path) -> str:
    """Return the text of a file of the system; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except (OSError, ValueError):
        return ""


def _meminfo() -> dict[str, int]:
    found = re.findall(r"^(\w+):\s+(\d+) kB", read(Path("/proc/meminfo")), re.MULTILINE)
    return {name: int(size) << 10 for name, size in found}
