"""`examine`: what this machine has, what is wrong with it, and which published Gemmas run on it.

Nothing here needs the C++ core or the network: a machine on which the core does not load is the one that asks.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from gemkit import __version__
from gemkit.apps import memory
from gemkit.cache import cache_dir
from gemkit.errors import GemkitError
from gemkit.extras import install, reinstall, requirements

# The core's kernels by processor; it takes the first that the processor can run.
COMPILED = {"x86_64": ("avx512", "avx2", "portable"), "aarch64": ("neon", "portable")}
_NEEDED = {"avx512": {"avx512f", "avx512bw", "avx512_vnni"}, "avx2": {"avx2", "fma", "f16c"}, "neon": {"asimddp"}}
_INTERESTING = ("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni")
_INTERESTING += ("avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2")

_VARIABLE = re.compile(r"(GEMKIT|HF|KAGGLE|KAGGLEHUB|HUGGING_FACE|TRANSFORMERS)_\w+|XDG_CACHE_HOME|KERAS_BACKEND")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|AUTH|CRED|USERNAME")
_PLAIN = re.compile(r"\w+_(HOME|CACHE|DIR|OFFLINE|ENDPOINT|BACKEND|TIMEOUT)|GEMKIT_\w+")

_LOW_DISK = 2 << 30

# Frameworks that run the same weights, by the name to install them under.
FRAMEWORKS = ("torch", "transformers", "jax", "keras", "keras-hub", "tensorflow")


@dataclass(frozen=True)
class Problem:
    """Something to mend. what: one line; remedy: what to do about it."""

    what: str
    remedy: str


def examine(model: str | None = None, measure: Callable[[int], float] | None = None) -> dict[str, Any]:
    """Everything about this machine, ready for JSON.

    model: a model's path, to see whether it fits. measure: takes a number of threads and gives the read bandwidth in
    GB/s; without it no rates are predicted. Raises GemkitError if there is no such model or it cannot be read.
    """
    problems: list[Problem] = []
    processor = _processor()
    _settings(problems)
    report: dict[str, Any] = {
        "gemkit": __version__,
        "python": platform.python_version(),
        "system": _system(),
        "processor": processor,
        "native": _native(problems, processor["instructions"]),
        "memory": _memory(problems),
        "folders": _folders(problems),
        "tokens": tokens(problems),
        "cache": _cache(problems),
        "variables": variables(os.environ),
        "frameworks": [{"name": name, "version": _version(name)} for name in FRAMEWORKS],
        "extras": extras(),
        "bandwidth": None,
    }
    if measure is not None:
        try:
            report["bandwidth"] = measure(processor["threads"])
        except (ImportError, OSError) as error:
            problems.append(Problem(f"the bandwidth could not be measured ({error})", "mend the core first"))
    free = report["memory"]["available"]
    report["models"] = memory.models(free, report["bandwidth"])
    report["model"] = None
    if model is not None:
        report["model"] = memory.fit(model, free, report["bandwidth"])
        if report["model"]["fits"] is False:
            need = report["model"]["total"]
            problems.append(
                Problem(
                    f"{model} needs {need / 1e9:.1f} GB with its whole context; {free / 1e9:.1f} GB are free",
                    "give a smaller --ctx-size, take a smaller type (Q4_0, Q4_K), or close other programs",
                )
            )
    report["problems"] = [{"what": problem.what, "remedy": problem.remedy} for problem in problems]
    return report


# --- the machine -----------------------------------------------------------------------------------------------------


def _system() -> str:
    return f"{platform.system()} {platform.release()} ({platform.machine()})"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def machine() -> str:
    """The processor's family under its Linux name."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def _processor() -> dict[str, Any]:
    from gemkit.loading import default_threads

    info = _read("/proc/cpuinfo")
    found = re.search(r"^(?:model name|Hardware|CPU part)\s*:\s*(.+)$", info, re.MULTILINE)
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)[:1]).split())
    name = found[1] if found else _mac_processor() or platform.processor() or "unknown"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "name": name.strip(),
        "cpus": os.cpu_count() or 1,
        "usable_cpus": usable,
        "quota": quota(_read("/sys/fs/cgroup/cpu.max")),
        "threads": default_threads(),
        "instructions": [flag for flag in _INTERESTING if flag in flags],
    }


