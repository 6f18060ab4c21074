"""The terminal: input with history and completion, answers as they stream, and Ctrl-C while they do.

Text of a model or a file is shown through `visible`, so that it cannot control the terminal.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import has_focus, is_searching
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.renderer import print_formatted_text
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style
from prompt_toolkit.utils import get_cwidth, is_dumb_terminal

from gemkit.cache import atomic_write
from gemkit.cli.repl import commands
from gemkit.cli.repl.markdown import Markdown, Span
from gemkit.cli.repl.session import DEFAULTS
from gemkit.cli.repl.wrap import Wrap
from gemkit.text.visible import clean, visible

if TYPE_CHECKING:
    from prompt_toolkit.input import Input

STYLE = Style.from_dict(
    {
        "prompt": "bold ansicyan",
        "heading": "bold",
        "bold": "bold",
        "italic": "italic",
        "strike": "strike",
        "code": "ansicyan",
        "block": "ansicyan",
        "link": "underline",
        "quote": "italic",
        "marker": "ansicyan",
        "dim": "dim",
        "warning": "ansiyellow",
        "error": "ansired",
    }
)
PROMPT = "> "
# One message in the history file, and the file itself.
MAX_HISTORY_ENTRY = 10_000
MAX_HISTORY_BYTES = 1 << 20


class _History(FileHistory):
    """A history file that never stops the chat: what cannot be kept is not, and long messages are not."""

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            yield from super().load_history_strings()

    def store_string(self, string: str) -> None:
        if len(string) <= MAX_HISTORY_ENTRY:
            with contextlib.suppress(OSError):
                super().store_string(clean(string))


def open_history(path: Path | None) -> History:
    """Return the history of a file that only its owner can read; a large one loses its older half. None: no file."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        if path.stat().st_size > MAX_HISTORY_BYTES:
            data = path.read_bytes()
            cut = data.find(b"\n# ", len(data) // 2)
            atomic_write(path, data[cut + 1 :] if cut >= 0 else b"")
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return _History(str(path))


class _Complete(Completer):
    """Commands, the names of settings, and files for /save, /load and /read."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if match := re.fullmatch(r"[/!](\w*)", text):
            for name in (*commands.COMMANDS, *(name for name in commands.ALIASES if len(name) > 2)):
                if name.startswith(match[1].lower()):
                    command = commands.COMMANDS[commands.ALIASES.get(name, name)]
                    yield Completion(name + " " * bool(command.usage), -len(match[1]), display=name)
        elif match := re.fullmatch(r"[/!]set\s+(?:\S+\s+)*(\w*)", text):
            yield from (Completion(f"{n}=", -len(match[1])) for n in DEFAULTS if n.startswith(match[1].lower()))
        elif match := re.fullmatch(r"[/!](?:save|load|read)\s+(.*)", text):
            yield from self._paths.get_completions(Document(match[1]), complete_event)


def _bindings() -> KeyBindings:
    keys = KeyBindings()
    writing = has_focus("DEFAULT_BUFFER") & ~is_searching

    @keys.add("enter", filter=writing)
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if commands.is_open(buffer.text):
            buffer.newline(copy_margin=False)
        elif buffer.text.strip():
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=writing)
    @keys.add("c-j", filter=writing)
    def newline(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=writing)
    @keys.add("<sigint>", filter=writing)
    def interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")

    return keys


class Stop:
    """Ctrl-C while the model answers. hit: it was pressed. Only while `waiting` for a token does it raise."""

    def __init__(self) -> None:
        self.hit = self.waiting = False

    def wait_for(self, pieces: Iterator[str]) -> str | None:
        """Return the next piece; None at the end or for Ctrl-C."""
        try:
            self.waiting = True
            return next(pieces, None)
        except KeyboardInterrupt:
            return None
        finally:
            self.waiting = False

    def handle(self, number: int, frame: object) -> None:
        first, self.hit = not self.hit, True
        if first and self.waiting:
            raise KeyboardInterrupt


class Terminal:
    """Input and output. styled: Markdown is rendered; else text goes out as it comes.

    history: the file of what was typed, None to keep it in memory. Prompts and notes go to standard error if standard
    output is no terminal.
    """

    def __init__(self, history: Path | None, styled: bool, stdin: Input | None = None) -> None:
        self._apart = not sys.stdout.isatty()
        self._stream = sys.stderr if self._apart else sys.stdout
        self.styled = styled and not self._apart
        self._smart = not is_dumb_terminal()
        self._output: Output = create_output(self._stream)
        # Asking where the cursor is helps only full-screen menus, and the reply can end up in the next line.
        if hasattr(self._output, "enable_cpr"):
            self._output.enable_cpr = False
        self._session: PromptSession[str] = PromptSession(
            FormattedText([("class:prompt" if self.styled else "", PROMPT)]),
            prompt_continuation=" " * len(PROMPT),
            multiline=True,
            history=open_history(history),
            key_bindings=_bindings(),
            completer=_Complete(),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_suspend=True,
            include_default_pygments_style=False,
            style=STYLE if self.styled else None,
            input=stdin,
            output=self._output,
        )
        self._last = "\n"  # the last output
        self._markdown = Markdown(self.width, get_cwidth)
        self._hint = ""  # a note on the open line that the next text replaces
        self._wrap = Wrap(self.width, get_cwidth)
        self._utf8 = "utf" in (self._stream.encoding or "").lower()

    def width(self) -> int:
        """Return the terminal's columns now."""
        return max(8, self._output.get_size().columns)

    def ask(self) -> str:
        """Read a message or a command; raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C on an empty line."""
        return clean(self._session.prompt())

    def say(self, text: str, style: str = "", end: str = "\n") -> None:
        """Print a note, which may hold words of a file or a model."""
        self._write([(style, f"{text}{end}")])

    def note(self, text: str, style: str = "") -> None:
        """Print a sentence, broken between words."""
        if self.styled:
            wrap = Wrap(self.width, get_cwidth)
            self._write([*wrap.feed([Span(text, style, text)]), *wrap.finish(), ("", "\n")])
        else:
            self.say(text)

    def quote(self, message: str) -> None:
        """Show a message as its user typed it."""
        lines = message.split("\n")
        text = "\n".join([f"{PROMPT}{lines[0]}", *(" " * len(PROMPT) + line if line else line for line in lines[1:])])
        self._write([("prompt", text[: len(PROMPT)]), ("", f"{text[len(PROMPT) :]}\n")])

    def show(self, piece: str) -> None:
        """Show a piece of an answer."""
        if self.styled:
            self._write(self._wrap.feed(self._markdown.feed(piece)))
            if self._markdown.rows is not None and self._last == "\n":
                rows = self._markdown.rows
                self._show_hint(f"table, {rows} row{'' if rows == 1 else 's'} ...")
        else:
            self._write_plain(piece)

    def end(self) -> None:
        """Show what is left of an answer, and end its line."""
        if self.styled:
            self._write(self._wrap.feed(self._markdown.finish()))
            self._write(self._wrap.finish())
            self._wrap = Wrap(self.width, get_cwidth)
        if self._last != "\n":
            self._write_plain("\n")

    def _show_hint(self, text: str) -> None:
        """Show that something is coming which cannot be shown yet."""
        if text == self._hint or get_cwidth(text) >= self.width():
            return
        self._clear_hint()
        print_formatted_text(self._output, FormattedText([("class:dim", text)]), STYLE)
        self._hint = text

    def _clear_hint(self) -> None:
        if self._hint:
            self._hint = ""
            self._erase_line()

    def _erase_line(self) -> None:
        self._output.write_raw("\r")
        self._output.erase_end_of_line()
        self._output.flush()

    @contextlib.contextmanager
    def passing(self, text: str) -> Iterator[None]:
        """Show a note on a line of its own while something takes its time; only on a terminal with styles."""
        if not self.styled or get_cwidth(text) >= self.width():
            yield
            return
        self.say(text, "dim", end="")
        try:
            yield
        finally:
            self._erase_line()
            self._last = "\n"

    @contextlib.contextmanager
    def answering(self) -> Iterator[Stop]:
        """Catch Ctrl-C, and keep what is typed meanwhile, unseen, for the next prompt."""
        stop = Stop()
        before = signal.signal(signal.SIGINT, stop.handle)
        restore = _hide_typing()
        if self._smart:
            self._output.enable_bracketed_paste()
            self._output.flush()
        try:
            yield stop
        finally:
            restore()
            signal.signal(signal.SIGINT, before)

    def close(self) -> None:
        """Restore the terminal."""
        if self._smart:
            self._output.disable_bracketed_paste()
            self._output.flush()

    def _write(self, fragments: list[tuple[str, str]]) -> None:
        fragments = [(style, text) for style, text in fragments if text]
        if not fragments:
            return
        self._clear_hint()
        self._last = fragments[-1][1][-1]
        if not self.styled:
            self._stream.write("".join(visible(text) for _, text in fragments))
            self._stream.flush()
            return
        named = [(" ".join(f"class:{word}" for word in style.split()), self._text(text)) for style, text in fragments]
        print_formatted_text(self._output, FormattedText(named), STYLE)

    def _write_plain(self, text: str) -> None:
        """Write the text of an answer to standard output, whatever the target of other messages."""
        if self.styled or not text:
            self._write([("", text)])
            return
        self._last = text[-1]
        sys.stdout.write(visible(text))
        sys.stdout.flush()

    def _text(self, text: str) -> str:
        text = visible(text)
        if self._utf8:
            return text
        text = text.translate({0x2022: "*", 0x2500: "-", 0x2502: "|", 0x253C: "+", 0xB7: "-"})
        encoding = self._stream.encoding or "ascii"
        return text.encode(encoding, "backslashreplace").decode(encoding)


def _hide_typing() -> Callable[[], None]:
    """Switch the terminal's echo off; return a function that restores it."""
    try:
        import termios
    except ImportError:  # Windows
        return lambda: None
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (termios.error, OSError, ValueError):
        return lambda: None
    quiet = list(before)
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    with contextlib.suppress(termios.error):
        termios.tcsetattr(descriptor, termios.TCSANOW, quiet)

    def restore() -> None:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSANOW, before)

    return restore
