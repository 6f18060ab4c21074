"""The chat's commands: functions of the session and their argument that return what to say and what to do next."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from gemkit.cli.repl.session import DEFAULTS, Session, check_settings, share
from gemkit.errors import UsageError

QUOTES = '"""'


@dataclass(frozen=True)
class Reply:
    """The result of a command.

    action: "exit", "regen" (answer again), "continue" (continue the answer), "show" (the conversation), or empty.
    """

    text: str = ""
    action: str = ""


@dataclass(frozen=True)
class Command:
    run: Callable[[Session, str], Reply]
    usage: str
    help: str


def is_open(text: str) -> bool:
    """Return whether a text is the beginning of a block between triple quotes."""
    return bool(re.match(r'\s*([/!]system\s+)?"""', text)) and text.count(QUOTES) % 2 == 1


def unquote(text: str) -> str:
    """Return a text without the triple quotes around it."""
    inner = text.strip()
    if len(inner) >= 6 and inner.startswith(QUOTES) and inner.endswith(QUOTES):
        return inner[3:-3].removeprefix("\n").removesuffix("\n")
    return text


def parse(line: str) -> tuple[str, str] | None:
    """Return (name, argument) of a command, None for a message.

    A first word such as /usr/bin is no command; nor is an unknown one before several lines.
    """
    match = re.match(r"[/!](\?|[A-Za-z]\w*)?(?:\s+|$)", line)
    if not match:
        return None
    name = (match[1] or "").lower()
    if "\n" in line.strip() and ALIASES.get(name, name) not in COMMANDS:
        return None
    return name, line[match.end() :].strip()


def run(session: Session, line: str) -> Reply | None:
    """Run a line that is a command, return None for a message; raises UsageError and OSError."""
    parsed = parse(line)
    if parsed is None:
        return None
    name, argument = parsed
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        near = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], 1, 0.5)
        hint = f"did you mean /{near[0]}?" if near else "/help lists them."
        raise UsageError(f"there is no command /{name}: {hint} A space in front sends the line as a message.")
    return command.run(session, argument)


def help_(session: Session, argument: str) -> Reply:
    """Return the table of commands and keys."""
    rows = [(f"/{name} {command.usage}".rstrip(), command.help) for name, command in COMMANDS.items()]
    rows += [
        ('"""', "begin and end a message of several lines"),
        ("Alt-Enter, Ctrl-J", "new line"),
        ("Ctrl-C", "stop the answer, clear the line"),
        ("Ctrl-D", "leave"),
    ]
    width = max(len(left) for left, _ in rows)
    return Reply("\n".join(f"{left.ljust(width)}  {right}" for left, right in rows))


def system(session: Session, argument: str) -> Reply:
    """Show the system prompt, or set it and start again; empty quotes remove it."""
    if not argument:
        return Reply(session.system if session.system is not None else "There is no system prompt.")
    text = unquote(argument) if argument.startswith(QUOTES) else argument
    text = None if text.strip() in ("", '""', "''") else text
    session.clear(text)
    return Reply(f"The system prompt is {'set' if text else 'removed'}; the conversation starts again.")


def set_(session: Session, argument: str) -> Reply:
    """List the settings or change some: k=v, several of them, or "k v"; "default" takes one back."""
    if not argument:
        width = max(map(len, DEFAULTS))
        lines = []
        for name, default in DEFAULTS.items():
            value = session.settings.get(name, default)
            lines.append(f"{name.ljust(width)}  {'random' if value is None else f'{value:g}'}")
        return Reply("\n".join(lines))
    changed = dict(session.settings)
    names = []
    for name, value in _pairs(argument):
        name = name.replace("-", "_").lower()
        name = {"temp": "temperature", "num_predict": "max_tokens"}.get(name, name)
        if name not in DEFAULTS:
            near = difflib.get_close_matches(name, [*DEFAULTS, "temp"], 1, 0.5)
            raise UsageError(
                f"there is no setting {name}: " + (f"did you mean {near[0]}?" if near else "/set lists them")
            )
        names.append(name)
        changed[name] = None if value.lower() in ("default", "none", "off") else _number(value)
    session.settings = check_settings(changed)
    return Reply(", ".join(f"{name} is {_shown(session, name)}" for name in dict.fromkeys(names)) + ".")


def _pairs(argument: str) -> list[tuple[str, str]]:
    words = re.sub(r"\s*=\s*", "=", argument).split()
    words = words[1:] if words[0] in ("parameter", "parameters") else words
    if len(words) == 2 and "=" not in argument:
        return [(words[0], words[1])]
    pairs = [tuple(word.split("=", 1)) for word in words]
    if not pairs or any(len(pair) < 2 or not all(pair) for pair in pairs):
        raise UsageError("/set takes name=value, such as /set temperature=0.7; /set alone lists the settings")
    return pairs


