"""The machine as this process may use it, with a container's bounds. Budget: 1 s."""

from pathlib import Path

import pytest

from gemkit import host
from gemkit.errors import GemkitError


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "_GROUP", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "quota"), [("150000 100000\n", 1.5), ("max 100000", None), ("", None), ("100000 0", None)]
)
def test_the_quota_of_a_container_counts(group: Path, text: str, quota: float | None):
    (group / "cpu.max").write_text(text)
    assert host.cpu_quota() == quota
    if quota:
        assert host.default_threads() <= 2


def test_the_memory_of_a_container_counts(group: Path):
    assert host.container_memory() is None
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("900000\n")
    assert host.container_memory() == (1_000_000, 100_000)
    (group / "memory.stat").write_text("anon 5\nfile 50000\n")
    assert host.container_memory() == (1_000_000, 150_000) and host.free_memory() == 150_000
    with pytest.raises(GemkitError, match="not enough memory for the weights"):
        host.check_memory("the weights", 200_000)
    (group / "memory.max").write_text("max\n")
    assert host.container_memory() is None


def test_the_machine_is_known():
    total, available = host.system_memory()
    assert total >= available > 0 and 1 <= host.default_threads() <= host.usable_cpus()
