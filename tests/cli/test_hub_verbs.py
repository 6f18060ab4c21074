"""`gemkit download`, `ls` and `rm`: what they print, ask and leave. Budget: 8 s."""

import io
import json
import shutil
import signal

import pytest
from hub.world import KAGGLE, SHARD, SHARDS, World, gguf, server_fixture, world_fixture, write  # noqa: F401

import gemkit.cli
from gemkit.hub import demo
from gemkit.hub.progress import Progress, on_terminal

VERBS = tuple(dict.fromkeys((*gemkit.cli.VERBS, "download", "ls", "rm")))
NAME = "hf:google/gemma-2b"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def verbs(monkeypatch):
    monkeypatch.setattr(gemkit.cli, "VERBS", VERBS)


def run(capsys: pytest.CaptureFixture, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        gemkit.cli.main(list(args))
    output = capsys.readouterr()
    return exit_.value.code or 0, output.out, output.err


def rows(capsys: pytest.CaptureFixture) -> list[dict]:
    code, out, err = run(capsys, "ls", "--json")
    assert (code, err) == (0, "")
    return json.loads(out)["models"]


def test_download_prints_the_path_and_nothing_else(capsys, world: World, monkeypatch):
    code, out, err = run(capsys, "download", "gemma-2b")
    path = out.rstrip("\n")
    assert (code, err) == (0, "") and path.startswith(str(world.hf)) and "\n" not in path
    code, out, err = run(capsys, "download", NAME, "--json", "--offline")
    assert (code, err, json.loads(out)) == (0, "", {"name": NAME, "path": path})
    assert run(capsys, "download", "gemma-2b", "--revision", "v1")[1].rstrip() == path
    assert run(capsys, "download", KAGGLE, "--revision", "3")[1].startswith(str(world.kaggle))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, out, err = run(capsys, "download", "gemma-2b")
    assert (code, out.rstrip()) == (0, path) and err.count("\n") == 1 and "the copy in" in err


@pytest.mark.parametrize(
    ("code", "words", "args"),
    [
        (1, "gemma-2-2b-it", ["download", "gemma2-2b-it"]),
        (1, "--offline", ["download", "gemma-7b", "--offline"]),
        (1, "no revision 'v9'", ["download", "gemma-2b", "--revision", "v9"]),
        (2, "Kaggle's versions are numbers", ["download", KAGGLE, "--revision", "main"]),
        (2, "GGUF", ["download", "hf:google/gemma-2b:Q4_0"]),
        (2, "NAME", ["download"]),
        (1, "not downloaded", ["rm", "gemma-2b", "--yes"]),
        (1, "not downloaded", ["rm", "demo", "--yes"]),
        (2, "NAME", ["rm"]),
    ],
)
def test_what_cannot_be_is_one_line(capsys, world: World, code: int, words: str, args: list[str]):
    got, out, err = run(capsys, *args)
    assert (got, out) == (code, "") and err.startswith("gemkit: ") and err.count("\n") == 1 and words in err, err


@pytest.mark.parametrize("verb", ["check", "doctor"])
def test_what_only_looks_does_not_blame_the_network(capsys, world: World, verb: str):
    code, out, err = run(capsys, verb, "gemma-7b")
    assert code in (1, 2) and not out and err == "gemkit: gemma-7b is not downloaded: run 'gemkit download gemma-7b'\n"
    assert world.log() == []


def test_an_interrupted_download_exits_with_130_and_is_listed_as_incomplete(capsys, world: World):
    for shard in SHARDS:
        world.fault(shard, "stall", at=30_000, seconds=30)
    code = f"import gemkit.cli; gemkit.cli.VERBS = {VERBS!r}; gemkit.cli.main(['download', 'gemma-2b'])"
    process = world.python(code)
    world.wait_until_half(30_000)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err.strip()) == (130, "", "gemkit: interrupted")
    (row,) = rows(capsys)
    assert (row["name"], row["ready"]) == (NAME, False) and row["size"] > 60_000
    assert "incomplete" in run(capsys, "ls")[1]
    world.calm()
    run(capsys, "download", "gemma-2b")
    (row,) = rows(capsys)
    assert (row["name"], row["ready"]) == (NAME, True)
    assert run(capsys, "rm", "gemma-2b", "--yes")[0] == 0 and world.left(models=True) == []


