"""Text goes out whole, whatever the code page, and comes in with or without a byte order mark. Budget: 10 s."""

import io
import json
import sys
import warnings

import pytest

from gemkit.cli import main
from gemkit.cli.common import decode_text, print_json, read_text
from gemkit.cli.streams import whole_text
from gemkit.errors import GemkitWarning, UsageError

TEXT = "日本の首都は 👍 naïve → ×"


class Stream(io.TextIOWrapper):
    """A standard stream of some encoding, a terminal or not."""

    def __init__(self, encoding: str, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding, "strict", newline="", write_through=True)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    @property
    def written(self) -> bytes:
        return self.buffer.getvalue()


@pytest.fixture
def streams(monkeypatch):
    """Sets standard output and error, and PYTHONIOENCODING; returns both streams."""

    def set_up(encoding: str, *, terminal: bool = False, variable: str = "") -> tuple[Stream, Stream]:
        monkeypatch.setenv("PYTHONIOENCODING", variable)
        out, err = Stream(encoding, terminal), Stream(encoding, terminal)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return out, err

    return set_up


def unescaped(data: bytes, encoding: str) -> str:
    """Text as a reader of backslash escapes gets it back; TEXT has no backslashes of its own."""
    import re

    escape = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))")
    return escape.sub(lambda found: chr(int(next(filter(None, found.groups())), 16)), data.decode(encoding))


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "cp437"])
def test_a_pipe_gets_utf8(streams, encoding):
    out, err = streams(encoding)
    with whole_text():
        sys.stdout.write(TEXT)
        sys.stderr.write(TEXT)
    assert out.written == err.written == TEXT.encode()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp437"])
def test_a_code_page_that_stays_loses_nothing_and_is_named(streams, encoding, terminal):
    out, err = streams(encoding, terminal=terminal, variable="" if terminal else encoding)
    with whole_text():
        for character in TEXT:
            sys.stdout.write(character)
    assert b"?" not in out.written and unescaped(out.written, encoding) == TEXT
    said = err.written.decode(encoding)
    assert said.count("\n") == 1 and said.startswith(f"gemkit: standard output is {encoding}")
    out, err = streams(encoding, terminal=terminal, variable="" if terminal else encoding)
    with whole_text():
        sys.stdout.write("plain")
    assert (out.written, err.written) == (b"plain", b"")


def test_a_handler_of_errors_that_the_user_chose_stays(streams):
    out, err = streams("ascii", variable="ascii:ignore")
    out.reconfigure(errors="ignore")  # as Python does with that variable
    with whole_text():
        sys.stdout.write("naïve")
    assert (out.written, err.written) == (b"nave", b"")


@pytest.mark.parametrize(
    ("encoding", "terminal"), [("cp1252", True), ("latin-1", True), ("utf-8", False), ("utf-8", True)]
)
@pytest.mark.parametrize("text", [TEXT, "caf\udce9.gguf"])
def test_json_is_whole_in_any_encoding(streams, encoding, terminal, text):
    out, err = streams(encoding, terminal=terminal)
    with whole_text():
        print_json({"text": text})
    assert json.loads(out.written.decode(encoding)) == {"text": text} and err.written == b""
    assert (TEXT.encode() in out.written) == (encoding == "utf-8" and text == TEXT)


def test_a_name_of_a_file_that_is_not_utf8_is_no_failure(streams):
    out, err = streams("utf-8")
    with whole_text():
        sys.stdout.write("caf\udce9.gguf")
    assert (out.written, err.written) == (b"caf\\udce9.gguf", b"")


def test_a_warning_is_one_line(streams):
    _, err = streams("utf-8")
    with whole_text():
        warnings.warn("mind\nthis", GemkitWarning, stacklevel=1)
    assert err.written == b"gemkit: mind this\n"


def test_a_command_writes_whole_json(streams):
    """The names of the options of the command are those of the other tests: this one goes the whole way."""
    out, _ = streams("cp1252", terminal=True)
    with pytest.raises(SystemExit) as exit_:
        main(["tokenize", "demo", "--json", TEXT])
    assert not exit_.value.code
    assert "".join(token["text"] for token in json.loads(out.written.decode("cp1252"))["tokens"][1:]) == TEXT


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_comes_in_as_it_is(tmp_path, monkeypatch, encoding):
    data = f"{TEXT}\r\nline\n".encode(encoding)
    (tmp_path / "text").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_text(str(tmp_path / "text")) == read_text("-") == f"{TEXT}\r\nline\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"na\xefve", r"UTF-8 text \(byte 2\)"),
        (b"\xff\xfea", "UTF-16 text"),
        (b"a\0b\0", "UTF-16 without a byte order mark"),
    ],
)
def test_other_text_is_refused(data, words):
    with pytest.raises(UsageError, match=f"notes.txt is not .*{words}.*: save it as UTF-8"):
        decode_text(data, "notes.txt")