def _mac_processor() -> str:
    if sys.platform != "darwin":
        return ""
    try:
        run = subprocess.run(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.decode("utf-8", "replace").strip()


def quota(text: str) -> float | None:
    """CPUs that a container may use, from its ``cpu.max``; None if there is no bound."""
    try:
        most, period = text.split()
        return int(most) / int(period)
    except (ValueError, ZeroDivisionError):
        return None


def _native(problems: list[Problem], instructions: Collection[str]) -> dict[str, Any]:
    """Whether the core loads, the kernels it takes, and why these."""
    compiled = COMPILED.get(machine(), ("portable",))
    report = {"loads": False, "path": None, "why": "the core does not load", "compiled": list(compiled)}
    try:
        from gemkit.models.native import kernel_path

        report["loads"] = True
        report["path"] = kernel_path()
    except (ImportError, OSError) as error:
        fault = " ".join(str(error).split()) or type(error).__name__
        problems.append(Problem(f"the C++ core does not load: {fault}", core_remedy(fault)))
        return report
    except GemkitError as error:
        report["why"] = str(error)
        problems.append(Problem(f"no kernels can be chosen: {error}", "unset GEMKIT_ISA"))
        return report
    path, best = report["path"], compiled[0]
    able = next(name for name in compiled if _NEEDED.get(name, set()) <= set(instructions))
    if os.environ.get("GEMKIT_ISA"):
        report["why"] = "GEMKIT_ISA asks for them"
        if compiled.index(able) < compiled.index(path):
            problems.append(Problem(f"GEMKIT_ISA holds the kernels to {path}; {able} would run", "unset GEMKIT_ISA"))
    elif path == best:
        report["why"] = "the fastest there are, and the processor can run them"
    else:
        lacking = ", ".join(sorted(_NEEDED[best] - set(instructions))) if instructions else ""
        report["why"] = f"{best} needs {lacking or 'more'}, which the processor lacks"
        if path == "portable":
            remedy = "in a virtual machine, pass the host's processor on; else take a smaller model"
            problems.append(Problem("only the portable kernels run here, which are many times slower", remedy))
    return report


def core_remedy(fault: str) -> str:
    """What to do when the core's module does not load, by what the system said."""
    if re.search(r"GLIBC|CXXABI|GLIBCXX", fault):
        return f"the wheel is made for a newer system; build gemkit here from its source: {reinstall()}"
    if re.search(r"(?i)architecture|ELF|Mach-O|win32", fault):
        return f"the file is for another processor or system: {reinstall()}"
    return f"{reinstall()} (from source it needs a C++ compiler)"


def _memory(problems: list[Problem]) -> dict[str, Any]:
    """Bytes, as far as the system tells; a container's bound counts."""
    total, available = system_memory()
    limit, used = (_number(_read(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
    if limit is not None and (total is None or limit < total):
        cached = _number((re.findall(r"^inactive_file (\d+)", _read("/sys/fs/cgroup/memory.stat"), re.M) or [""])[0])
        total = limit
        available = min(available or limit, max(0, limit - (used or 0) + (cached or 0)))
    pages = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    state = pages[1] if pages else None
    if state == "never":
        problems.append(
            Problem(
                "huge pages are switched off, so weights lie in pages of 4 KiB",
                "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
            )
        )
    return {"total": total, "available": available, "huge_pages": state}


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def system_memory() -> tuple[int | None, int | None]:
    """Total and available bytes of the machine; None where the system does not tell."""
    facts = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE))
    if "MemTotal" in facts:
        return int(facts["MemTotal"]) << 10, int(facts.get("MemAvailable", facts.get("MemFree", 0))) << 10
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


def _folders(problems: list[Problem]) -> list[dict[str, Any]]:
    """Where models and caches lie: free space, and whether they can be written."""
    found = []
    for name, folder in _places(problems):
        there = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), None)
        free = shutil.disk_usage(there).free if there else None
        writable = there is not None and _is_writable(there)
        if not writable:
            problems.append(Problem(f"{folder} cannot be written", _MOVE.get(name, _MOVE["gemkit"])))
        elif free is not None and free < _LOW_DISK:
            problems.append(
                Problem(f"{folder} has only {free / 1e9:.1f} GB free", _MOVE.get(name, "") + ", or free space there")
            )
        found.append({"name": name, "path": str(folder), "free": free, "writable": writable})
    return found


