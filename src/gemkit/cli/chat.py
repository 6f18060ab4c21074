"""`gemkit chat MODEL`: a conversation in the terminal."""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemkit.cli import config
from gemkit.cli.command import Verb
from gemkit.cli.common import Text, default_model_argument, failure, load_options, missing_model, read_text
from gemkit.cli.hints import hint_faster
from gemkit.cli.sampling import sampling_options
from gemkit.cli.template import set_template, template_option
from gemkit.errors import UsageError

if TYPE_CHECKING:
    from gemkit.api.model import Model
    from gemkit.cli.repl.session import Answer, Session, Turn
    from gemkit.cli.repl.terminal import Terminal

RECALLED = 40  # messages of a loaded conversation that are shown
MUCH = 2000  # tokens of a prompt that takes a noticeable time to read
PRETRAINED = (
    "{name} is pretrained only: it continues text and was not taught to chat. "
    "For a chat-tuned one: gemkit chat gemma-3-1b-it, or any model whose name ends in -it."
)


@click.command("chat", cls=Verb, short_help="Chat in the terminal.")
@default_model_argument
@click.option("--system-prompt", type=Text(), help="Instructions put before the conversation.")
@template_option
@sampling_options("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
@click.option("--continue", "resume", is_flag=True, help="Continue the last conversation.")
@click.option("--context-shift", is_flag=True, help="Leave out the oldest messages when the context is full.")
@click.option("--no-history", is_flag=True, help="Save neither the conversation nor the input history.")
@click.option("--plain", is_flag=True, help="No colours, no rendered Markdown.")
@click.option("--quiet", is_flag=True, help="No greeting, no line about speed.")
@load_options
def command(
    model: str | None,
    system_prompt: str | None,
    template: str | None,
    resume: bool,
    context_shift: bool,
    no_history: bool,
    plain: bool,
    quiet: bool,
    load: dict,
    **options: object,
) -> None:
    """Chat with MODEL: a GGUF file, a Hugging Face folder, a name such as gemma-3-1b-it, or `demo`.

    /? lists the commands. Input that is no terminal is one message: its answer is printed, and that is all.
    """
    from gemkit.cli.repl.session import DEFAULTS, Session, check_settings

    context = click.get_current_context()
    settings = {name: options.pop(name) for name in DEFAULTS if name in options}
    settings = check_settings(settings)  # wrong values are found before the model is loaded
    last = _last(context) if resume else None
    if last is not None and last.argument is not None and not config.is_given(context, "model"):
        model = last.argument
    if model is None:
        raise missing_model(context)

    def begin(loaded: "Model", say: Callable[[str], None]) -> Session:
        if note := set_template(loaded, template):
            say(note)
        session = Session(
            loaded, settings, shift=context_shift, at_terminal=sys.stdin is not None and sys.stdin.isatty()
        )
        if last is None:
            session.clear(system_prompt)
        else:
            session.load(last.path)
            session.settings |= {name: value for name, value in settings.items() if config.is_given(context, name)}
        return session

    if sys.stdin is not None and sys.stdin.isatty():
        interactive = sys.stdout.isatty() or sys.stderr.isatty()
        if not interactive:
            raise UsageError("chat needs a terminal to show its prompt on: gemkit generate writes into a file")
        styled = not plain and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        with _loaded(model, load, styled, not no_history) as (loaded, terminal):
            session = begin(loaded, lambda note: None if quiet else terminal.note(note, "dim"))
            keeper = Keeper(None if no_history else model)
            if not quiet:
                hint_faster(model, loaded, load)
            _greet(session, terminal, quiet)
            if last is not None:
                _recall(session, terminal)
                terminal.say("")
            try:
                _converse(session, terminal, quiet, keeper)
            finally:
                terminal.close()
        return
    text = read_text("-")
    if not text.strip():
        raise UsageError("standard input is empty: give a message, or run the command in a terminal")
    import gemkit

    with gemkit.load(model, **load) as loaded:
        session = begin(loaded, lambda note: click.echo(f"gemkit: {note}", err=True))
        if not quiet:
            hint_faster(model, loaded, load)
        if _is_pretrained(session):
            click.echo(f"gemkit: {PRETRAINED.format(name=session.name)}", err=True)
        _answer_once(session, text)
        if last is not None and not Keeper(None if no_history else model).keep(session):
            click.echo(f"gemkit: {NOT_KEPT}", err=True)


@dataclass(frozen=True)
class _Last:
    """The last conversation: its file, and the model as it was named then."""

    path: Path
    argument: str | None


def _last(context: click.Context) -> _Last:
    """Find the last conversation; raises UsageError if there is none."""
    from gemkit.cli.repl import transcript

    if config.is_given(context, "system_prompt"):
        raise UsageError("--system-prompt begins a conversation and --continue goes on with one: drop one of them")
    path = transcript.last_path()
    if not path.exists():
        raise UsageError("there is no conversation to continue: one is kept after each answer, but for --no-history")
    try:
        argument = transcript.read(path).get("argument")
    except UsageError:
        raise UsageError(
            f"the last conversation, {path}, is damaged: start without --continue, and the next answer replaces it"
        ) from None
    return _Last(path, argument if isinstance(argument, str) else None)


class Keeper:
    """Saves the conversation after each turn, for `--continue`. argument: the model's name; None disables it."""

    def __init__(self, argument: str | None) -> None:
        # A path means the same from another folder
        self._argument = os.path.abspath(argument) if argument is not None and os.path.exists(argument) else argument
        self._kept: object = None

    def keep(self, session: "Session") -> bool:
        """Write the conversation if it changed and is not empty; return False if that failed."""
        if self._argument is None or session.messages is self._kept or session.last_question() is None:
            return True
        from gemkit.cli.repl import transcript

        self._kept = session.messages
        try:
            transcript.write(transcript.last_path(), {"argument": self._argument, **session.record()})
        except OSError:
            self._argument = None
            return False
        return True


NOT_KEPT = "The conversation cannot be kept for --continue: the cache folder cannot be written."


@contextmanager
def _loaded(model: str, loading: dict[str, object], styled: bool, history: bool) -> "Iterator[tuple[Model, Terminal]]":
    """Give the model and the terminal; the terminal's library is imported while the weights are read."""
    import gemkit
    from gemkit.cache import cache_dir

    # Where there is no such file, a download may have its own to say.
    note = f"loading {Path(model).name} ..." if styled and sys.stdout.isatty() and Path(model).exists() else ""
    note = note if note.isprintable() and len(note) < 70 else ""
    click.echo(note, nl=False)
    with ThreadPoolExecutor(1) as background:
        module = background.submit(import_module, "gemkit.cli.repl.terminal")
        try:
            loaded = gemkit.load(model, **loading)
        finally:
            if note:
                click.echo(f"\r{' ' * len(note)}\r", nl=False)
    with loaded:
        yield loaded, module.result().Terminal(cache_dir() / "chat_history" if history else None, styled)


def _is_pretrained(session: "Session") -> bool:
    return session.model.checkpoint.instruction_tuned is False


def _greet(session: "Session", terminal: "Terminal", quiet: bool) -> None:
    threads = session.model.threads
    if not quiet:
        terminal.say(session.name, "bold", end="")
        line = f"{threads} thread{'' if threads == 1 else 's'} · context {session.model.ctx_size:,} · /? for help"
        terminal.say(f"  {line}", "dim")
    if _is_pretrained(session):
        terminal.note(PRETRAINED.format(name=session.name), "warning")
    terminal.say("")


def _recall(session: "Session", terminal: "Terminal") -> None:
    """Show a conversation that was loaded, its newest messages if it is long."""
    shown = session.messages[-RECALLED:]
    if len(shown) < len(session.messages):
        terminal.note(f"{len(session.messages) - len(shown)} earlier messages are not shown.", "dim")
    for number, message in enumerate(shown):
        if number:
            terminal.say("")
        if message["role"] == "system":
            terminal.note(f"System prompt: {message['content']}", "dim")
        elif message["role"] == "user":
            terminal.quote(message["content"])
        else:
            terminal.show(message["content"])
            terminal.end()


def _converse(session: "Session", terminal: "Terminal", quiet: bool, keeper: Keeper) -> None:
    """Read messages and commands until the user leaves."""
    debug = click.get_current_context().find_root().params.get("debug")
    while True:
        try:
            line = terminal.ask()
            going = _line(session, terminal, line, quiet)
        except EOFError:
            return
        except KeyboardInterrupt:
            terminal.note("Ctrl-D or /exit leaves.", "dim")
            continue
        except Exception as error:
            if debug:
                raise
            # Whatever it was, the conversation can still be saved.
            terminal.note(failure(error).format_message(), "error")
            going = True
        if not keeper.keep(session):
            terminal.note(NOT_KEPT, "warning")
        if not going:
            return
        terminal.say("")


def _line(session: "Session", terminal: "Terminal", line: str, quiet: bool) -> bool:
    """Run a command or answer a message; return False to leave."""
    from gemkit.cli.repl import commands

    reply = commands.run(session, line)
    if reply is not None and reply.text:
        terminal.note(reply.text, "dim")
    action = "ask" if reply is None else reply.action
    if action == "show":
        terminal.say("")
        _recall(session, terminal)
    elif action == "continue":
        _turn(session, terminal, session.go_on(), quiet)
    elif action in ("ask", "regen"):
        _turn(session, terminal, session.ask(None if reply else commands.unquote(line)), quiet)
    return reply is None or reply.action != "exit"


def _turn(session: "Session", terminal: "Terminal", answer: "Answer", quiet: bool) -> None:
    """Show one answer as it streams. Ctrl-C ends it and keeps its text."""
    if answer.dropped > session.dropped:
        terminal.note(SHIFTED.format(count=answer.dropped), "warning")
    terminal.say("")
    with terminal.answering() as stop:
        try:
            reading = f"reading {answer.prompt_tokens:,} tokens ..." if answer.prompt_tokens >= MUCH else ""
            with terminal.passing(reading):
                piece = stop.wait_for(answer)
            while piece is not None:
                terminal.show(piece)
                piece = None if stop.hit else stop.wait_for(answer)
        finally:
            turn = session.keep(answer)
            terminal.end()
    if turn is None:
        terminal.note("Stopped before the answer began; arrow up brings the message back.", "dim")
        return
    ended = _ENDED.get(turn.ended)
    if turn.ended == "context" and session.shift:
        ended = "The context is full: /continue goes on without the oldest messages."
    if ended:
        terminal.note(ended, "dim" if turn.ended == "stopped" else "warning")
    if not quiet:
        terminal.say(_speed(session, turn), "dim")


SHIFTED = "The context is full: the {count} oldest messages are left out from here on (--context-shift)."
_ENDED = {
    "stopped": "Stopped. /continue goes on.",
    "length": "The answer ended at max_tokens: /continue goes on, /set max_tokens=N changes it.",
    "context": "The context is full: /clear or /undo makes room (/save first to keep it), or start with a larger "
    "--ctx-size.",
}


def _speed(session: "Session", turn: "Turn") -> str:
    usage = turn.usage
    parts = [f"{usage.completion_tokens:,} token{'' if usage.completion_tokens == 1 else 's'}"]
    if usage.decode_rate:
        parts.append(f"{usage.decode_rate:.1f} tok/s")
    parts.append(f"first token {usage.first_token_seconds:.2f} s")
    parts.append(f"{usage.prompt_tokens + usage.completion_tokens}/{session.model.ctx_size} context")
    return " · ".join(parts)


def _answer_once(session: "Session", text: str) -> None:
    """Print the answer to one message as plain text."""
    from gemkit.text.visible import visible

    answer = session.ask(text)
    if answer.dropped:
        click.echo(f"gemkit: {SHIFTED.format(count=answer.dropped)}", err=True)
    try:
        for piece in answer:
            sys.stdout.write(visible(piece))
            sys.stdout.flush()
    finally:
        session.keep(answer)
    click.echo()
