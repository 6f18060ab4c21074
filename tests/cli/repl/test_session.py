"""The conversation: what joins it, when it is full, and what a file may do to it. Budget: 2 s."""

import json
import os

import pytest
from cli.repl.fakes import say, session

from gemkit.api.options import GenerateOptions
from gemkit.cli.repl.session import DEFAULTS, check_settings
from gemkit.errors import UsageError

WIDE = "日本語 e\u0301 👩‍👩‍👧‍👦 שלום \t مرحبا \u202bx\u202c"


def test_turns_join_the_conversation_and_are_all_sent():
    s = session("four", "six")
    s.clear("Be brief.")
    assert say(s, "2+2?") == "four" and say(s, "3+3?") == "six"
    assert [m["role"] for m in s.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert all(words in s.model.last_prompt() for words in ("Be brief.", "2+2?", "four", "3+3?"))
    usage = s.last.usage
    assert (usage.completion_tokens, s.last.ended, usage.prompt_tokens) == (4, "stop", len(s.model.asked[-1][0]))


def test_a_stopped_answer_stays_and_is_marked():
    s = session("four score and seven", "next")
    assert say(s, "x", count=4) == "four"
    assert s.messages[-1] == {"role": "assistant", "content": "four", "stopped": True}
    assert s.last.ended == "stopped"
    say(s, "y")
    assert "four" in s.model.last_prompt() and "stopped" not in s.messages[-1]


def test_an_answer_of_no_token_leaves_no_trace():
    s = session("hello")
    answer = s.ask("x")
    assert s.keep(answer) is None
    assert s.messages == [] and s.last is None


def test_how_an_answer_ends():
    s = session("abcdef", "abcdef", "abcdef" * 500, stops=False)
    s.settings = {"max_tokens": 3}
    assert say(s, "x") == "abc" and s.last.ended == "length"
    s.settings = {}
    say(s, "x")
    assert say(s, "x") and s.last.ended == "context"
    assert s.last.usage.prompt_tokens + s.last.usage.completion_tokens == s.model.ctx_size


def test_a_full_context_is_said_and_loses_nothing():
    s = session("a" * 50, ctx_size=200)
    say(s, "b" * 50)
    before = list(s.messages)
    with pytest.raises(UsageError, match=r"/clear or /undo.*--ctx-size"):
        s.ask("c" * 90)
    with pytest.raises(UsageError, match=r"Shorten the message.*--ctx-size"):
        s.ask("c" * 300)
    assert s.messages == before and len(s.model.asked) == 1
    s.at_terminal = False
    for text in ("c" * 90, "c" * 300):
        with pytest.raises(UsageError, match=r"tokens\. (Shorten the message, or s|S)tart with a larger") as error:
            s.ask(text)
        assert not any(words in str(error.value) for words in ("/clear", "arrow up"))


def test_with_context_shift_the_oldest_messages_are_left_out_and_kept():
    s = session(*(f"answer {number}" + "x" * 20 for number in range(9)), ctx_size=400)
    s.shift = True
    s.clear("Be brief.")
    dropped = []
    for number in range(8):
        dropped.append(s.dropped)
        say(s, f"question {number}")
        prompt = s.model.last_prompt()
        assert "Be brief." in prompt and f"question {number}" in prompt
        assert len(s.model.asked[-1][0]) <= 300
        assert ("question 0" in prompt) == (s.dropped == 0)
    assert dropped[0] == 0 < s.dropped and s.dropped % 2 == 0 and sorted(dropped) == dropped
    assert len(s.messages) == 17 and s.messages[1]["content"] == "question 0"
    assert s.count() < s.count(s.messages)
    with pytest.raises(UsageError, match="Shorten the message"):
        s.ask("c" * 500)
    s.undo()
    assert s.dropped == 0


def test_an_answer_is_continued_where_it_ended():
    s = session("four score", " and seven", " years", stops=False)
    s.settings = {"max_tokens": 10}
    with pytest.raises(UsageError, match="no answer to go on with"):
        s.go_on()
    say(s, "x")
    answer = s.go_on()
    list(answer)
    s.keep(answer)
    assert s.messages[1:] == [{"role": "assistant", "content": "four score and seven"}]
    assert s.model.last_prompt().endswith("model\nfour score")
    answer = s.go_on()
    next(answer)
    s.keep(answer)
    assert s.messages[1:] == [{"role": "assistant", "content": "four score and seven ", "stopped": True}]


def test_attached_files_go_with_the_next_message(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(b"alpha\nbeta\n")
    s = session("", "ok", "ok")
    assert (s.attach(str(path)).name, s.attached[0].tokens) == ("notes.txt", 10)
    s.model.stops = False
    assert say(s, "first") == "" and s.attached  # no token came: it goes with the message when it is sent again
    s.model.stops = True
    say(s, "Summarize.")
    assert s.messages[0]["content"] == "Summarize.\n\nFile notes.txt:\n\nalpha\nbeta" and s.attached == []
    say(s, "more")
    assert s.messages[2]["content"] == "more"


def test_a_file_that_cannot_go_is_refused(tmp_path):
    s = session("ok", ctx_size=100)
    for name, data, words in [
        ("latin1.txt", b"na\xefve", "not UTF-8"),
        ("empty.txt", b" \n", "is empty"),
        ("long.txt", b"x" * 100, "100 tokens, the context 100"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match=words):
            s.attach(str(tmp_path / name))
    with pytest.raises(UsageError, match="there is no file"):
        s.attach(str(tmp_path / "nowhere.txt"))
    with pytest.raises(UsageError, match="is not a file"):
        s.attach(str(tmp_path))
    assert s.attached == []


def test_another_answer_replaces_the_last_one():
    s = session("one", "two")
    say(s, "x")
    assert say(s, None) == "two"
    assert [m["content"] for m in s.messages] == ["x", "two"]
    assert "one" not in s.model.last_prompt()
    with pytest.raises(UsageError, match="nothing to answer"):
        session().ask(None)


def test_the_defaults_are_those_of_the_python_api():
    assert {name: getattr(GenerateOptions(), name) for name in DEFAULTS} == DEFAULTS
    s = session("x")
    say(s, "x")
    assert s.model.asked[0][1] == GenerateOptions()


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"top_k": 0.5}, {"max_tokens": 0}, {"max_tokens": True}, {"colour": 1}, {"seed": "x"}],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(UsageError, match=next(iter(settings))):
        check_settings(settings)
    assert check_settings({"max_tokens": 5, "seed": None, "top_p": 1}) == {"max_tokens": 5, "top_p": 1.0}


def test_a_conversation_survives_save_and_load(tmp_path):
    s = session(WIDE, "b")
    s.settings = {"temperature": 0.5, "max_tokens": 400}
    s.clear(WIDE)
    say(s, WIDE)
    say(s, "more", count=1)
    path = s.save(str(tmp_path / "chat.json"))
    other = session(name="Another 2b")
    assert other.load(str(path)) == "Fake 1b"
    assert (other.messages, other.settings) == (s.messages, s.settings)
    assert other.messages[-1]["stopped"] is True
    assert WIDE in path.read_text(encoding="utf-8").replace("\\t", "\t")
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]


