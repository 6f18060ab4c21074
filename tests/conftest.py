"""Shared by all tests: puts ``tests/`` on the path, so that a suite can say ``from parity.cases import CASES``.

Caches go to build/test-cache, not to the user's; GEMKIT_CACHE overrides it. The user's defaults do not count.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("GEMKIT_CACHE", str(Path(__file__).parent.parent / "build" / "test-cache"))
os.environ["GEMKIT_CONFIG"] = ""
os.environ.pop("GEMKIT_MODEL", None)
