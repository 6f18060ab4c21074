"""`gemkit chat` with the demo model, on a real terminal and without one. Budget: 30 s.

One program serves most tests, as one does its user: each starts from an empty prompt and leaves one.
"""

import contextlib
import json
import os
import re
import stat
import subprocess
import sys
import time

import pytest
from cli.repl.fakes import Model
from cli.screen import Screen

from gemkit.cache import cache_dir
from gemkit.hub.demo import demo_path

CHAT = [sys.executable, "-m", "gemkit", "chat", "demo"]
SPEED = r"\d+ tokens? · ([\d.]+ tok/s · )?first token [\d.]+ s · \d+/2048 context"
READY = re.compile(r"(^|\n)>\Z")
WIDE = "日本語 é 👍 naïve שלום"


def ready(text: str) -> bool:
    """The prompt waits on the last line."""
    return bool(READY.search(text))


@pytest.fixture(scope="module")
def home():
    """The cache folder, with the demo model and no history."""
    demo_path()
    (cache_dir() / "chat_history").unlink(missing_ok=True)
    return cache_dir()


def start(home, *options: str, **environment: str) -> Screen:
    return Screen([*CHAT, "--ctx-size", "2048", *options], GEMKIT_CACHE=str(home), **environment)


@pytest.fixture(scope="module")
def program(home):
    with start(home, "--temp", "0") as screen:
        greeting = screen.until(ready)
        assert "Gemma 3 270m  " in greeting and "context 2,048 · /? for help" in greeting
        assert "pretrained only" in greeting and "was not taught to chat" in greeting and "-it" in greeting
        assert "GemkitWarning" not in greeting and "loading" not in greeting
        yield screen
        assert b"Traceback" not in screen.raw and b"GemkitWarning" not in screen.raw


@pytest.fixture
def chat(program):
    """The program, at an empty prompt of an empty screen, with an empty conversation."""
    program.resize(30, 80)
    program.send("\x0c")
    program.until(lambda text: text == ">")
    program.send("/set max_tokens=24\r")
    program.until(lambda text: "max_tokens is 24" in text and ready(text))
    program.send("/clear\r")
    program.until(lambda text: "starts again" in text and ready(text))
    return program


def test_an_answer_streams_and_its_speed_is_shown(chat):
    chat.send("One, two, three,\r")
    lengths = set()

    def streamed(text: str) -> bool:
        lengths.add(len(text))
        return bool(re.search(SPEED, text)) and ready(text)

    text = chat.until(streamed)
    assert len(lengths) > 5  # it grew
    assert "ended at max_tokens" in text and "24 tokens · " in text
    chat.send("/tokens\r")
    assert re.search(r"takes \d+ of 2,048 tokens", chat.until(r"tokens,\s+[\d.]+\s+tok/s"))


def test_control_c_stops_the_answer_and_the_chat_goes_on(chat, tmp_path):
    chat.send("/set max_tokens=1500\r")
    chat.until(lambda text: "1500" in text and ready(text))
    chat.send("Count: 1 2 3 4 5 6 7\r")
    before = len(chat.raw)
    chat.until(lambda text: len(chat.raw) > before + 400)
    chat.send("\x03")
    text = chat.until(lambda text: "Stopped." in text and ready(text), seconds=5)
    assert re.search(SPEED, text)
    path = tmp_path / "stopped.json"
    chat.send(f"/save {path}\r")
    chat.until(lambda text: path.exists() and ready(text))
    answer = json.loads(path.read_text())["messages"][-1]
    assert answer["role"] == "assistant" and answer["stopped"] is True and answer["content"]
    chat.send("/set max_tokens=4\r")
    chat.until(lambda text: "max_tokens is 4" in text and ready(text))
    chat.send("/regen\r")
    chat.until(lambda text: "4 tokens · " in text and ready(text))


def test_what_is_typed_meanwhile_waits_for_the_prompt(chat):
    chat.send("/set max_tokens=60\r")
    chat.until(lambda text: "is 60" in text and ready(text))
    chat.send("Tell me\r")
    chat.until(r"> Tell me\n\n\S")
    chat.send("typed ahead")
    text = chat.until(lambda text: text.endswith("\n> typed ahead"))
    assert text.count("typed ahead") == 1
    chat.send("\x03/regen\r")
    chat.until(r"> /regen\n(.*\n)?\n\S")
    chat.send("/tokens\r")
    text = chat.until(lambda text: re.search(r"> /tokens\nThe conversation takes", text) and ready(text))
    assert text.count("/tokens") == 1


def test_control_c_clears_the_line_and_then_hints(chat):
    chat.send("not this")
    chat.until("> not this")
    chat.send("\x03")
    assert "leaves" not in chat.until(ready)
    chat.send("\x03")
    chat.until(lambda text: "Ctrl-D or /exit leaves." in text and ready(text))