def test_a_bare_list_of_messages_is_a_conversation(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('[{"role": "user", "content": "x", "name": "y"}]')
    s = session()
    assert s.load(str(path)) is None
    assert s.messages == [{"role": "user", "content": "x"}]


def test_save_overwrites_conversations_only(tmp_path):
    s = session("x")
    say(s, "x")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF weights")
    with pytest.raises(UsageError, match="no conversation"):
        s.save(str(path))
    with pytest.raises(UsageError, match="no conversation"):
        s.save(str(tmp_path))
    assert path.read_bytes() == b"GGUF weights"
    with pytest.raises(UsageError, match=r"the folder .*no does not exist"):
        s.save(str(tmp_path / "no" / "a.json"))
    assert not (tmp_path / "no").exists()
    s.save(str(tmp_path / "a.json"))
    s.undo()
    s.save(str(tmp_path / "a.json"))
    assert json.loads((tmp_path / "a.json").read_text())["messages"] == []


HOSTILE = {
    "not JSON": b"{",
    "not UTF-8": b'{"messages": ["\xff"]}',
    "deep": b"[" * 100_000,
    "a long number": b'{"messages": [], "settings": {"seed": ' + b"9" * 5000 + b"}}",
    "no messages": b"{}",
    "messages no list": b'{"messages": {"role": "user"}}',
    "a message no object": b'{"messages": [1]}',
    "no content": b'{"messages": [{"role": "user"}]}',
    "content no text": b'{"messages": [{"role": "user", "content": ["x"]}]}',
    "unknown role": b'{"messages": [{"role": "tool", "content": "x"}]}',
    "the model first": b'{"messages": [{"role": "assistant", "content": "x"}]}',
    "a second system": b'{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}',
    "a surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "settings no object": b'{"messages": [], "settings": [1]}',
    "unknown setting": b'{"messages": [], "settings": {"logit_bias": 1}}',
    "wrong setting": b'{"messages": [], "settings": {"top_p": "x\\u001b[31m"}}',
    "a long value": b'{"messages": [], "settings": {"seed": "' + b"9" * 1_000_000 + b'"}}',
    "NaN": b'{"messages": [], "settings": {"temperature": NaN}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_changes_nothing(tmp_path, name):
    s = session("x")
    say(s, "x")
    before, settings = list(s.messages), dict(s.settings)
    path = tmp_path / "x.json"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(UsageError, match=r"x\.json") as error:
        s.load(str(path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(path))
    assert (s.messages, s.settings) == (before, settings)


def test_messages_without_settings_leave_those_of_the_chat(tmp_path):
    s = session()
    s.settings = {"max_tokens": 5, "temperature": 0.0}
    path = tmp_path / "messages.json"
    path.write_text('[{"role": "user", "content": "x"}]', encoding="utf-8")
    s.load(str(path))
    assert (len(s.messages), s.settings) == (1, {"max_tokens": 5, "temperature": 0.0})


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "p"):
        if path.name == "p" and hasattr(os, "mkfifo"):
            os.mkfifo(path)  # reading it would wait forever
        with pytest.raises(UsageError):
            session().load(str(path))