def _number(value: str) -> object:
    """Return a number if it is one; what is none is refused by name where the settings are checked."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _shown(session: Session, name: str) -> str:
    value = session.settings.get(name, DEFAULTS[name])
    return "back to its default" if name not in session.settings else f"{value:g}" if value is not None else "unset"


def save(session: Session, argument: str) -> Reply:
    """Write the conversation to a file."""
    path = session.save(_file(argument, "/save"))
    return Reply(f"Saved {_messages(session)} to {path}.")


def load(session: Session, argument: str) -> Reply:
    """Read a conversation from a file, in place of this one, and show it."""
    name = session.load(_file(argument, "/load"))
    other = f" They were saved with {name}." if name not in (None, session.name) else ""
    return Reply(f"Loaded {_messages(session)}.{other}", "show")


def read(session: Session, argument: str) -> Reply:
    """Attach a text file to the next message; alone, list the files; empty quotes remove them."""
    if argument in ('""', "''"):
        session.attached = []
        return Reply("No file goes with the next message.")
    if argument:
        session.attach(_file(argument, "/read"))
    if not session.attached:
        return Reply("No file goes with the next message: /read FILE attaches one.")
    files = ", ".join(f"{file.name} ({file.tokens:,} tokens)" for file in session.attached)
    verb = "goes" if len(session.attached) == 1 else "go"
    taken = session.count() + sum(file.tokens for file in session.attached)
    over = f" With the conversation that is more than the context of {session.model.ctx_size:,} tokens."
    return Reply(f"{files} {verb} with your next message.{over if taken >= session.model.ctx_size else ''}")


def continue_(session: Session, argument: str) -> Reply:
    """Continue an answer that was stopped or reached its limit."""
    if not session.messages or session.messages[-1]["role"] != "assistant":
        raise UsageError("there is no answer to go on with: write a message first")
    return Reply(action="continue")


def _file(argument: str, name: str) -> str:
    path = argument.strip("\"'")
    if not path or "\n" in path or "\0" in path:
        raise UsageError(f"{name} takes a file's name, such as {name} chat.json")
    return path


def _messages(session: Session) -> str:
    count = len(session.messages)
    return f"{count} message{'' if count == 1 else 's'}"


def regen(session: Session, argument: str) -> Reply:
    """Generate another answer."""
    if session.last_question() is None:
        raise UsageError("there is nothing to answer again: write a message first")
    fixed = "seed" in session.settings or session.settings.get("temperature") == 0
    return Reply("The same answer is to be expected: a seed is set, or temperature is 0." if fixed else "", "regen")


def undo(session: Session, argument: str) -> Reply:
    """Forget the last exchange."""
    if not session.undo():
        raise UsageError("there is nothing to undo")
    return Reply(f"The last message and its answer are gone; {_messages(session)} left.")


def clear(session: Session, argument: str) -> Reply:
    """Forget the conversation, not the system prompt."""
    session.clear(session.system)
    return Reply("The conversation starts again.")


def tokens(session: Session, argument: str) -> Reply:
    """Show the used part of the context, and the speed of the last answer."""
    count, room, last = session.count(), session.model.ctx_size, session.last
    text = f"The conversation takes {count:,} of {room:,} tokens ({share(count, room)})"
    if count < room:
        text += "."
    elif session.shift:
        text += ": the next message drops the oldest ones."
    else:
        text += ", so that no answer fits: /undo or /clear makes room, as does a larger --ctx-size or --context-shift."
    if session.dropped:
        text += f" The model does not see the {session.dropped} oldest messages."
    if last is not None:
        text += f" The last answer: {last.usage.completion_tokens:,} tokens, {last.usage.decode_rate:.1f} tok/s."
    return Reply(text)


def exit_(session: Session, argument: str) -> Reply:
    """Leave the chat."""
    return Reply(action="exit")


COMMANDS = {
    "help": Command(help_, "", "this list"),
    "system": Command(system, "TEXT", "set the system prompt and start again; alone: show it"),
    "set": Command(set_, "NAME=VALUE", "temperature, top_k, max_tokens, seed, ...; alone: list"),
    "save": Command(save, "FILE", "write the conversation to a file"),
    "load": Command(load, "FILE", "go on with a saved conversation"),
    "read": Command(read, "FILE", "attach a text file to the next message; alone: list"),
    "continue": Command(continue_, "", "go on with an answer that was cut short"),
    "regen": Command(regen, "", "answer the last message again"),
    "undo": Command(undo, "", "forget the last message and its answer"),
    "clear": Command(clear, "", "forget the conversation"),
    "tokens": Command(tokens, "", "how much of the context is taken"),
    "exit": Command(exit_, "", "leave"),
}
ALIASES = {
    "?": "help",
    "": "help",
    "bye": "exit",
    "quit": "exit",
    "q": "exit",
    "retry": "regen",
    "status": "tokens",
    "show": "set",
    "reset": "clear",
}
