"""Models from Kaggle: its cache, its checksums, its keys, and what breaks on the way. Budget: 8 s."""

import json
from pathlib import Path

import pytest
from hub.test_resolve import fails, ranges, same
from hub.world import KAGGLE, NEEDED, SHARD, SHARDS, World, gemma, noise, server_fixture, world_fixture, write  # noqa: F401

from gemkit.errors import GemkitWarning, UsageError
from gemkit.hub import fetch as hub_fetch
from gemkit.hub.names import parse, with_revision
from gemkit.hub.resolve import installed, named, remove, resolve


def test_a_model_comes_whole_and_without_the_rest(world: World):
    path = resolve(KAGGLE)
    assert path == world.kaggle / "models/google/gemma/transformers/2b/3" and same(path, gemma())
    assert world.left() == [] and not list(world.caches.rglob(".*"))[1:], "only .complete starts with a point"
    folder = path.parent / ".complete/3"
    marks = {mark.relative_to(folder).as_posix() for mark in path.parent.rglob("?*.complete")}
    assert marks == {f"{name}.complete" for name in NEEDED}, "kagglehub's own marks; not the whole version's"
    world.log()
    assert resolve(KAGGLE) == resolve(f"{KAGGLE}/3") == resolve("gemma-2b", offline=True) == path
    assert world.log() == [], "a whole model needs no network"
    write(world.served / "kaggle/google/gemma/transformers/2b/4", gemma(1))
    assert resolve(KAGGLE) == path
    newer = resolve(KAGGLE, refresh=True)
    assert same(newer, gemma(1)) and newer.name == "4" and resolve(KAGGLE, offline=True) == newer
    assert [entry.name for entry in installed()] == [f"{KAGGLE}/3", f"{KAGGLE}/4"]
    remove(named(f"{KAGGLE}/4"))
    assert resolve(KAGGLE, offline=True) == path
    remove(named(KAGGLE))
    assert world.left(models=True) == []


