"""Copies that gemkit keeps: what is dead, what goes first when they are too many, and what stays. Budget: 5 s."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from gemkit.cache import parse_age, parse_size
from gemkit.errors import UsageError
from gemkit.models import kept

HOUR, DAY = 3600, 86400


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache" / "packed"
    folder.mkdir(parents=True)
    monkeypatch.setenv("GEMKIT_CACHE", str(folder.parent))
    monkeypatch.delenv("GEMKIT_CACHE_SIZE", raising=False)
    return folder


def aged(path: Path, age: float) -> Path:
    at = time.time() - age
    os.utime(path, (at, at))
    return path


def model(path: Path, text: str = "weights") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def keep(cache: Path, source: Path, image: str, size: int = 1000, age: float = 0) -> Path:
    """A packed copy of a model, last used so many seconds ago, as the native engine writes it."""
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    record = {"source": str(source), "files": [kept.file_identity(file) for file in files], "packed": f"{image}.packed"}
    path = cache / f"{image}-{source.name}.json"
    path.write_text(json.dumps(record))
    (cache / f"{image}.packed").write_bytes(bytes(size))
    aged(cache / f"{image}.packed", age)
    return aged(path, age)


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.suffix == ".packed"}


def states() -> dict[str, str]:
    return {path.name: copy.state for copy in kept.packed() for path in copy.files if path.suffix == ".packed"}


def test_a_copy_knows_its_source(cache, tmp_path):
    there, changed, gone, other = (model(tmp_path / f"{name}.gguf") for name in ("there", "changed", "gone", "other"))
    folder = tmp_path / "folder"
    model(folder / "model.safetensors")
    for source in (there, changed, gone, folder):
        keep(cache, source, source.stem)
    keep(cache, other, "gone")  # a copy of the model that is gone shares its image
    changed.write_text("other weights")
    gone.unlink()
    assert states() == {
        "there.packed": "there",
        "changed.packed": "changed",
        "gone.packed": "there",
        "folder.packed": "there",
    }
    model(folder / "model.safetensors", "longer weights")
    other.unlink()
    assert states()["folder.packed"] == "changed" and states()["gone.packed"] == "gone"


def test_what_is_dead_is_removed_whatever_the_limit(cache, tmp_path):
    live, dead = model(tmp_path / "live.gguf"), model(tmp_path / "dead.gguf")
    keep(cache, live, "live"), keep(cache, dead, "dead")
    dead.unlink()
    fresh, stale = cache / "fresh.packed", cache / "stale.packed"
    half, old_half = cache / ".packed-a", cache / ".packed-b"
    for path in (fresh, stale, half, old_half):
        path.write_bytes(b"x")
    for path in (stale, old_half):
        aged(path, 2 * HOUR)
    lost = keep(cache, live, "lost")
    (cache / "lost.packed").unlink()
    removed = kept.tidy()
    assert {path.name for path in cache.iterdir()} == {
        "live.packed",
        "live-live.gguf.json",
        "fresh.packed",
        ".packed-a",
    }
    assert not lost.exists() and len(removed) == 4


def test_the_copies_used_longest_ago_go_first(cache, tmp_path):
    for number, age in enumerate((3 * DAY, DAY, 2 * DAY, 0)):
        keep(cache, model(tmp_path / f"{number}.gguf"), str(number), 1000, age)
    size = sum(copy.size for copy in kept.copies())
    assert kept.tidy(limit=size) == [] and len(names(cache)) == 4
    kept.tidy(limit=size - 1)
    assert names(cache) == {"1.packed", "2.packed", "3.packed"}
    kept.tidy(limit=2500)
    assert names(cache) == {"1.packed", "3.packed"}
    kept.touch(next(cache.glob("1-*.json")))
    kept.tidy(limit=1500)
    assert names(cache) == {"1.packed"}
    kept.tidy(keep="1.packed", limit=0)
    assert names(cache) == {"1.packed"}, "the one in use stays"
    kept.tidy(limit=0)
    assert not list(cache.iterdir())


def test_tokenizers_count_and_go_too(cache, tmp_path):
    folder = cache.parent / "tokenizers"
    folder.mkdir()
    aged(model(folder / "a.bin", "x" * 500), 9 * DAY)
    keep(cache, model(tmp_path / "m.gguf"), "m")
    assert {copy.kind for copy in kept.copies()} == {kept.PACKED, kept.TOKENIZER}
    kept.tidy(limit=1400)
    assert not list(folder.iterdir()) and names(cache) == {"m.packed"}


def test_the_limit_is_set_by_a_variable(cache, tmp_path, monkeypatch):
    keep(cache, model(tmp_path / "m.gguf"), "m", 5000)
    assert kept.size_limit() == (kept.LIMIT, False) and kept.tidy() == []
    monkeypatch.setenv("GEMKIT_CACHE_SIZE", "4kB")
    assert kept.size_limit() == (4000, True) and len(kept.tidy()) == 1
    monkeypatch.setenv("GEMKIT_CACHE_SIZE", "much")
    with pytest.raises(UsageError, match="GEMKIT_CACHE_SIZE is 'much'"):
        kept.size_limit()


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("5GB", 5e9),
        ("5 gb", 5e9),
        ("1.5G", 1.5e9),
        ("200M", 2e8),
        ("10", 10),
        ("0", 0),
        ("2GiB", 2 << 30),
        ("3kib", 3072),
    ],
)
def test_sizes(text: str, bytes_: float):
    assert parse_size(text, "--max-size") == bytes_


@pytest.mark.parametrize(("text", "seconds"), [("30d", 30 * DAY), ("12h", 12 * HOUR), ("2W", 14 * DAY), ("90m", 5400)])
def test_ages(text: str, seconds: float):
    assert parse_age(text, "--older-than") == seconds


@pytest.mark.parametrize("text", ["", "d", "-1d", "5XB", "1e3", "5 G B", "1d 2h"])
def test_what_is_no_size_and_no_age(text: str):
    for parse in (parse_size, parse_age):
        with pytest.raises(UsageError, match="--x is"):
            parse(text, "--x")


def test_dropping_a_model_leaves_what_others_use(cache, tmp_path):
    one, two, three = (model(tmp_path / f"{name}.gguf") for name in ("one", "two", "three"))
    keep(cache, one, "shared"), keep(cache, two, "shared"), keep(cache, three, "own")
    (cache / "broken.json").write_text("{")
    kept.drop([two, three])
    assert {path.name for path in cache.iterdir()} == {"shared.packed", "shared-one.gguf.json", "broken.json"}
    kept.drop([one])
    assert {path.name for path in cache.iterdir()} == {"broken.json"}
