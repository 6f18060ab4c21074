"""Text that may reach the terminal, and the history file. Budget: 2 s."""

import stat
import sys
from types import SimpleNamespace

from prompt_toolkit.history import InMemoryHistory

from gemkit.cli.repl.terminal import MAX_HISTORY_BYTES, MAX_HISTORY_ENTRY, Stop, Terminal, open_history
from gemkit.text.visible import clean, visible


def test_control_characters_are_shown():
    assert visible("a\x1b[31mb\x07\r\x7f\x9b0m\n\tc") == "a␛[31mb␇␍␡\\x9b0m\n\tc"
    everything = visible("".join(map(chr, range(0x110000))))
    assert not any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 for c in everything)
    everything.encode()
    unicode = "日本語 e\u0301 👩‍👩‍👧‍👦 שלום \u202bx\u202c"
    assert visible(unicode) == clean(unicode) == unicode
    assert clean("a\udcffb\ud800") == "a\ufffdb\ufffd"


def test_the_history_is_kept_and_only_its_owner_reads_it(tmp_path):
    path = tmp_path / "new" / "chat_history"
    history = open_history(path)
    for text in ("first", "two\nlines", "surrogate \udcff", "x" * (MAX_HISTORY_ENTRY + 1)):
        history.store_string(text)
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert list(open_history(path).load_history_strings()) == ["surrogate \ufffd", "two\nlines", "first"]
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_large_history_loses_its_older_half(tmp_path):
    path = tmp_path / "chat_history"
    history = open_history(path)
    for number in range(MAX_HISTORY_BYTES // 5000 + 10):
        history.store_string(f"{number} " + "x" * 5000)
    newest = next(iter(history.load_history_strings()))
    history = open_history(path)
    assert path.stat().st_size < MAX_HISTORY_BYTES * 0.6
    kept = list(history.load_history_strings())
    assert kept[0] == newest and all(text.endswith("x" * 5000) for text in kept)


def test_a_history_that_cannot_be_kept_is_no_error(tmp_path):
    (tmp_path / "file").write_text("x")
    assert isinstance(open_history(tmp_path / "file" / "chat_history"), InMemoryHistory)
    history = open_history(tmp_path / "chat_history")
    (tmp_path / "chat_history").unlink()
    (tmp_path / "chat_history").mkdir()
    history.store_string("x")
    assert list(history.load_history_strings()) == []


def test_control_c_raises_only_while_a_token_is_awaited():
    stop = Stop()

    def pieces():
        yield "a"
        stop.handle(2, None)
        yield "b"

    answer = pieces()
    assert stop.wait_for(answer) == "a" and not stop.hit
    assert stop.wait_for(answer) is None and stop.hit
    stop.handle(2, None)  # a second one is nothing
    other = Stop()
    other.handle(2, None)
    assert other.hit


def test_a_terminal_with_a_code_page_loses_nothing():
    terminal = Terminal.__new__(Terminal)
    terminal._utf8, terminal._stream = False, SimpleNamespace(encoding="latin-1")
    assert terminal._text("• 日本 é 👍 │") == "* \\u65e5\\u672c é \\U0001f44d |"