def test_commands_and_their_other_names(chat):
    chat.send("!?\r")
    chat.until(lambda text: "/system TEXT" in text and ready(text))
    chat.send("/regn\r")
    chat.until(lambda text: "did you mean /regen?" in text and ready(text))
    chat.send("/set temp=hot\r")
    chat.until(lambda text: "temperature is 'hot'" in text and ready(text))
    chat.send("!clear\r")
    chat.until(lambda text: "> !clear\nThe conversation starts again." in text and ready(text))
    chat.send("/sy\tBe brief.\r")
    chat.until(lambda text: "The system prompt is set" in text and ready(text))
    chat.send("/system\r")
    chat.until(lambda text: text.count("Be brief.") == 2 and ready(text))
    chat.send('/system ""\r')
    chat.until(lambda text: "removed" in text and ready(text))


def test_ten_thousand_pasted_lines_are_one_message(chat):
    text = "\n".join(f"line {number} of a long text" for number in range(10_000))
    started = time.monotonic()
    chat.paste(text)
    chat.until("line 9999 of a long text")
    chat.send("\r")
    shown = chat.until(lambda text: "the context is full" in text and ready(text))
    assert time.monotonic() - started < 15
    assert shown.count("the context is full") == 1 and "--ctx-size" in shown
    chat.send("/tokens\r")
    chat.until("takes 0 of 2,048")


def test_several_lines_are_one_message(chat, tmp_path):
    chat.send('"""\rone\r\rtwo"""\r')
    chat.until(lambda text: re.search(SPEED, text) and ready(text))
    chat.send("three\x1b\rfour\nfive\r")
    chat.until(lambda text: re.search(r"74/2048 context\n\n>\Z", text))
    path = tmp_path / "lines.json"
    chat.send(f"/save {path}\r")
    chat.until(lambda text: path.exists() and ready(text))
    said = [message["content"] for message in json.loads(path.read_text())["messages"] if message["role"] == "user"]
    assert said == ["one\n\ntwo", "three\nfour\nfive"]


def test_unicode_survives_typing_saving_and_loading(chat, tmp_path):
    path = tmp_path / "日本.json"
    chat.send(f"{WIDE}\r")
    chat.until(lambda text: re.search(SPEED, text) and ready(text))
    chat.send(b"bytes \xff\xfe here\r")
    chat.until(lambda text: len(re.findall(SPEED, text)) == 2 and ready(text))
    chat.send(f"/save {path}\r")
    chat.until(lambda text: path.exists() and ready(text))
    messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert messages[0]["content"] == WIDE and messages[2]["content"].startswith("bytes ")
    chat.send("/clear\r/load nowhere.json\r")
    chat.until(lambda text: "does not exist" in text and ready(text))
    chat.send(f"/load {path}\r")
    shown = chat.until(lambda text: "Loaded 4 messages" in text and ready(text))
    assert "> bytes " in shown.split("Loaded 4 messages")[1]
    again = tmp_path / "again.json"
    chat.send(f"/save {again}\r")
    chat.until(lambda text: again.exists() and ready(text))
    assert json.loads(again.read_text(encoding="utf-8"))["messages"] == messages


def test_a_table_of_a_loaded_conversation_is_laid_out(chat, tmp_path):
    source = "| name | n |\n|:--|--:|\n| **日本** | 12 |\n| x | 3 |\n\nafter"
    path = tmp_path / "table.json"
    path.write_text(
        json.dumps([{"role": "user", "content": "show"}, {"role": "assistant", "content": source}]), encoding="utf-8"
    )
    chat.send(f"/load {path}\r")
    text = chat.until(lambda text: "after" in text and ready(text))
    assert "> show\n\nname │  n\n─────┼───\n日本 │ 12\nx    │  3\n\nafter\n\n>" in text
    chat.send("/clear\r")
    chat.until(lambda text: "starts again" in text and ready(text))


def test_resizing_is_harmless(chat):
    chat.send("a long line that is typed while the terminal changes its size ")
    for rows, columns in ((10, 30), (40, 120), (24, 20), (30, 80)):
        chat.resize(rows, columns)
        chat.send("x")
        chat.read(0.1)
    chat.until("size xxxx")
    chat.send("\x03/set max_tokens=80\r")
    chat.until(lambda text: "is 80" in text and ready(text))
    chat.send("Once upon a time\r")
    for rows, columns in ((10, 30), (40, 120), (24, 20), (30, 80)):
        before = len(chat.raw)
        chat.until(lambda text, before=before: len(chat.raw) > before + 40)
        chat.resize(rows, columns)
    chat.until(lambda text: re.search(SPEED, text) and ready(text))


def test_the_arrows_find_history_of_an_earlier_run(home, chat):
    chat.send("/set seed=424242\r")
    chat.until(lambda text: "seed is 424242" in text and ready(text))
    path = home / "chat_history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with start(home, "--quiet") as other:
        text = other.until(ready)
        assert "for help" not in text and "pretrained only" in text
        other.send("\x1b[A")
        other.until("> /set seed=424242")
        other.send("\x03")
        other.until(ready)
        other.send("\x04")
        assert other.code() == 0
    chat.send("/set seed=none\r")
    chat.until(lambda text: "seed is back" in text and ready(text))