@pytest.mark.parametrize("at", [0, 1, SHARD // 2, SHARD - 1])
def test_after_a_broken_try_the_next_one_goes_on(world: World, at: int):
    world.fault(SHARDS[0], "cut", at=at)
    world.fault(SHARDS[0], "status", status=503, times=99)
    fails("run it again", KAGGLE, hub_fetch.Unreachable)
    folder = world.kaggle / "models/google/gemma/transformers/2b/3"
    assert not (folder / SHARDS[0]).exists() and not [entry for entry in installed() if entry.ready]
    fails("not whole", KAGGLE, offline=True)
    world.calm()
    assert same(resolve(KAGGLE), gemma())
    assert ranges(world, SHARDS[0]) == [f"bytes={at}-" if at else ""] and world.left() == []


def test_what_arrived_whole_is_not_fetched_again(world: World):
    world.fault(SHARDS[1], "status", status=503, times=99)
    fails("run it again", KAGGLE)
    world.calm()
    done = {path.name for path in (world.kaggle / "models/google/gemma/transformers/2b/3").glob("[!.]*")}
    assert "config.json" in done
    assert same(resolve(KAGGLE), gemma())
    assert not done & {entry["path"].rsplit("/", 1)[1] for entry in world.log() if entry["on"] == "cdn"}


def test_a_wrong_checksum_leaves_nothing(world: World):
    world.fault(SHARDS[1], "corrupt")
    assert SHARDS[1] in fails("wrong checksum", KAGGLE)
    assert not list(world.kaggle.rglob(f"*{SHARDS[1]}*"))
    world.calm()
    world.fault(SHARDS[1], "cut", at=10)
    world.fault(SHARDS[1], "corrupt")
    fails("wrong checksum", KAGGLE)
    assert same(resolve(KAGGLE), gemma())


def test_passing_errors_pass(world: World, monkeypatch):
    monkeypatch.setenv("GEMKIT_DOWNLOAD_TIMEOUT", "0.3")
    world.fault("/get", "status", status=500, on="hub")
    world.fault("/files", "status", status=429, on="hub")
    world.fault("/download/", "status", status=502, on="hub")
    world.fault(SHARDS[0], "stall", at=700, seconds=3)
    world.fault(SHARDS[1], "cut", at=500)
    world.fault(SHARDS[1], "whole")
    assert same(resolve(KAGGLE), gemma())
    assert world.left() == []


def test_what_a_killed_kagglehub_left_is_not_trusted(world: World):
    folder = world.kaggle / "models/google/gemma/transformers/2b/3"
    write(folder, {name: data for name, data in gemma().items() if name in NEEDED} | {SHARDS[0]: b"half"})
    fails("not whole", KAGGLE, offline=True)
    assert same(resolve(KAGGLE), gemma())
    remove(named(KAGGLE))
    write(folder, gemma())
    folder.with_name("3.complete").touch()  # kagglehub's own mark
    world.log()
    assert resolve(KAGGLE) == folder and world.log() == []


def test_keys_and_gates_are_one_line(world: World, monkeypatch):
    world.put("/_settings", {"gated": ["google/gemma/transformers/2b"]})
    message = fails("set KAGGLE_USERNAME and KAGGLE_KEY", KAGGLE)
    assert "kaggle.com/models/google/gemma," in message and "hf:google/gemma-2b with HF_TOKEN" in message
    assert world.left(models=True) == []
    monkeypatch.setenv("KAGGLE_USERNAME", "user")
    monkeypatch.setenv("KAGGLE_KEY", "old")
    fails("get a new key", KAGGLE)
    monkeypatch.setenv("KAGGLE_KEY", "good")
    world.log()
    assert same(resolve(KAGGLE), gemma())
    log = world.log()
    assert all(entry["auth"].startswith("Basic ") for entry in log if entry["on"] == "hub")
    assert {entry["auth"] for entry in log if entry["on"] == "cdn"} == {""}, "the key stays at the hub"


@pytest.mark.parametrize("where", ["token", "token file", "kaggle.json"])
def test_keys_are_found_where_kaggle_puts_them(world: World, monkeypatch, where: str):
    world.put("/_settings", {"gated": ["google/gemma/transformers/2b"]})
    folder = world.caches / "no-keys"
    files = {"token": b"good\n", "kaggle.json": json.dumps({"username": "user", "key": "good"}).encode()}
    if where == "kaggle.json":
        write(folder, {where: b"{"})
        fails("kaggle.json", KAGGLE)
        write(folder, {where: files[where]})
    else:
        write(folder, {"token": files["token"]})
        monkeypatch.setenv("KAGGLE_API_TOKEN", "good" if where == "token" else str(folder / "token"))
    assert same(resolve(KAGGLE), gemma())


def test_what_is_not_there_is_one_line(world: World, monkeypatch):
    fails("Kaggle has no model kaggle:google/gemma/transformers/9b", "kaggle:google/gemma/transformers/9b")
    fails("Kaggle has no model", f"{KAGGLE}/9")
    write(world.served / "kaggle/google/gemma/pyTorch/2b/1", {"model.pt": b"pickle", "tokenizer.model": b"t"})
    fails("pickles", "kaggle:google/gemma/pyTorch/2b")
    world.fault("/get", "status", status=200, on="hub")  # with no JSON
    fails("check KAGGLE_API_ENDPOINT", KAGGLE)
    path = resolve(KAGGLE)
    monkeypatch.setenv("KAGGLE_API_ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(GemkitWarning, match="the copy in"):
        assert resolve(KAGGLE, refresh=True) == path
    fails("cannot be reached", "kaggle:google/gemma/transformers/7b", hub_fetch.Unreachable)


def test_a_revision_is_a_version_there():
    assert with_revision(KAGGLE, "2") == f"{KAGGLE}/2"
    assert with_revision("gemma-2b", "v1") == "hf:google/gemma-2b@v1"
    assert with_revision("hf:a/b:Q4_0", "v1") == "hf:a/b@v1:Q4_0"
    for name, revision in ((KAGGLE, "main"), (f"{KAGGLE}/2", "3"), ("hf:a/b@x", "y"), ("hf:a/b", "../x")):
        with pytest.raises(UsageError):
            with_revision(name, revision)


def test_published_models_have_their_names_on_both_hubs():
    assert [str(name) for name in parse("gemma-1.1-2b-it")][1] == "kaggle:google/gemma/transformers/1.1-2b-it"
    assert [str(name) for name in parse("Gemma-2-9b-it")][1] == "kaggle:google/gemma-2/transformers/gemma-2-9b-it"
    assert [str(name) for name in parse("gemma-3-4b-pt")][1] == "kaggle:google/gemma-3/transformers/gemma-3-4b-pt"
    assert [str(name) for name in parse("shieldgemma-2b")] == ["hf:google/shieldgemma-2b"]


def test_a_gguf_on_kaggle_is_a_file(world: World):
    write(world.served / "kaggle/org/m/gguf/q4/1", {"m-Q4_0.gguf": noise(5, 4000), "notes.txt": b"x"})
    path = resolve("kaggle:org/m/gguf/q4")
    assert path.name == "m-Q4_0.gguf" and path.read_bytes() == noise(5, 4000)
    assert not (Path(path).parent / "notes.txt").exists()


def read(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_googles_own_checkpoints_come_whole(world: World):
    """A .ckpt without the rest of its folder; a Flax tree with all of it, which only the version's mark proves."""
    torch = {"gemma-2b.ckpt": noise(1, 9000), "config.json": b"{}", "tokenizer.model": b"t"}
    write(world.served / "kaggle/google/gemma/pyTorch/2b/1", {**torch, "notes.md": b"x"})
    path = resolve("kaggle:google/gemma/pyTorch/2b")
    assert path == world.kaggle / "models/google/gemma/pyTorch/2b/1" and read(path) == torch
    flax = {
        "2b/_METADATA": b"{}",
        "2b/manifest.ocdbt": noise(2, 500),
        "2b/d/0": noise(3, 9000),
        "tokenizer.model": b"t",
    }
    write(world.served / "kaggle/google/gemma/flax/2b/1", flax)
    world.fault("2b/d/0", "status", status=503, times=99)
    fails("run it again", "kaggle:google/gemma/flax/2b")
    fails("not whole", "kaggle:google/gemma/flax/2b", offline=True)
    world.calm()
    path = resolve("kaggle:google/gemma/flax/2b")
    assert read(path) == flax and resolve("kaggle:google/gemma/flax/2b", offline=True) == path
    listed = {entry.name: (entry.ready, entry.format) for entry in installed()}
    assert listed == {
        "kaggle:google/gemma/flax/2b/1": (True, "flax"),
        "kaggle:google/gemma/pyTorch/2b/1": (True, "torch"),
    }
    for name in listed:
        remove(named(name))
    assert world.left(models=True) == []
