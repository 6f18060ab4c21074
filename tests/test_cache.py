"""The cache folder and whole-file writes. Budget: 1 s."""

import os
import sys
from pathlib import Path

import pytest

from gemkit.cache import atomic_write, cache_dir, try_atomic_write


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("GEMKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "gemkit"
    for relative in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_dir().is_absolute() and "relative" not in cache_dir().parts


@pytest.mark.parametrize(
    ("platform", "wanted"),
    [
        ("linux", ".cache/gemkit"),
        ("darwin", "Library/Caches/gemkit"),
        ("win32", "AppData/Local/gemkit/cache"),
    ],
)
def test_the_folder_on_each_system(monkeypatch, tmp_path, platform: str, wanted: str):
    monkeypatch.delenv("GEMKIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_dir() == tmp_path / wanted
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert platform != "win32" or cache_dir() == tmp_path / "local" / "gemkit" / "cache"


def test_a_write_replaces_the_file(tmp_path):
    path = tmp_path / "a" / "b"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["b"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_a_write_is_private_unless_told(tmp_path):
    before = os.umask(0o022)
    try:
        atomic_write(tmp_path / "mine", b"x")
        atomic_write(tmp_path / "all", b"x", private=False)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("mine", "all")] == [0o600, 0o644]


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    path = tmp_path / "b"
    atomic_write(path, b"one")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, b"two")
    assert try_atomic_write(path, b"two") is False
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["b"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert try_atomic_write(tmp_path / "file" / "below", b"x") is False
    assert try_atomic_write(tmp_path / "good", b"x") is True