def test_the_last_conversation_is_continued(home, tmp_path):
    # A cache folder of its own: other tests of this file may run at the same time.
    for name in ("demo", "packed", "tokenizers"):
        (home / name).mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(home / name)
    home, kept = tmp_path, tmp_path / "last_chat.json"
    command = [sys.executable, "-m", "gemkit", "chat"]
    with start(home, "--no-history", "--max-tokens", "4") as screen:
        screen.until(ready)
        screen.send("not kept\r")
        screen.until(lambda text: re.search(SPEED, text) and ready(text))
    assert not kept.exists() and not (home / "chat_history").exists()
    with Screen([*command, "--continue"], GEMKIT_CACHE=str(home)) as screen:
        screen.until("there is no conversation to continue")
        assert screen.code() == 2
    with start(home, "--max-tokens", "6", "--temp", "0", "--system-prompt", "Be brief.") as screen:
        screen.until(ready)
        screen.send("One, two,\r")
        screen.until(lambda text: re.search(SPEED, text) and ready(text))
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    record = json.loads(kept.read_text(encoding="utf-8"))
    assert record["argument"] == "demo" and len(record["messages"]) == 3
    default = {"GEMKIT_MODEL": "nowhere.gguf"}  # the conversation's own model comes before it
    with Screen([*command, "--continue", "--max-tokens", "3"], GEMKIT_CACHE=str(home), **default) as screen:
        text = screen.until(ready)
        assert "System prompt: Be brief." in text and "> One, two," in text
        screen.send("/continue\r")
        screen.until(lambda text: "3 tokens · " in text and ready(text))
    again = json.loads(kept.read_text(encoding="utf-8"))
    assert again["messages"][:2] == record["messages"][:2] and again["settings"]["temperature"] == 0
    assert again["messages"][2]["content"].startswith(record["messages"][2]["content"])
    environment = {**os.environ, "GEMKIT_CACHE": str(home)}
    done = subprocess.run(
        [*command, "--continue", "--ctx-size", "120", "--context-shift"],
        input=b"Go on " * 45,
        capture_output=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.strip()
    assert b"the 2 oldest messages are left out" in done.stderr
    assert len(json.loads(kept.read_text(encoding="utf-8"))["messages"]) == 5
    done = subprocess.run(
        [*command, "--continue", "--system-prompt", "x"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    assert done.returncode == 2 and b"drop one of them" in done.stderr


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"flag": "--plain"}])
def test_plain_text_has_no_styles(home, environment):
    flag = [environment["flag"]] if "flag" in environment else []
    settings = {} if flag else environment
    with start(home, "--max-tokens", "4", "--temp", "0", *flag, **settings) as screen:
        screen.until(ready)
        screen.send("One, two,\r")
        screen.until(lambda text: re.search(SPEED, text) and ready(text))
        styles = {code for codes in re.findall(rb"\x1b\[([\d;]*)m", screen.raw) for code in codes.split(b";")}
        assert styles <= {b"", b"0"}
        screen.send("/exit\r")
        assert screen.code() == 0


def test_input_that_is_no_terminal_is_one_message(home):
    environment = {**os.environ, "GEMKIT_CACHE": str(home)}
    options = ["--max-tokens", "8", "--temp", "0"]
    done = subprocess.run(
        [*CHAT, *options], input=b"The capital of\nFrance is", capture_output=True, env=environment, timeout=60
    )
    assert done.returncode == 0 and b"\x1b" not in done.stdout
    out = done.stdout.decode()
    assert out.strip() and out.endswith("\n") and "tok/s" not in out
    assert done.stderr.decode().count("\n") == 1 and "pretrained only" in done.stderr.decode()
    done = subprocess.run([*CHAT, *options], input=b" \n", capture_output=True, env=environment, timeout=60)
    assert done.returncode == 2 and b"standard input is empty" in done.stderr


@pytest.mark.parametrize(
    ("words", "options"),
    [("temperature is", ["--temp", "-1"]), ("max_tokens is", ["--max-tokens", "0"]), ("seed is", ["--seed", "-1"])],
)
def test_a_wrong_option_is_2_and_one_line(capsys, words, options):
    from gemkit.cli import main

    with pytest.raises(SystemExit) as exit_:
        main(["chat", "nowhere.gguf", *options])
    output = capsys.readouterr()
    assert exit_.value.code == 2 and output.err.count("\n") == 1 and words in output.err


def test_text_of_a_model_never_commands_the_terminal(capsys, monkeypatch):
    import io

    import gemkit
    from gemkit.cli import main

    model = Model(["a\x1b]0;title\x07b\x9b31mc\nd"])
    monkeypatch.setattr(gemkit, "load", lambda *args, **options: contextlib.nullcontext(model))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi")))
    with pytest.raises(SystemExit) as exit_:
        main(["chat", "any"])
    output = capsys.readouterr()
    assert not exit_.value.code and (output.out, output.err) == ("a␛]0;title␇b\\x9b31mc\nd\n", "")
