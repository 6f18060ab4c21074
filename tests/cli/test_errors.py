"""Errors are one line with the remedy and an exit code: 1 failure, 2 usage, 130 interrupted. Budget: 15 s."""

import io
import os
import signal
import subprocess
import sys

import pytest

from gemkit.api import load as loading
from gemkit.cli import main
from gemkit.errors import GemkitError, UsageError
from gemkit.hub.demo import demo_path

GENERATE = [sys.executable, "-m", "gemkit", "generate", "demo", "--prompt", "One, two,", "--max-tokens", "2000"]


@pytest.fixture(scope="module", autouse=True)
def terms_were_shown():
    """The notice of the model's terms, once per machine, is over before a test looks at standard error."""
    demo_path()


def run(capsys: pytest.CaptureFixture, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    output = capsys.readouterr()
    return exit_.value.code or 0, output.out, output.err


def fails(capsys: pytest.CaptureFixture, code: int, words: str, *args: str) -> None:
    got, out, err = run(capsys, *args)
    assert (got, out) == (code, "")
    assert err.startswith("gemkit: ") and err.count("\n") == 1 and words in err, err


def test_version_and_help(capsys):
    code, out, err = run(capsys, "--version")
    assert (code, err) == (0, "") and out.startswith("gemkit ")
    code, out, err = run(capsys, "generate", "--help")
    assert (code, err) == (0, "") and "--prompt" in out
    code, out, err = run(capsys)
    assert (code, out) == (2, "") and "generate" in err


@pytest.mark.parametrize(
    ("words", "args"),
    [
        ("no verb 'nothing': choose from generate, ", ["nothing"]),
        ("no verb 'genrate'; did you mean 'generate'?", ["genrate", "demo"]),
        ("no verb 'rnu'; did you mean 'run'?", ["rnu"]),
        ("no verb 'pull'; did you mean 'download'?", ["pull", "gemma-3-1b-it"]),
        ("no verb 'help': 'gemkit -h' lists the verbs", ["help", "generate"]),
        ("A text that begins with a dash goes after --.", ["generate", "demo", "-5 + 3 ="]),
        ("no verb 'demo': a model comes after it, as in 'gemkit generate demo'", ["demo", "Hello"]),
        ("No such option '--promt'. (Did you mean one of: '--prompt'", ["generate", "demo", "--promt", "x"]),
        ("Did you mean '--debug'?", ["--debgu", "ls"]),
        ("given twice", ["generate", "demo", "x", "--prompt", "y"]),
        ("MODEL", ["generate", "--prompt", "x"]),
        ("standard input is empty", ["generate", "demo"]),
        ("--max-tokens", ["generate", "demo", "--prompt", "x", "--max-tokens", "0"]),
        ("temperature is", ["generate", "demo", "--prompt", "x", "--temp", "-1"]),
        ("temperature is", ["generate", "demo", "--prompt", "x", "--temp", "nan"]),
        ("top_p is", ["generate", "demo", "--prompt", "x", "--top-p", "1.5"]),
        ("presence_penalty is", ["generate", "demo", "--prompt", "x", "--presence-penalty", "inf"]),
        ("--logit-bias", ["generate", "demo", "--prompt", "x", "--logit-bias", "5"]),
        ("seed is", ["generate", "demo", "--prompt", "x", "--seed", "-1"]),
        ("--threads", ["generate", "demo", "--prompt", "x", "--threads", "0"]),
        ("--activations", ["generate", "demo", "--prompt", "x", "--activations", "int4"]),
        ("dtype is", ["generate", "demo", "--prompt", "x", "--dtype", "float16"]),
        ("--suffix", ["generate", "demo", "--prompt", "x", "--suffix", "y", "--raw"]),
        ("--logprobs needs --json", ["generate", "demo", "--prompt", "x", "--logprobs", "2"]),
        ("--raw", ["generate", "demo", "--prompt", "x", "--raw", "--system-prompt", "y"]),
        ("standard input is empty", ["score", "demo"]),
        ("given twice", ["score", "demo", "x", "--text", "y"]),
        ("given twice", ["score", "demo", "--text", "x", "--file", "y"]),
        ("--max-tokens", ["bench", "demo", "--max-tokens", "1"]),
    ],
)
def test_wrong_usage_is_2_and_one_line(capsys, words: str, args: list[str]):
    fails(capsys, 2, words, *args)


def test_a_missing_model_or_file_is_1_and_one_line(capsys, tmp_path):
    fails(capsys, 1, "nowhere.gguf", "generate", str(tmp_path / "nowhere.gguf"), "--prompt", "x")
    fails(capsys, 1, "nowhere.txt", "score", "demo", "--file", str(tmp_path / "nowhere.txt"))


def test_text_that_is_not_utf8_is_refused(capsys, tmp_path, monkeypatch):
    path = tmp_path / "latin1.txt"
    path.write_bytes("naïve".encode("latin-1"))
    fails(capsys, 2, "not UTF-8", "score", "demo", "--file", str(path))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    fails(capsys, 2, "not UTF-8", "generate", "demo", "--prompt", "-")
    fails(capsys, 2, "not UTF-8", "generate", "demo", "--prompt", "a\udcff")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GemkitError("mend\nthis"), 1),
        (UsageError("mend this"), 2),
        (FileNotFoundError(2, "mend this"), 1),
        (MemoryError(), 1),
        (ZeroDivisionError("odd"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_below_the_command_line(capsys, monkeypatch, error: BaseException, code: int):
    def load(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(loading, "Loading", load)
    got, out, err = run(capsys, "generate", "demo", "--prompt", "x")
    line = err.strip().splitlines()
    assert (got, out, len(line)) == (code, "", 1), err
    assert line[0].startswith("gemkit: ")


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_shows_the_traceback(how: str):
    flag = ["--debug"] if how == "flag" else []
    environment = {**os.environ, "GEMKIT_DEBUG": "1"} if how == "environment" else dict(os.environ)
    command = [sys.executable, "-m", "gemkit", *flag, "generate", "nowhere.gguf", "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "GemkitError" in done.stderr


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b'{"messages": 3}'])
def test_a_damaged_last_conversation_has_a_remedy_that_works(capsys, monkeypatch, tmp_path, data):
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path))
    (tmp_path / "last_chat.json").write_bytes(data)
    fails(capsys, 2, "is damaged: start without --continue", "chat", "demo", "--continue")


def test_a_closed_pipe_is_silent():
    with subprocess.Popen(GENERATE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read().decode()
        process.wait(30)
    assert err == ""


if sys.platform != "win32":

    def test_control_c_ends_with_130_and_one_line():
        with subprocess.Popen(GENERATE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            err = process.communicate(timeout=30)[1].decode()
        assert process.returncode == 130
        assert err.strip() == "gemkit: interrupted"
