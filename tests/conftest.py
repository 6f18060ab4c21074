"""Shared by all tests: puts ``tests/`` on the path, so that a suite can say ``from parity.cases import CASES``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
