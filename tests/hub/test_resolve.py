"""Models by name: what is fetched from Hugging Face, what breaks on the way, what stays afterwards. Budget: 25 s."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from hub.world import NEEDED, SHARD, SHARDS, World, gemma, gguf, noise, server_fixture, world_fixture, write  # noqa: F401

from gemkit.errors import GemkitError, GemkitWarning, UsageError
from gemkit.hub import fetch as hub_fetch
from gemkit.hub import item as hub_item
from gemkit.hub.hf_cache import cache_folder
from gemkit.hub.progress import Progress, describe
from gemkit.hub.resolve import installed, named, remove, resolve
from gemkit.models.kept import drop

NAME = "gemma-2b"
RESOLVE = (
    "import sys; from gemkit.hub.resolve import resolve; print(resolve(sys.argv[1] if sys.argv[1:] else 'gemma-2b'))"
)


def same(path: Path, files: dict[str, bytes]) -> bool:
    """Return whether a folder holds exactly a model's files, byte for byte."""
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    return found == NEEDED and all((path / name).read_bytes() == files[name] for name in NEEDED)


def fails(words: str, name: str, kind: type[GemkitError] = GemkitError, **options: object) -> str:
    with pytest.raises(kind) as caught:
        resolve(name, **options)
    message = str(caught.value)
    assert words in message and "\n" not in message, message
    return message


def ranges(world: World, part: str) -> list[str]:
    return [entry["range"] for entry in world.log() if entry["on"] == "cdn" and part in entry["path"]]


def test_a_model_comes_whole_and_without_the_rest(world: World):
    path = resolve(NAME)
    assert same(path, gemma())
    log = world.log()
    assert not [entry for entry in log if any(part in entry["path"] for part in ("original", ".bin", "README"))]
    assert path.parent.parent == world.hf / "models--google--gemma-2b" and world.left() == []
    assert (
        resolve(NAME) == resolve(NAME, offline=True) == resolve("google/gemma-2b") == resolve("hf:google/gemma-2b@main")
    )
    assert resolve(f"hf:google/gemma-2b@{path.name[:9]}") == path
    assert world.log() == [], "a whole model needs no network"


def test_the_cache_is_shared_with_hugging_face(world: World):
    import huggingface_hub

    theirs = huggingface_hub.snapshot_download("google/gemma-2b", endpoint=world.address, cache_dir=world.hf)
    world.log()
    assert resolve(NAME) == Path(theirs) and world.log() == []
    shutil.rmtree(world.hf)
    ours = resolve(NAME)
    kept = huggingface_hub.hf_hub_download("google/gemma-2b", SHARDS[0], cache_dir=world.hf, local_files_only=True)
    assert Path(kept) == ours / SHARDS[0] and os.readlink(kept).startswith("../../blobs/")
    scan = huggingface_hub.scan_cache_dir(world.hf)
    assert not scan.warnings and {repo.repo_id for repo in scan.repos} == {"google/gemma-2b"}
    # What their library left half is completed, not fetched again
    (ours / SHARDS[1]).resolve().unlink()
    (ours / SHARDS[1]).unlink()
    world.log()
    assert same(resolve(NAME), gemma())
    assert {entry["path"].rsplit("/", 1)[1] for entry in world.log() if entry["on"] == "cdn"} == {SHARDS[1]}


