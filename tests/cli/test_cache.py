"""`gemkit cache`: what is kept, how large it is, and what `prune` removes. Budget: 10 s."""

import json
import os
import time
from pathlib import Path

import pytest
from hub.test_resolve import fails
from hub.world import KAGGLE, SHARDS, World, server_fixture, world_fixture, write  # noqa: F401
from models.test_kept import aged, keep, model

import gemkit.cli
from gemkit.hub.item import _try_lock
from gemkit.hub.resolve import resolve

DAY = 86400


def run(capsys: pytest.CaptureFixture, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        gemkit.cli.main(["cache", *args])
    output = capsys.readouterr()
    return exit_.value.code or 0, output.out, output.err


@pytest.fixture(name="kept")
def kept_fixture(world: World, tmp_path: Path) -> Path:
    """Three packed copies, one of them of a model that is gone, and a tokenizer."""
    packed = world.caches / "gemkit" / "packed"
    packed.mkdir(parents=True)
    for number, age in enumerate((0, 40 * DAY, 5 * DAY)):
        keep(packed, model(tmp_path / f"model-{number}.gguf"), f"image-{number}", 10_000, age)
    (tmp_path / "model-2.gguf").unlink()
    model(packed.parent / "tokenizers" / "x.bin", "x" * 600)
    return packed


def left(kept: Path) -> set[str]:
    return {path.stem for path in kept.glob("*.packed")}


def test_it_lists_what_there_is(capsys, kept: Path):
    code, out, err = run(capsys)
    assert (code, err) == (0, "") and out == run(capsys, "list")[1]
    rows = {line.split()[-1].rsplit("/", 1)[-1]: line for line in out.splitlines() if line.startswith("packed weights")}
    assert set(rows) == {f"model-{number}.gguf" for number in range(3)}
    assert "there" in rows["model-0.gguf"] and "gone" in rows["model-2.gguf"]
    assert "tokenizers" in out and "of at most 20,000.0 MB" in out and "gemkit cache prune" in out
    record = json.loads(run(capsys, "--json")[1])
    assert [copy["source"] for copy in record["copies"]].count("gone") == 1 and record["limit"] == 20 * 10**9
    assert record["bytes"] == sum(copy["size"] for copy in record["copies"]) > 30_000
    assert left(kept) == {"image-0", "image-1", "image-2"}, "a list removes nothing"


def test_an_empty_cache(capsys, world: World):
    assert run(capsys)[1].startswith("0.0 MB of at most")
    assert run(capsys, "prune")[1] == "removed 0.0 MB in 0 copies\n"


def test_prune_removes_what_is_dead(capsys, kept: Path):
    assert run(capsys, "prune")[1].endswith("in 1 copies\n") and left(kept) == {"image-0", "image-1"}
    record = json.loads(run(capsys, "prune", "--older-than", "30d", "--json")[1])
    assert len(record["removed"]) == 1 and record["bytes"] > 10_000 and left(kept) == {"image-0"}
    run(capsys, "prune", "--max-size", "20KB")
    assert left(kept) == {"image-0"} and list(kept.parent.glob("tokenizers/*"))
    run(capsys, "prune", "--max-size", "1KB")
    assert left(kept) == set()


def test_prune_all_leaves_models_alone(capsys, kept: Path, world: World):
    path = resolve("gemma-2b")
    world.fault(SHARDS[0], "cut", at=3000)
    world.fault(SHARDS[0], "status", status=503, times=99)
    fails("run it again", KAGGLE)
    assert len([copy for copy in json.loads(run(capsys, "--json")[1])["copies"] if "download" in copy["kind"]]) == 1
    (partial,) = world.kaggle.rglob("*.incomplete")
    run(capsys, "prune", "--all")
    assert partial.exists(), "it may be fetched just now"
    aged(partial, 600)
    with _try_lock(partial):
        aged(partial, 600)
        run(capsys, "prune", "--all")
        assert partial.exists(), "another process holds it"
    run(capsys, "prune")
    assert partial.exists(), "the next download goes on with it"
    run(capsys, "prune", "--all")
    assert not partial.exists() and not list(kept.iterdir()) and path.is_dir()
    assert not list(kept.parent.glob("tokenizers/*")) and all(part.exists() for part in path.iterdir())


@pytest.mark.parametrize(
    ("words", "args"),
    [
        ("gemkit cache prune", ["--all"]),
        ("gemkit cache prune", ["list", "--max-size", "1GB"]),
        ("leave the other options out", ["prune", "--all", "--older-than", "3d"]),
        ("--older-than is 'soon'", ["prune", "--older-than", "soon"]),
        ("--max-size is 'big'", ["prune", "--max-size", "big"]),
        ("prune", ["clear"]),
    ],
)
def test_wrong_usage_removes_nothing(capsys, kept: Path, words: str, args: list[str]):
    code, out, err = run(capsys, *args)
    assert code == 2 and not out and words in err and err.count("\n") == 1
    assert len(left(kept)) == 3


def test_show_keeps_no_copy_and_a_load_does(world: World, tmp_path, capsys):
    from models.native.test_packed import write_model

    path = write_model(tmp_path / "tiny.gguf")
    packed = world.caches / "gemkit" / "packed"
    with pytest.raises(SystemExit):
        gemkit.cli.main(["show", str(path)])
    assert "tiny.gguf" in capsys.readouterr().out and not list(packed.glob("*"))
    with gemkit.load(path, threads=1):
        pass
    (record,) = packed.glob("*.json")
    then = time.time() - DAY
    os.utime(record, (then, then))
    with pytest.raises(SystemExit):
        gemkit.cli.main(["show", str(path)])
    assert abs(record.stat().st_mtime - then) < 2, "to look is no use"
    with gemkit.load(path, threads=1):
        pass
    assert record.stat().st_mtime > then + DAY / 2 and len(list(packed.glob("*.packed"))) == 1
