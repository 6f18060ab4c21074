"""The prompt's text: arguments, files, pipes and terminals, alone and together. Budget: 15 s."""

import io
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from cli.screen import Screen

from gemkit.cli import main, prompt
from gemkit.cli.prompt import Prompt
from gemkit.errors import GemkitError, UsageError
from gemkit.hub.demo import demo_path

GENERATE = [sys.executable, "-m", "gemkit", "generate"]


class Pipe:
    """A pipe as standard input; closed at the end of the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read, self.write = os.pipe()
        self.file = os.fdopen(self.read, "r")
        monkeypatch.setattr("sys.stdin", self.file)

    def send(self, data: bytes) -> None:
        os.write(self.write, data)

    def end(self) -> None:
        descriptor, self.write = self.write, -1
        if descriptor >= 0:
            os.close(descriptor)


@pytest.fixture
def pipe(monkeypatch):
    made = Pipe(monkeypatch)
    yield made
    made.end()
    time.sleep(0.01)
    made.file.close()


@pytest.fixture
def files(tmp_path):
    for name, text in {"a.txt": "file a\n", "b.txt": "\nfile b", "empty.txt": " \n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    return {path.stem: str(path) for path in tmp_path.iterdir()}


def text(pipe: Pipe, piped: bytes, words=(), option=None, files=()) -> str:
    pipe.send(piped)
    pipe.end()
    return Prompt(words, option, files).text()


@pytest.mark.parametrize(
    ("words", "option", "names", "piped", "expected"),
    [
        (["Hello there"], None, [], b"", "Hello there"),
        (["Once", "upon", "a", "time"], None, [], b"", "Once upon a time"),
        ([], "Hello", [], b"", "Hello"),
        ([], "", [], b"", ""),
        ([], None, [], b" as it is \n", " as it is \n"),
        ([], "-", [], b"as it is\n", "as it is\n"),
        (["-"], None, [], b"as it is\n", "as it is\n"),
        (["Shorten:"], None, [], b"text\n", "Shorten:\n\ntext"),
        ([], "Shorten:", [], b"text\n", "Shorten:\n\ntext"),
        (["Shorten:", "-"], None, [], b"text\n", "Shorten:\n\ntext"),
        (["Shorten:"], "-", [], b"text\n", "Shorten:\n\ntext"),
        (["Shorten:"], None, [], b" \n", "Shorten:"),
        ([], None, ["a"], b"", "file a\n"),
        ([], None, ["a"], b"text\n", "file a\n\ntext"),
        (["Shorten:"], None, ["a", "b"], b"text\n", "Shorten:\n\nfile a\n\nfile b\n\ntext"),
        (["Shorten:"], None, ["-"], b"text\n", "Shorten:\n\ntext"),
    ],
)
def test_instruction_files_and_pipe_are_put_together(pipe, files, words, option, names, piped, expected):
    assert text(pipe, piped, words, option, [files.get(name, name) for name in names]) == expected


@pytest.mark.parametrize(
    ("words", "option", "names", "piped", "message"),
    [
        ([], None, [], b"", "standard input is empty: give the text"),
        ([], None, [], b" \n", "standard input is empty"),
        ([], "-", [], b"", "standard input is empty"),
        (["Shorten:", "-"], None, [], b"", "standard input is empty"),
        ([], None, ["-"], b"", "standard input is empty"),
        ([], None, [], b"\xff", "standard input is not UTF-8"),
        (["Shorten:"], None, [], b"na\xefve", "standard input is not UTF-8"),
        ([], None, ["latin1"], b"", r"latin1\.txt is not UTF-8"),
        ([], None, ["empty"], b"", r"empty\.txt is empty"),
        (["a"], "b", [], b"", "given twice"),
    ],
)
def test_what_is_no_prompt_is_refused(pipe, files, words, option, names, piped, message):
    with pytest.raises(UsageError, match=message):
        text(pipe, piped, words, option, [files.get(name, name) for name in names])


def test_a_file_that_is_not_there_is_one_line(pipe, tmp_path):
    for path, message in [(tmp_path / "nowhere.txt", "there is no file"), (tmp_path, "is a folder")]:
        with pytest.raises(GemkitError, match=message):
            Prompt((), None, [str(path)])


def test_a_prompt_without_any_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert Prompt(["Hello"], None, ()).text() == "Hello"
    with pytest.raises(UsageError, match="the text is missing"):
        Prompt((), None, ())
    with pytest.raises(UsageError, match="standard input is empty"):
        Prompt((), "-", ())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    assert Prompt(["Shorten:"], None, ()).text() == "Shorten:\n\ntext"


def test_a_slow_pipe_is_waited_for_and_said(pipe, monkeypatch, capsys):
    monkeypatch.setattr(prompt, "PATIENCE", 0.1)
    made = Prompt(["Shorten:"], None, ())
    threading.Timer(0.4, lambda: (pipe.send(b"late\n"), pipe.end())).start()
    assert made.text() == "Shorten:\n\nlate"
    assert capsys.readouterr().err == "gemkit: waiting for the end of standard input (Ctrl-D on a terminal)\n"


def test_a_pipe_that_a_program_left_open_does_not_hold_up_its_prompt(pipe, capsys):
    assert Prompt((), "Hello", ()).text() == "Hello"
    err = capsys.readouterr().err
    assert err.startswith("gemkit: nothing came through standard input") and err.count("\n") == 1


def test_a_loop_over_the_lines_of_a_file_keeps_its_lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(b"one\ntwo\n")
    with path.open("rb", buffering=0) as file:
        file.read(4)
        code = "from gemkit.cli.prompt import Prompt; print(repr(Prompt(['Hello'], None, ()).text()))"
        done = subprocess.run([sys.executable, "-c", code], stdin=file, capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.stderr) == ("'Hello'\n", "")
        assert file.read() == b"two\n"


def test_the_command_takes_all_of_them(files):
    demo_path()
    options = ["--raw", "--max-tokens", "1", "--temp", "0", "--json"]
    done = subprocess.run(
        [*GENERATE, "demo", "Say", "it:", "-f", files["a"], *options], input=b"text\n", capture_output=True, timeout=60
    )
    alone = subprocess.run(
        [*GENERATE, "demo", "-p", "Say it:\n\nfile a\n\ntext", *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert done.stderr == alone.stderr == b""
    record, other = json.loads(done.stdout), json.loads(alone.stdout)
    assert record["ids"] == other["ids"]
    assert record["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"] > 8


def test_a_terminal_is_read_for_a_dash_alone():
    with Screen([*GENERATE, "demo"]) as screen:
        screen.until("the text is missing: gemkit generate MODEL")
        screen.until("gemkit chat MODEL")
        assert screen.code() == 2
    with Screen([*GENERATE, "demo", "-", "--max-tokens", "4", "--temp", "0"]) as screen:
        screen.until("waiting for the end of standard input")
        screen.send("One, two,\n\x04")
        assert screen.code() == 0
    with Screen([*GENERATE, "demo", "One,", "two,", "--max-tokens", "4", "--temp", "0"]) as screen:
        screen.until("three")
        assert screen.code() == 0


def test_a_receipt_makes_no_folder(tmp_path, capsys):
    path = tmp_path / "no" / "receipt.json"
    with pytest.raises(SystemExit) as exit_:
        main(["generate", "nowhere.gguf", "x", "--receipt", str(path)])
    output = capsys.readouterr()
    assert (exit_.value.code, output.out, output.err.count("\n")) == (2, "", 1)
    assert f"the folder {path.parent} does not exist" in output.err and not path.parent.exists()