@pytest.mark.parametrize("at", [0, 1, 4096, SHARD // 2, SHARD - 1])
def test_a_connection_that_dies_is_taken_up_where_it_died(world: World, at: int):
    world.fault(SHARDS[0], "cut", at=at)
    assert same(resolve(NAME), gemma())
    assert ranges(world, SHARDS[0]) == ["", f"bytes={at}-" if at else ""]
    assert world.left() == []


@pytest.mark.parametrize("at", [0, 1, SHARD // 2, SHARD - 1])
def test_after_a_broken_try_the_next_one_goes_on(world: World, at: int):
    world.fault(SHARDS[0], "cut", at=at)
    world.fault(SHARDS[0], "status", status=503, times=99)
    fails("run it again", NAME, hub_fetch.Unreachable)
    left = [path for path in world.left() if "incomplete" in path]
    assert [(world.caches / path).stat().st_size for path in left] == ([at] if at else [])
    assert not list(world.hf.glob("*/snapshots/*")) and not list(world.hf.glob("*/refs/*"))
    assert not [entry for entry in installed() if entry.ready]
    fails("not whole", NAME, offline=True)
    world.calm()
    assert same(resolve(NAME), gemma())
    assert ranges(world, SHARDS[0]) == [f"bytes={at}-" if at else ""] and world.left() == []


def test_a_line_that_breaks_all_the_time_still_arrives(world: World):
    world.fault(SHARDS[0], "cut", at=9000, times=99)
    assert same(resolve(NAME), gemma())
    assert len(ranges(world, SHARDS[0])) == -(-SHARD // 9000)


@pytest.mark.parametrize(("file", "on"), [(SHARDS[1], "cdn"), ("config.json", "hub")])
def test_a_wrong_checksum_leaves_nothing(world: World, file: str, on: str):
    world.fault(f"/{file}", "corrupt", on=on, times=99)
    message = fails("wrong checksum", NAME)
    assert file in message
    blobs = list(world.hf.glob("*/blobs/*"))
    assert not list(world.hf.glob("*/snapshots/*")) and not [blob for blob in blobs if "incomplete" in blob.name]
    world.calm()
    assert same(resolve(NAME), gemma())


def test_garbage_in_a_partial_file_is_found(world: World):
    world.fault(SHARDS[0], "cut", at=100)
    world.fault(SHARDS[0], "status", status=503, times=99)
    fails("run it again", NAME)
    world.calm()
    (partial,) = world.hf.glob("*/blobs/*.incomplete")
    partial.write_bytes(bytes(200))
    fails("wrong checksum", NAME)
    partial.write_bytes(bytes(SHARD + 1))
    assert same(resolve(NAME), gemma())


def test_a_stall_times_out_and_goes_on(world: World, monkeypatch):
    monkeypatch.setenv("GEMKIT_DOWNLOAD_TIMEOUT", "1")
    world.fault(SHARDS[0], "stall", at=5000, seconds=30)
    began = time.monotonic()
    assert same(resolve(NAME), gemma())
    assert ranges(world, SHARDS[0]) == ["", "bytes=5000-"] and time.monotonic() - began < 20
    monkeypatch.setenv("GEMKIT_DOWNLOAD_TIMEOUT", "soon")
    fails("GEMKIT_DOWNLOAD_TIMEOUT", "hf:google/gemma-2b@v1", UsageError)


def test_passing_errors_pass(world: World):
    world.fault("/api/models/", "status", status=500, on="hub")
    world.fault("/resolve/", "status", status=502, on="hub")
    world.fault(SHARDS[0], "status", status=403)  # the redirect's signature ran out
    world.fault(SHARDS[1], "status", status=429, headers={"Retry-After": "0.1"})
    world.fault(SHARDS[1], "cut", at=500)
    world.fault(SHARDS[1], "whole")  # a server that ignores ranges
    assert same(resolve(NAME), gemma())
    assert ranges(world, SHARDS[1]) == ["", "", "bytes=500-"]


def test_a_gate_is_one_line_that_says_what_to_do(world: World, monkeypatch):
    world.put("/_settings", {"gated": ["google/gemma-2b"]})
    message = fails("HF_TOKEN", NAME)
    assert f"open {world.address}/google/gemma-2b" in message and "accept" in message
    assert "kaggle:google/gemma/transformers/2b" in message and "KAGGLE_KEY" in message
    monkeypatch.setenv("HF_TOKEN", "stranger")
    assert "the account of your token" in fails("gated", NAME)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    fails("does not accept your token", NAME)
    assert world.left(models=True) == [] and not list(world.hf.glob("models--*")), "a refusal leaves no trace"
    monkeypatch.setenv("HF_TOKEN", "good")
    world.log()
    assert same(resolve(NAME), gemma())
    assert {entry["auth"] for entry in world.log() if entry["on"] == "cdn"} == {""}, "the token stays at the hub"


def test_a_list_that_keeps_secrets_is_asked_file_by_file(world: World):
    world.put("/_settings", {"gated": ["google/gemma-2b"], "secret": True})
    fails("is gated", NAME)
    world.put("/_settings", {"gated": [], "secret": True})
    assert same(resolve(NAME), gemma()) and world.left() == []


def test_what_is_not_there_is_one_line(world: World, monkeypatch):
    fails("no model google/nothing", "hf:google/nothing")
    fails("no revision 'v9'", "hf:google/gemma-2b@v9")
    world.fault(f"/{SHARDS[0]}", "status", status=404, on="hub", headers={"X-Error-Code": "EntryNotFound"})
    fails("lost a file", NAME)
    monkeypatch.setenv("HF_TOKEN", "good")
    fails("no model google/nothing", "google/nothing")
    fails("gemma-2-2b-it", "gemma-22b-it")
    world.fault("/api/models/", "status", status=200, on="hub")  # with no JSON
    fails("check HF_ENDPOINT", NAME)
    fails("no file or folder", "nowhere.gguf")
    fails("no file or folder", "models/of/mine")
    fails("hf:org/name", "hf:gemma-2b", UsageError)
    for bad in ("hf:../../x", "hf:a/b@../c", "hf:a/b@", "hf:a/b:c:d", "hf:a/b--c", "kaggle:a/b", "kaggle:a/b/c/d/x"):
        with pytest.raises(UsageError):
            resolve(bad)
    for bad in ("a b/c", "", "a\0b"):
        with pytest.raises(GemkitError):
            resolve(bad)


def test_without_a_network_what_is_there_serves(world: World, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    fails("cannot be reached", NAME, hub_fetch.Unreachable)
    fails("switch it on and run 'gemkit download", NAME, offline=True)
    monkeypatch.setenv("HF_ENDPOINT", world.address)
    path = resolve(NAME)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert resolve(NAME) == path
    with pytest.warns(GemkitWarning, match="the copy in"):
        assert resolve(NAME, refresh=True) == path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(NAME, refresh=True) == path
    fails("HF_HUB_OFFLINE", "gemma-7b")
    fails("gemkit download", "gemma-7b", download=False)


def test_a_newer_commit_is_fetched_on_request_and_shares_files(world: World):
    old = resolve(NAME)
    write(world.served / "hf/google/gemma-2b", {SHARDS[1]: noise(9, SHARD)})
    assert resolve(NAME) == old
    world.log()
    new = resolve(NAME, refresh=True)
    assert same(new, gemma(6)) and same(old, gemma()) and new != old
    assert {entry["path"].rsplit("/", 1)[1] for entry in world.log() if entry["on"] == "cdn"} == {SHARDS[1]}
    first, second = installed()
    assert {first.name, second.name} == {"hf:google/gemma-2b", f"hf:google/gemma-2b@{old.name[:12]}"}
    assert resolve(second.name, offline=True) == old
    remove(named(second.name))
    assert same(new, gemma(6)) and not old.exists()
    assert len(list(world.hf.glob("*/blobs/*"))) == len(NEEDED)
    remove(named(NAME))
    assert world.left(models=True) == []


def test_an_older_whole_copy_stands_in_for_a_half_newer_one(world: World, monkeypatch):
    old = resolve(NAME)
    newer = old.with_name("f" * 40)
    write(newer, {"config.json": b"{}"})
    (world.hf / "models--google--gemma-2b/refs/main").write_text("f" * 40)
    assert resolve(NAME, offline=True) == old
    fails("not whole", "hf:google/gemma-2b@" + "f" * 40, offline=True)


def test_a_gguf_file_is_picked_by_name_glob_or_quantisation(world: World):
    folder = world.served / "hf/org/Gemma-GGUF"
    write(folder, {"m.Q4_0.gguf": gguf(1), "m.Q8_0.gguf": gguf(2), "sub/m-BF16.gguf": gguf(3), "mmproj-F16.gguf": b"x"})
    message = fails("3 GGUF files", "hf:org/Gemma-GGUF", UsageError)
    assert "Q4_0, Q8_0, BF16" in message
    assert "Q4_0, Q8_0" in fails("means 2", "org/Gemma-GGUF:m.*", UsageError)
    for selector in ("Q4_0", "q4_0", "m.Q4_0.gguf", "*4_0*"):
        assert resolve(f"hf:org/Gemma-GGUF:{selector}").read_bytes() == gguf(1)
    assert resolve("org/Gemma-GGUF:bf16").read_bytes() == gguf(3)
    fails("no GGUF file 'Q5_0'", "org/Gemma-GGUF:Q5_0", UsageError)
    assert {entry["path"].rsplit("/", 1)[1] for entry in world.log() if entry["on"] == "cdn"} == {
        "m.Q4_0.gguf",
        "m-BF16.gguf",
    }
    names = [entry.name for entry in installed()]
    assert names == ["hf:org/Gemma-GGUF:m.Q4_0.gguf", "hf:org/Gemma-GGUF:sub/m-BF16.gguf"]
    remove(named("org/Gemma-GGUF:Q4_0"))
    assert [entry.name for entry in installed()] == names[1:] and len(list(world.hf.glob("*/blobs/*"))) == 1
    assert resolve("org/Gemma-GGUF", offline=True).read_bytes() == gguf(3)
    remove(named("org/Gemma-GGUF"))
    assert world.left(models=True) == []


def test_all_parts_of_a_split_gguf_file_are_fetched_and_removed(world: World):
    folder = world.served / "hf/org/Gemma-GGUF"
    parts = {f"BF16/big-BF16-0000{number}-of-00003.gguf": gguf(number) for number in (1, 2, 3)}
    write(folder, {"m.Q4_0.gguf": gguf(4), **parts})
    assert "BF16, Q4_0" in fails("means 2 GGUF files", "hf:org/Gemma-GGUF", UsageError)
    first = resolve("org/Gemma-GGUF:bf16")
    assert first.name == "big-BF16-00001-of-00003.gguf"
    assert {
        path.relative_to(first.parents[1]).as_posix(): path.read_bytes() for path in first.parent.iterdir()
    } == parts
    assert resolve("org/Gemma-GGUF:*-00002-*", offline=True) == first == resolve("org/Gemma-GGUF", offline=True)
    (entry,) = installed()
    assert entry.name == "hf:org/Gemma-GGUF:BF16/big-BF16-00001-of-00003.gguf" and entry.path == first
    assert entry.ready and entry.format == "gguf BF16" and entry.size == sum(map(len, parts.values()))
    first.with_name("big-BF16-00003-of-00003.gguf").unlink()
    assert not installed()[0].ready
    fails("is not downloaded", "hf:org/Gemma-GGUF:bf16", offline=True)
    assert resolve(entry.name) == first and installed()[0].ready
    remove([entry])
    assert world.left(models=True) == []
    (folder / "BF16/big-BF16-00002-of-00003.gguf").unlink()
    fails("lacks BF16/big-BF16-00002-of-00003.gguf of its 3 parts: choose another", "org/Gemma-GGUF:bf16")


def test_googles_own_checkpoints_come_from_there_too(world: World):
    flax = {"2b/_METADATA": b"{}", "2b/d/0": b"arrays", "tokenizer.model": b"t"}
    write(world.served / "hf/org/gemma-flax", flax)
    write(world.served / "hf/org/gemma-torch", {"gemma-2b.ckpt": b"tensors", "tokenizer.model": b"t", "notes.md": b"x"})
    for name, files in (("flax", set(flax)), ("torch", {"gemma-2b.ckpt", "tokenizer.model"})):
        path = resolve(f"org/gemma-{name}")
        assert {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} == files
        assert resolve(f"org/gemma-{name}", offline=True) == path
    assert [(entry.ready, entry.format) for entry in installed()] == [(True, "flax"), (True, "torch")]


def test_a_hub_cannot_write_outside_its_folder(world: World):
    """The server's list always has ../outside.gguf and /etc/x.gguf."""
    shutil.copytree(world.served / "hf/google/gemma-2b", world.served / "hf/org/m")
    fails("no GGUF file", "org/m:*outside*", UsageError)
    fails("no GGUF file", "hf:org/m:/etc/x.gguf", UsageError)
    pickles = {"config.json": b"{}", "pytorch_model.bin": b"pickle", "original/consolidated.00.pth": b"pickle"}
    write(world.served / "hf/org/old", pickles)
    fails("pickles", "org/old")
    assert world.left(models=True) == []


def test_two_processes_make_one_good_copy(world: World):
    for shard in SHARDS:
        world.fault(shard, "slow", rate=200_000, times=9)
    processes = [world.python(RESOLVE) for _ in range(2)]
    paths = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        paths.append(Path(out.strip()))
    assert paths[0] == paths[1] and same(paths[0], gemma()) and world.left() == []
    fetched = [entry["path"] for entry in world.log() if entry["on"] == "cdn"]
    assert len(fetched) == len(set(fetched)), "the second process waits for the first"


def test_a_file_that_another_process_finished_meanwhile_is_left_alone(tmp_path, monkeypatch):
    item = hub_item.Item("x", "", {}, 3, tmp_path / "x", tmp_path / "x.incomplete", hub_item.md5, lambda headers: None)
    real = hub_item._try_lock

    def late(path: Path):
        item.target.write_bytes(b"yes")
        return real(path)

    monkeypatch.setattr(hub_item, "_try_lock", late)
    with hub_item.locked(item, lambda: False) as file:
        assert file is None
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_killed_process_holds_nothing(world: World):
    for shard in SHARDS:
        world.fault(shard, "slow", rate=50_000)
    process = world.python(RESOLVE)
    world.wait_until_half(1)
    process.kill()
    process.communicate(timeout=10)
    world.calm()
    assert same(resolve(NAME), gemma())
    assert all(text.startswith("bytes=") for text in ranges(world, ".safetensors")) and world.left() == []


def test_an_interrupt_is_prompt_and_the_next_try_goes_on(world: World):
    for shard in SHARDS:
        world.fault(shard, "stall", at=20_000, seconds=30)
    process = world.python(RESOLVE)
    world.wait_until_half(20_000)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode != 0 and "KeyboardInterrupt" in err and time.monotonic() - began < 5
    assert not list(world.hf.glob("*/snapshots/*"))
    world.calm()
    assert same(resolve(NAME), gemma())
    assert sorted(ranges(world, ".safetensors")) == ["bytes=20000-", "bytes=20000-"] and world.left() == []


def test_a_full_disk_is_seen_before_and_on_the_way(world: World, monkeypatch):
    usage = shutil.disk_usage(world.served)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=SHARD))
    message = fails("has no room", NAME)
    assert f"{SHARD:,} bytes are free" in message and "bytes are needed" in message
    assert not [entry for entry in world.log() if entry["on"] == "cdn"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    real = hub_fetch._Transfer._write

    def full(self, block: bytes) -> None:
        if self.at + len(block) > SHARD // 2:
            real(self, block[: SHARD // 2 - self.at])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, block)

    monkeypatch.setattr(hub_fetch._Transfer, "_write", full)
    assert f"{SHARD - SHARD // 2:,} bytes are needed" in fails("has no room", NAME)
    assert not list(world.hf.glob("*/snapshots/*"))
    monkeypatch.setattr(hub_fetch._Transfer, "_write", real)
    world.log()
    assert same(resolve(NAME), gemma())
    assert f"bytes={SHARD // 2}-" in ranges(world, ".safetensors") and world.left() == []


def test_a_folder_that_may_not_be_written_is_one_line(world: World, monkeypatch):
    (world.caches / "file").parent.mkdir(parents=True)
    (world.caches / "file").write_bytes(b"")
    monkeypatch.setenv("HF_HOME", str(world.caches / "file"))
    fails("cannot be written", NAME)


@pytest.mark.parametrize(("name", "variable"), [(NAME, "HF_HOME"), ("kaggle:google/gemma/flax/2b", "KAGGLEHUB_CACHE")])
def test_a_folder_that_may_not_be_read_is_one_line(world: World, monkeypatch, name: str, variable: str):
    """Such as a cache that another user made, in a container as root."""
    real = Path.is_file

    def is_file(path: Path) -> bool:
        if world.caches in path.parents and "gemma" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    for folder in (world.hf / "models--google--gemma-2b/snapshots/x", world.kaggle / "models/google/gemma/flax/2b/1"):
        write(folder, {"config.json": b"{}"})
    monkeypatch.setattr(Path, "is_file", is_file)
    assert variable in fails("cannot be read (Permission denied)", name)


def test_progress_counts_what_comes(world: World):
    world.fault(SHARDS[0], "slow", rate=300_000)
    seen: list[Progress] = []
    resolve(NAME, progress=seen.append)
    total = sum(len(gemma()[name]) for name in NEEDED)
    assert seen[-1].bytes == seen[-1].total_bytes == total and seen[-1].files == seen[-1].total_files == len(NEEDED)
    assert [one.bytes for one in seen] == sorted(one.bytes for one in seen) and len(seen) > 2
    line = describe(Progress(1, 3, 25_000_000, 100_000_000, 1_000_000.0))
    assert line == "1/3 files, 25.0 of 100.0 MB (25%), 1.0 MB/s, 1:15 left"


def test_paths_are_themselves(world: World, tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf())
    monkeypatch.chdir(tmp_path)
    assert resolve(file) == file and resolve("model.gguf") == Path("model.gguf") and resolve(str(tmp_path)) == tmp_path
    (tmp_path / "google" / "gemma-2b").mkdir(parents=True)
    assert resolve("google/gemma-2b") == Path("google/gemma-2b")
    fails("hf:org/name", "google/gemma-7b")
    fails("no file or folder", tmp_path / "none")
    assert world.log() == []


def test_the_hubs_client_is_not_imported_for_what_is_here(world: World, tmp_path):
    path = resolve(NAME)
    (tmp_path / "model.gguf").write_bytes(gguf())
    code = (
        "import sys, gemkit\nfrom gemkit.hub.resolve import installed, resolve\n"
        f"resolve({str(tmp_path / 'model.gguf')!r}); print(resolve('gemma-2b')); installed()\n"
        "print([name for name in ('huggingface_hub', 'httpx2') if name in sys.modules])"
    )
    out, err = world.python(code).communicate(timeout=60)
    assert out.split("\n") == [str(path), "[]", ""], err


@pytest.mark.parametrize(
    "variables",
    [{}, {"HF_HOME": "~/a"}, {"HF_HUB_CACHE": "$HOME/b", "HF_HOME": "c"}, {"XDG_CACHE_HOME": "/d"}],
    ids=lambda variables: "+".join(variables) or "none",
)
def test_the_cache_is_where_hugging_face_looks(monkeypatch, variables: dict[str, str]):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code = "import os, huggingface_hub.constants as c; print(os.path.abspath(c.HF_HUB_CACHE))"
    out, err = World(0, Path(), Path()).python(code).communicate(timeout=60)
    assert out.strip() == str(cache_folder()), err


def test_packed_weights_go_with_their_model(world: World):
    packed = world.caches / "gemkit" / "packed"
    paths = [world.caches / name for name in ("a.gguf", "b.gguf", "c.gguf")]
    for path, image in zip(paths, ("one", "one", "two")):
        record = {"source": str(path), "packed": f"{image}.packed", "files": []}
        write(packed, {f"{path.stem}.json": json.dumps(record).encode(), f"{image}.packed": b"x"})
    write(packed, {"broken.json": b"{", "other.json": b"[]"})
    drop(paths[1:])
    assert sorted(path.name for path in packed.iterdir()) == ["a.json", "broken.json", "one.packed", "other.json"]
    drop(paths[:1])
    assert sorted(path.name for path in packed.iterdir()) == ["broken.json", "other.json"]
