"""`gemkit chat MODEL`: a conversation in the terminal."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import Text, default_model_argument, failure, load_options, read_text
from gemkit.cli.generate import _real, _whole
from gemkit.errors import UsageError

if TYPE_CHECKING:
    from gemkit.api import Model
    from gemkit.cli.repl.session import Session, Turn
    from gemkit.cli.repl.terminal import Terminal

MUCH = 2000  # tokens of a prompt that takes a noticeable time to read
PRETRAINED = (
    "{name} is pretrained only: it continues text and was not taught to chat. "
    "For a chat-tuned one: gemkit chat gemma-3-1b-it, or any model whose name ends in -it."
)


@click.command("chat", cls=Verb, short_help="Chat in the terminal.")
@default_model_argument
@click.option("--system-prompt", type=Text(), help="Instructions put before the conversation.")
@_whole("-n", "--max-tokens", help="Stop an answer after so many tokens (default: up to the context).")
@_real("--temp", "--temperature", "temperature", default=1.0, help="0 takes the likeliest token.")
@_whole("--top-k", default=64, help="Draw from the N likeliest tokens; 0 is off.")
@_real("--top-p", default=0.95, help="Draw from the likeliest tokens that make up this share.")
@_real("--min-p", help="Leave out tokens under this share of the likeliest.")
@_real("--repetition-penalty", help="Above 1 discourages what the text already has.")
@_whole("-s", "--seed", help="The same seed gives the same answers.")
@click.option("--plain", is_flag=True, help="No colours, no rendered Markdown.")
@click.option("--quiet", is_flag=True, help="No greeting, no line about speed.")
@load_options
def command(
    model: str,
    system_prompt: str | None,
    plain: bool,
    quiet: bool,
    load: dict,
    **options: object,
) -> None:
    """Chat with MODEL: a GGUF file, a Hugging Face folder, a name such as gemma-3-1b-it, or `demo`.

    /? lists the commands. Input that is no terminal is one message: its answer is printed, and that is all.
    """
    from gemkit.cli.repl.session import DEFAULTS, Session, check_settings

    settings = {name: options.pop(name) for name in DEFAULTS if name in options}
    settings = check_settings(settings)  # wrong values are found before the model is loaded
    if sys.stdin is not None and sys.stdin.isatty():
        interactive = sys.stdout.isatty() or sys.stderr.isatty()
        if not interactive:
            raise UsageError("chat needs a terminal to show its prompt on: gemkit generate writes into a file")
        styled = not plain and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        with _loaded(model, load, styled) as (loaded, terminal):
            session = Session(loaded, settings)
            session.clear(system_prompt)
            _greet(session, terminal, quiet)
            try:
                _converse(session, terminal, quiet)
            finally:
                terminal.close()
        return
    text = read_text("-")
    if not text.strip():
        raise UsageError("standard input is empty: give a message, or run the command in a terminal")
    import gemkit

    with gemkit.load(model, **load) as loaded:
        session = Session(loaded, settings)
        session.clear(system_prompt)
        if _is_pretrained(session):
            click.echo(f"gemkit: {PRETRAINED.format(name=session.name)}", err=True)
        _answer_once(session, text)


@contextmanager
def _loaded(model: str, loading: dict[str, object], styled: bool) -> "Iterator[tuple[Model, Terminal]]":
    """The model and the terminal, whose library is imported while the weights are read."""
    import gemkit
    from gemkit.cache import cache_dir

    # Where there is no such file, a download may have its own to say.
    note = f"loading {Path(model).name} ..." if styled and sys.stdout.isatty() and Path(model).exists() else ""
    note = note if note.isprintable() and len(note) < 70 else ""
    click.echo(note, nl=False)
    with ThreadPoolExecutor(1) as beside:
        module = beside.submit(import_module, "gemkit.cli.repl.terminal")
        try:
            loaded = gemkit.load(model, **loading)
        finally:
            if note:
                click.echo(f"\r{' ' * len(note)}\r", nl=False)
    with loaded:
        yield loaded, module.result().Terminal(cache_dir() / "chat_history", styled)


def _is_pretrained(session: "Session") -> bool:
    return session.model.checkpoint.instruction_tuned is False


def _greet(session: "Session", terminal: "Terminal", quiet: bool) -> None:
    threads = session.model.threads
    if not quiet:
        terminal.say(session.name, "bold", end="")
        facts = f"{threads} thread{'' if threads == 1 else 's'} · context {session.model.ctx_size:,} · /? for help"
        terminal.say(f"  {facts}", "dim")
    if _is_pretrained(session):
        terminal.note(PRETRAINED.format(name=session.name), "warning")
    terminal.say("")


def _converse(session: "Session", terminal: "Terminal", quiet: bool) -> None:
    """Reads messages and commands until the user leaves."""
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
        if not going:
            return
        terminal.say("")


def _line(session: "Session", terminal: "Terminal", line: str, quiet: bool) -> bool:
    """Runs a command or answers a message; returns False to leave."""
    from gemkit.cli.repl import commands

    reply = commands.run(session, line)
    if reply is not None and reply.text:
        terminal.note(reply.text, "dim")
    if reply is None or reply.action == "regen":
        _turn(session, terminal, None if reply else commands.unquote(line), quiet)
    return reply is None or reply.action != "exit"


def _turn(session: "Session", terminal: "Terminal", text: str | None, quiet: bool) -> None:
    """One answer, shown as it comes. Ctrl-C ends it; what was said stays."""
    answer = session.ask(text)
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
    if ended:
        terminal.note(ended, "dim" if turn.ended == "stopped" else "warning")
    if not quiet:
        terminal.say(_speed(session, turn), "dim")


_ENDED = {
    "stopped": "Stopped.",
    "length": "The answer ended at max_tokens: /set max_tokens=N changes it.",
    "context": "The context is full: /clear or /undo makes room (/save first to keep it), or start with a larger "
    "--ctx-size.",
}


def _speed(session: "Session", turn: "Turn") -> str:
    parts = [f"{turn.tokens:,} token{'' if turn.tokens == 1 else 's'}"]
    if turn.rate:
        parts.append(f"{turn.rate:.1f} tok/s")
    parts.append(f"first token {turn.first_seconds:.2f} s")
    parts.append(f"{turn.prompt_tokens + turn.tokens}/{session.model.ctx_size} context")
    return " · ".join(parts)


def _answer_once(session: "Session", text: str) -> None:
    """Prints the answer to one message as plain text."""
    from gemkit.cli.repl.text import visible

    answer = session.ask(text)
    try:
        for piece in answer:
            sys.stdout.write(visible(piece))
            sys.stdout.flush()
    finally:
        session.keep(answer)
    click.echo()
