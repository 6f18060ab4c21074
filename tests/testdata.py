"""The public texts and vocabularies that some tests compare with. They are not part of the project."""

import os
from pathlib import Path

import pytest


def data_file(*parts: str) -> Path:
    """A file below the folder that GEMKIT_TEST_DATA names; without it the test is skipped, which CI refuses."""
    folder = os.environ.get("GEMKIT_TEST_DATA")
    if not folder:
        pytest.skip("set GEMKIT_TEST_DATA to the folder of benchmark data to run this", allow_module_level=True)
    path = Path(folder).joinpath(*parts)
    assert path.exists(), f"GEMKIT_TEST_DATA lacks {path}"
    return path
