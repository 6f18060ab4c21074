"""Paths on the command line are looked at before a model is loaded or fetched. Budget: 3 s."""

from pathlib import Path

import pytest

import gemkit.cli
from gemkit.api import load as loading
from gemkit.weights.peft.config import CONFIG


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(*args: object, **options: object) -> None:
        raise AssertionError("the model was looked for first")

    monkeypatch.setattr(loading, "find", find)


def run(capsys: pytest.CaptureFixture, *args: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        gemkit.cli.main([str(arg) for arg in args])
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1, output.err
    return exit_.value.code, output.err


@pytest.mark.parametrize(
    ("code", "words", "args"),
    [
        (1, "there is no file nosuch.txt", ["score", "demo", "--file", "nosuch.txt"]),
        (1, "is a folder", ["score", "demo", "--file", "folder"]),
        (1, "taken.gguf exists", ["convert", "demo", "taken.gguf", "--to", "gguf"]),
        (2, "taken.gguf is not a folder", ["convert", "demo", "taken.gguf/x.gguf", "--to", "gguf"]),
        (2, "no int8 blocks", ["convert", "demo", "new", "--to", "hf", "--dtype", "int8"]),
        (2, "nosuch.txt", ["convert", "demo", "new", "--to", "hf", "--verify", "--text-file", "nosuch.txt"]),
        (1, "taken.gguf exists", ["quantize", "demo", "taken.gguf", "--type", "q8_0"]),
        (2, "nosuch.txt", ["quantize", "demo", "new.gguf", "--type", "q8_0", "--text-file", "nosuch.txt"]),
        (2, "taken.gguf is not a folder", ["generate", "demo", "--prompt", "x", "--receipt", "taken.gguf/r.json"]),
        (2, "nosuch.json", ["replay", "nosuch.json"]),
        *[
            (1, "the adapter nosuch does not exist", [*verb, "--adapter-path", "nosuch"])
            for verb in (["generate", "demo", "--prompt", "x"], ["score", "demo", "--text", "x"], ["show", "demo"])
        ],
        (1, f"folder has no {CONFIG}", ["show", "demo", "--adapter-path", "folder"]),
        (1, "the adapter taken.gguf is not a folder", ["bench", "demo", "--adapter-path", "taken.gguf"]),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else "",
)
def test_a_bad_path_is_one_line(capsys, tmp_path: Path, monkeypatch, code: int, words: str, args: list[str]):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken.gguf").touch()
    got, err = run(capsys, *args)
    assert got == code and words in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "taken.gguf"]
