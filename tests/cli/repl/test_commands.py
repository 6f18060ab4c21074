"""The chat's commands, as functions of a session. Budget: 1 s."""

import re

import pytest
from cli.repl.fakes import say, session

from gemkit.cli.repl.commands import ALIASES, COMMANDS, is_open, parse, run, unquote
from gemkit.errors import UsageError


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("/help", ("help", "")),
        ("/?", ("?", "")),
        ("!clear", ("clear", "")),
        ("/SET top_k=3  ", ("set", "top_k=3")),
        ("/system a\nb", ("system", "a\nb")),
        ("/", ("", "")),
        ("hello", None),
        (" /help", None),
        ("/usr/bin is a folder", None),
        ("// a comment", None),
        ("/* a comment */", None),
        ("!= is an operator", None),
        ("/foo\nbar", None),
    ],
)
def test_what_is_a_command(line, parsed):
    assert parse(line) == parsed


def test_help_names_every_command():
    text = run(session(), "/?").text
    assert run(session(), "!help").text == text == run(session(), "/").text
    assert all(f"/{name}" in text for name in COMMANDS)
    assert max(map(len, text.splitlines())) < 80
    assert set(ALIASES.values()) <= set(COMMANDS)


def test_an_unknown_command_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean /regen"):
        run(session(), "/regn")
    with pytest.raises(UsageError, match="/help lists them"):
        run(session(), "/xyzzy")


def test_a_message_is_no_command():
    assert run(session(), "what is /help?") is None


def test_system_shows_sets_and_starts_anew():
    s = session("a", "b")
    assert "no system prompt" in run(s, "/system").text
    say(s, "x")
    assert "starts again" in run(s, '/system """Be\nbrief."""').text
    assert s.messages == [{"role": "system", "content": "Be\nbrief."}]
    assert run(s, "/system").text == "Be\nbrief."
    say(s, "x")
    run(s, "/clear")
    assert (s.system, len(s.messages)) == ("Be\nbrief.", 1)
    run(s, '/system ""')
    assert s.messages == []


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("/set temp=0.5", {"temperature": 0.5}),
        ("/set temperature 0", {"temperature": 0.0}),
        ("/set parameter top_k 5", {"top_k": 5}),
        ("/set top-p = 0.9 min_p=0.1", {"top_p": 0.9, "min_p": 0.1}),
        ("/set max_tokens=7", {"max_tokens": 7}),
        ("/set seed=18446744073709551615", {"seed": 2**64 - 1}),
        ("/set num_predict=7 repetition_penalty=1.1", {"max_tokens": 7, "repetition_penalty": 1.1}),
    ],
)
def test_set(line, settings):
    s = session()
    assert run(s, line).text
    assert s.settings == settings
    run(s, f"/set {next(iter(settings))}=default")
    assert next(iter(settings)) not in s.settings


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set temp=warm", "temperature is 'warm'"),
        ("/set temp=nan", "temperature is nan"),
        ("/set temp=-1", "temperature is -1"),
        ("/set top_k=1.5", "top_k is 1.5"),
        ("/set max_tokens=0", "max_tokens is 0"),
        ("/set max_tokens=many", "max_tokens is 'many'"),
        ("/set seed=-1", "seed is -1"),
        ("/set temprature=1", "did you mean temperature"),
        ("/set colour=1", "no setting colour"),
        ("/set temp", "name=value"),
        ("/set temp=", "name=value"),
        ("/set parameter", "name=value"),
        ("/set top_k=5 temp=x", "temperature is 'x'"),
    ],
)
def test_a_wrong_setting_changes_nothing(line, words):
    s = session()
    s.settings = {"top_k": 3}
    with pytest.raises(UsageError, match=words):
        run(s, line)
    assert s.settings == {"top_k": 3}


def test_set_alone_lists_all():
    s = session()
    s.settings = {"temperature": 0.25}
    text = run(s, "/set").text
    assert "temperature" in text and "0.25" in text and "64" in text and "1024" in text


def test_save_and_load(tmp_path):
    s = session("a")
    say(s, "x")
    path = tmp_path / "with space.json"
    assert str(path) in run(s, f'/save "{path}"').text
    other = session(name="Another 2b")
    text = run(other, f"/load {path}").text
    assert "2 messages" in text and "Fake 1b" in text
    assert other.messages == s.messages
    for line in ("/save", "/load", "/load a\nb", "/load a\0b"):
        with pytest.raises(UsageError, match="takes a file's name"):
            run(s, line)


def test_regen_undo_tokens_and_exit():
    s = session("a", "bb")
    for line in ("/regen", "/undo"):
        with pytest.raises(UsageError, match="nothing to"):
            run(s, line)
    assert "0 of 1,000 tokens (0%)" in run(s, "/tokens").text
    say(s, "x")
    assert run(s, "/regen").action == "regen" and run(s, "/regen").text == ""
    s.settings = {"seed": 1}
    assert "same answer" in run(s, "/regen").text
    text = run(s, "/tokens").text
    assert f"{s.count()} of 1,000" in text and "2 tokens" in text
    run(s, "/undo")
    assert s.messages == []
    for line in ("/exit", "/bye", "/quit", "!exit"):
        assert run(s, line).action == "exit"


def test_tokens_says_what_does_not_fit():
    s = session("a" * 40, ctx_size=200)
    say(s, "b" * 60)
    s.model.ctx_size = s.count() // 2
    text = run(s, "/tokens").text
    assert re.search(r"\((199|200|201)%\), so that no answer fits: /undo or /clear", text) and "--context-shift" in text
    s.shift = True
    assert "the next message drops the oldest" in run(s, "/tokens").text
    s.dropped = 2
    assert "does not see the 2 oldest messages" in run(s, "/tokens").text


def test_read_attaches_lists_and_removes(tmp_path):
    path = tmp_path / "my notes.txt"
    path.write_text("alpha", encoding="utf-8")
    s = session("ok", ctx_size=100)
    assert "No file goes" in run(s, "/read").text
    assert "my notes.txt (5 tokens) goes with your next message." in run(s, f'/read "{path}"').text
    assert "my notes.txt (5 tokens), my notes.txt (5 tokens) go with" in run(s, f"/read {path}").text
    assert run(s, "/read").text.count("my notes.txt") == 2
    path.write_text("x" * 95, encoding="utf-8")
    assert "more than the context of 100 tokens" in run(s, f"/read {path}").text
    assert "No file goes" in run(s, '/read ""').text and s.attached == []
    run(s, f"/read {path}")
    run(s, "/clear")
    assert len(s.attached) == 1


def test_continue_and_load_say_what_comes_next(tmp_path):
    s = session("a")
    with pytest.raises(UsageError, match="no answer to go on with"):
        run(s, "/continue")
    say(s, "x")
    assert run(s, "/continue").action == "continue"
    run(s, f"/save {tmp_path / 'x.json'}")
    assert run(s, f"/load {tmp_path / 'x.json'}").action == "show"


def test_triple_quotes():
    assert is_open('"""') and is_open('"""a\nb') and is_open(' """a') and is_open('/system """a')
    assert not is_open('"""a"""') and not is_open('a """') and not is_open("a")
    assert unquote('"""\na\n\nb\n"""') == "a\n\nb" and unquote('"""a"""') == "a"
    assert unquote('a """b"""') == 'a """b"""' and unquote('"""') == '"""'
