"""Report on this machine: resources, problems, and the published models that run on it. See `examine`.

It needs neither the C++ core nor the network, since it must also run where the core does not load.
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

from gemkit import __version__, host
from gemkit.cache import cache_dir
from gemkit.errors import GemkitError
from gemkit.extras import install, reinstall, requirements
from gemkit.host import container_memory, cpu_quota, default_threads, system_memory, usable_cpus
from gemkit.tools import memory

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
    """Return everything about this machine, ready for JSON.

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


def machine() -> str:
    """Return the processor's family under its Linux name."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def _processor() -> dict[str, Any]:
    info = host.read(Path("/proc/cpuinfo"))
    found = re.search(r"^(?:model name|Hardware|CPU part)\s*:\s*(.+)$", info, re.MULTILINE)
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)[:1]).split())
    name = found[1] if found else _mac_processor() or platform.processor() or "unknown"
    return {
        "name": name.strip(),
        "cpus": os.cpu_count() or 1,
        "usable_cpus": usable_cpus(),
        "quota": cpu_quota(),
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


def _native(problems: list[Problem], instructions: Collection[str]) -> dict[str, Any]:
    """Return whether the core loads, the kernels it takes, and why these."""
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
    """Return the remedy when the core's module does not load, by the system's error."""
    if re.search(r"GLIBC|CXXABI|GLIBCXX", fault):
        return f"the wheel is made for a newer system; build gemkit here from its source: {reinstall()}"
    if re.search(r"(?i)architecture|ELF|Mach-O|win32", fault):
        return f"the file is for another processor or system: {reinstall()}"
    return f"{reinstall()} (from source it needs a C++ compiler)"


def _memory(problems: list[Problem]) -> dict[str, Any]:
    """Return memory in bytes, where the system reports it, within a container's limit."""
    total, available = system_memory()
    if (container := container_memory()) is not None and (total is None or container[0] < total):
        total, available = container[0], min(available or container[0], container[1])
    pages = re.search(r"\[(\w+)\]", host.read(Path("/sys/kernel/mm/transparent_hugepage/enabled")))
    state = pages[1] if pages else None
    if state == "never":
        problems.append(
            Problem(
                "huge pages are switched off, so weights are in pages of 4 KiB",
                "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
            )
        )
    return {"total": total, "available": available, "huge_pages": state}


def _folders(problems: list[Problem]) -> list[dict[str, Any]]:
    """Report the folders of models and caches: free space, and whether they can be written."""
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
    from gemkit.hub import hf_cache, kaggle

    places = []
    folders = {"gemkit": cache_dir, "Hugging Face": hf_cache.cache_folder, "Kaggle": kaggle.cache_folder}
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
    """Return for each hub whether it has a token or key, in the environment or its own programs' files."""
    from huggingface_hub import get_token

    from gemkit.hub import huggingface, kaggle

    found = {"Hugging Face": False, "Kaggle": False}
    try:
        found["Hugging Face"] = bool(get_token())
        huggingface.check_own_token()
    except (GemkitError, OSError, ValueError) as error:
        problems.append(Problem(str(error), _NO_DOWNLOADS))
    try:
        found["Kaggle"] = bool(kaggle.credentials())
    except (GemkitError, OSError, ValueError) as error:
        fault = f"the key of Kaggle cannot be read: {error}"
        problems.append(Problem(fault, "write it again, or set KAGGLE_API_TOKEN"))
    return found


_NO_DOWNLOADS = "until then nothing can be downloaded; what is here works"


def _settings(problems: list[Problem]) -> None:
    """Report proxies, certificates and addresses that prevent downloads."""
    from gemkit.hub import errors as hub_errors
    from gemkit.hub import huggingface, kaggle

    said = set()
    for endpoint, variable in ((huggingface.endpoint(), "HF_ENDPOINT"), (kaggle.endpoint(), "KAGGLE_API_ENDPOINT")):
        try:
            hub_errors.check_settings(endpoint, variable)
        except GemkitError as error:
            said.add(str(error))
    problems += [Problem(text, _NO_DOWNLOADS) for text in sorted(said)]


def _cache(problems: list[Problem]) -> dict[str, int] | None:
    """Return bytes of the copies that gemkit keeps, and the most that it keeps; None where that is unknown."""
    from gemkit.models import kept

    try:
        return {"bytes": sum(copy.size for copy in kept.copies()), "limit": kept.size_limit()[0]}
    except GemkitError as error:
        problems.append(Problem(str(error), "set GEMKIT_CACHE_SIZE, or unset it"))
        return None


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that affect gemkit; the values of secrets, and of possible secrets, are masked."""
    shown = {}
    for name in sorted(filter(_VARIABLE.fullmatch, environment)):
        plain = _PLAIN.fullmatch(name) and not _SECRET.search(name)
        # An address may carry a name and a password
        shown[name] = re.sub(r"//[^/\s]*@", "//…@", environment[name]) if plain else "set"
    return shown


def extras() -> list[dict[str, Any]]:
    """Return gemkit's optional extras with their missing packages. Empty if gemkit was not installed by pip."""
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
    """Return an installed package's version, without importing it; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
