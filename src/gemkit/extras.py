"""Commands that install gemkit's optional extras, in the way gemkit itself was installed."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

# For users; the others are for the project's own tests and tools
_INTERNAL = frozenset({"test", "dev", "bench"})


def install(*extras: str, force: bool = False) -> str:
    """Return the command that installs these extras here.

    From a checkout it names the folder, since an editable or local install knows its own extras; from a wheel or an
    index it names the packages themselves. force: reinstall packages that are installed already.
    Example: ``install("torch")`` is ``pip install -e 'CHECKOUT[torch]'`` or ``pip install 'torch>=2.6'``.
    """
    options = "--force-reinstall " if force else ""
    wanted = requirements()
    source = None if force else _checkout()
    if source is not None and all(extra in wanted for extra in extras):
        folder, editable = source
        return f"pip install {'-e ' if editable else ''}'{folder}[{','.join(extras)}]'"
    packages = [package for extra in extras for package in wanted.get(extra) or [extra]]
    return "pip install " + options + " ".join(_quoted(package) for package in dict.fromkeys(packages))


def reinstall() -> str:
    """Return the command that installs gemkit itself again."""
    if (source := _checkout()) is None:
        return "install gemkit's wheel again with pip install --force-reinstall, or in a checkout: pip install ."
    folder, editable = source
    return f"pip install --force-reinstall --no-deps {'-e ' if editable else ''}'{folder}'"


def requirements() -> dict[str, list[str]]:
    """Return each extra's requirements, such as ``{"torch": ["torch>=2.6"]}``; empty if gemkit is not installed."""
    try:
        distribution = metadata.distribution("gemkit")
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {name: [] for name in distribution.metadata.get_all("Provides-Extra") or []}
    for requirement in distribution.requires or []:
        what, _, marker = requirement.partition(";")
        if extra := re.search(r"""extra\s*==\s*['"]([\w.-]+)['"]""", marker):
            found.setdefault(extra[1], []).append(re.sub(r"[\s()]", "", what))
    return {name: packages for name, packages in found.items() if name not in _INTERNAL}


def _checkout() -> tuple[Path, bool] | None:
    """Return the folder that gemkit was installed from, if it is still there, and whether the install is editable."""
    try:
        record = json.loads(metadata.distribution("gemkit").read_text("direct_url.json") or "null")
        url = urlsplit(record["url"])
        editable = record["dir_info"].get("editable", False) is True
    except (metadata.PackageNotFoundError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # from an index, or from an archive
    if url.scheme != "file":
        return None
    folder = Path(url2pathname(url.path))
    return (folder, editable) if (folder / "pyproject.toml").is_file() else None


def _quoted(requirement: str) -> str:
    return f"'{requirement}'" if re.search(r"[<>=!~;\[ ]", requirement) else requirement