def test_ls_lists_gemmas_and_nothing_else(capsys, world: World, monkeypatch):
    assert "gemkit download" in run(capsys, "ls")[1] and rows(capsys) == []
    for name in ("gemma-2b", KAGGLE):
        run(capsys, "download", name)
    write(world.hf / "models--org--bert/snapshots" / ("a" * 40), {"config.json": b'{"model_type": "bert"}'})
    llama = gguf().replace(b"gemma", b"llama")
    write(
        world.hf / "models--org--gguf/snapshots" / ("b" * 40), {"x-Q4_0.gguf": gguf(), "y.gguf": llama, "z.gguf": b""}
    )
    write(world.hf / "models--org--tuned/snapshots" / ("c" * 40), {"config.json": b'{"model_type": "gemma3_text"}'})
    write(world.caches / "gemkit", {"packed/a.packed": bytes(2_000_000), "demo/small.gguf": b"x"})
    monkeypatch.setattr(demo, "SIZE", 1)
    found = {row["name"]: (row["ready"], row["format"]) for row in rows(capsys)}
    assert found == {
        NAME: (True, "safetensors bfloat16"),
        f"{KAGGLE}/3": (True, "safetensors bfloat16"),
        "hf:org/gguf@bbbbbbbbbbbb:x-Q4_0.gguf": (True, "gguf Q4_0"),
        "hf:org/tuned@cccccccccccc": (False, "safetensors"),
        "demo": (True, "gguf"),
    }
    code, out, err = run(capsys, "ls")
    assert (code, err) == (0, "") and out.count("\n") == 8 and "packed weights of all models: 2.0 MB" in out
    assert f"{(2 * SHARD + 5000) / 1e6:.1f} MB" in out
    assert json.loads(run(capsys, "ls", "--json")[1])["packed_size"] == 2_000_000
    for name in found:
        assert run(capsys, "rm", name, "--yes")[0] == 0
    assert rows(capsys) == [] and (world.hf / "models--org--bert").is_dir()


def test_rm_asks_where_it_can(capsys, world: World, monkeypatch):
    path = run(capsys, "download", "gemma-2b")[1].rstrip()
    record = json.dumps({"source": path, "packed": "a.packed"}).encode()
    write(world.caches / "gemkit/packed", {"a.json": record, "a.packed": b"x"})
    monkeypatch.setattr("sys.stdin", io.StringIO())
    code, out, err = run(capsys, "rm", "gemma-2b")
    assert (code, out) == (2, "") and "--yes" in err
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    code, out, err = run(capsys, "rm", "gemma-2b")
    assert (code, out) == (1, "") and "nothing was deleted" in err and path in err
    assert rows(capsys) and list((world.caches / "gemkit/packed").iterdir())
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert run(capsys, "rm", "gemma-2b")[:2] == (0, "")
    assert rows(capsys) == [] and not list((world.caches / "gemkit/packed").iterdir())
    code, out, err = run(capsys, "rm", str(world.caches), "--yes")
    assert code == 2 and "is a path" in err and world.caches.is_dir()


def test_the_progress_line_is_for_terminals(world: World, monkeypatch):
    quiet, screen = io.StringIO(), Terminal()
    for stream in (quiet, screen):
        show = on_terminal("gemma-2b", stream)
        show(Progress(1, 6, 50, 100, 25e6))
        show(Progress(1, 6, 60, 100, 25e6))
        show(None)
    assert quiet.getvalue() == ""
    first, *_, last = screen.getvalue().split("\r")[1:]
    assert first.startswith("gemma-2b: 1/6 files") and "(50%), 25.0 MB/s" in first and last == ""
    assert screen.getvalue().count("(60%)") == 0, "ten lines a second are enough"
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: shutil.os.terminal_size((20, 24)))
    narrow = Terminal()
    on_terminal("gemma-2b", narrow)(Progress(1, 6, 50, 100, 25e6))
    assert len(narrow.getvalue()) == 20
