"""Every test that asks for `path` runs on every kernel path that this processor has."""

import pytest
from models.native.running import PATHS


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> str:
    monkeypatch.setenv("GEMKIT_ISA", request.param)
    return request.param