_MOVE = {
    "gemkit": "set GEMKIT_CACHE to a folder that can be written",
    "Hugging Face": "set HF_HOME to a folder that can be written",
    "Kaggle": "set KAGGLEHUB_CACHE to a folder that can be written",
}


def _places(problems: list[Problem]) -> list[tuple[str, Path]]:
    from gemkit.weights import hub_hf_cache, hub_kaggle

    places = []
    folders = {"gemkit": cache_dir, "Hugging Face": hub_hf_cache.cache_folder, "Kaggle": hub_kaggle.cache_folder}
    for name, folder in folders.items():
        try:
            places.append((name, Path(folder())))
        except (GemkitError, RuntimeError) as error:
            problems.append(Problem(f"the cache folder of {name} is unknown: {error}", _MOVE[name]))
    return places


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def tokens(problems: list[Problem]) -> dict[str, bool]:
    """Of which hubs there is a token or key, in the environment or in the files that their own programs write."""
    from huggingface_hub import get_token

    from gemkit.weights import hub_hf, hub_kaggle

    found = {"Hugging Face": False, "Kaggle": False}
    try:
        found["Hugging Face"] = bool(get_token())
        hub_hf.check_own_token()
    except (GemkitError, OSError, ValueError) as error:
        problems.append(Problem(str(error), _NO_DOWNLOADS))
    try:
        found["Kaggle"] = bool(hub_kaggle.credentials())
    except (GemkitError, OSError, ValueError) as error:
        problems.append(Problem(f"the key of Kaggle cannot be read: {error}", "write it anew, or set KAGGLE_API_TOKEN"))
    return found


_NO_DOWNLOADS = "until then nothing can be downloaded; what is here works"


def _settings(problems: list[Problem]) -> None:
    """Proxies, certificates and addresses with which no download can work."""
    from gemkit.weights import hub_errors, hub_hf, hub_kaggle

    said = set()
    for endpoint, variable in ((hub_hf.endpoint(), "HF_ENDPOINT"), (hub_kaggle.endpoint(), "KAGGLE_API_ENDPOINT")):
        try:
            hub_errors.check_settings(endpoint, variable)
        except GemkitError as error:
            said.add(str(error))
    problems += [Problem(text, _NO_DOWNLOADS) for text in sorted(said)]


def _cache(problems: list[Problem]) -> dict[str, int] | None:
    """Bytes of the copies that gemkit keeps, and the most that it keeps; None where that is unknown."""
    from gemkit.weights import kept

    try:
        return {"bytes": sum(copy.size for copy in kept.copies()), "limit": kept.size_limit()[0]}
    except GemkitError as error:
        problems.append(Problem(str(error), "set GEMKIT_CACHE_SIZE, or unset it"))
        return None


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what gemkit does. Of secrets, and of whatever might be one, only that it is set."""
    shown = {}
    for name in sorted(filter(_VARIABLE.fullmatch, environment)):
        plain = _PLAIN.fullmatch(name) and not _SECRET.search(name)
        # An address may carry a name and a password
        shown[name] = re.sub(r"//[^/\s]*@", "//…@", environment[name]) if plain else "set"
    return shown


def extras() -> list[dict[str, Any]]:
    """gemkit's optional extras for users: what is missing of each. Empty if gemkit was not installed by pip."""
    wanted = {
        name: [re.match(r"[\w.-]+", requirement)[0] for requirement in packages]
        for name, packages in requirements().items()
    }
    return [
        {
            "name": name,
            "missing": [package for package in packages if _version(package) is None],
            "install": install(name),
        }
        for name, packages in wanted.items()
    ]


def _version(package: str) -> str | None:
    """Of an installed package, without importing it; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
