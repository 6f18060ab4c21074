"""Shared by all tests: puts ``tests/`` on the path, so that a suite can say ``from parity.cases import CASES``.

With pytest-xdist a file's tests stay together (``--dist loadfile``), since its fixtures are models; the files that take
longest come first, so that no process is left with one of them at the end.

Caches go to build/test-cache, not to the user's; GEMKIT_CACHE overrides it. The user's defaults do not count.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("GEMKIT_CACHE", str(Path(__file__).parent.parent / "build" / "test-cache"))
os.environ["GEMKIT_CONFIG"] = ""
os.environ.pop("GEMKIT_MODEL", None)

_WORKER_BYTES = 8 << 30  # three frameworks and what the tests hold
_LONG = ("models", "parity", "docs")


def pytest_xdist_auto_num_workers(config) -> int:
    """One process for each core that may be used, as far as memory goes."""
    from gemkit import _native
    from gemkit.host import free_memory

    free = free_memory()
    return max(1, min(_native.cores(), 64 if free is None else free // _WORKER_BYTES))


def pytest_sessionstart(session) -> None:
    """Assemble the demo model and show its notice once, before any process that must be silent."""
    if not hasattr(session.config, "workerinput"):
        from gemkit.hub.demo import demo_path

        demo_path()


def pytest_collection_modifyitems(items) -> None:
    here = Path(__file__).parent

    def order(item) -> int:
        first = item.path.relative_to(here).parts[0] if here in item.path.parents else ""
        # Tests that trace every line go before any framework is in the process: torch replaces how frames are run
        return 0 if first == "engine" else 1 if first in _LONG else 2

    items.sort(key=order)
