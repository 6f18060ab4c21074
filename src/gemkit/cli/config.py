"""Defaults from the environment and from a configuration file, for the verbs that run a model.

The command line comes first, then variables such as GEMKIT_THREADS, then the file: its table of the verb, then its
keys at the top. The file is read only where it exists, and its library imported only then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import click
from click.core import ParameterSource
from click.types import IntParamType

from gemkit.api.options import LoadOptions
from gemkit.cli import sampling
from gemkit.errors import UsageError

LOAD = tuple(field.name for field in fields(LoadOptions))
_WRITE = (
    *("system_prompt", "raw", *sampling.NAMES, "stop", "verbose"),
    *("plain", "quiet", "context_shift", "no_history"),
)
# By verb, the parameters that may have such defaults; not those that write files or change a measurement.
SETTABLE = dict.fromkeys(("generate", "chat"), LOAD + _WRITE)
SETTABLE |= dict.fromkeys(("score", "show", "bench", "embed"), LOAD) | {"tokenize": ("offline",)}
MODEL = "model"
# No parameter's name, so that click does not take it for an argument's default before the environment's.
_DEFAULT_MODEL = "the default model"


def path() -> Path | None:
    """Return the file's path; None to use no file.

    GEMKIT_CONFIG names it, or disables it if empty; else XDG_CONFIG_HOME/gemkit/config.toml; else, on Windows
    %APPDATA%\\gemkit\\config.toml, elsewhere ~/.config/gemkit/config.toml.
    """
    own = os.environ.get("GEMKIT_CONFIG")
    if own is not None:
        return Path(own) if own else None
    xdg = os.environ.get("XDG_CONFIG_HOME")
    if xdg and os.path.isabs(xdg):
        folder = Path(xdg)
    elif sys.platform == "win32" and (roaming := os.environ.get("APPDATA")):
        folder = Path(roaming)
    else:
        try:
            folder = Path.home() / ".config"
        except RuntimeError:
            return None
    return folder / "gemkit" / "config.toml"


def shown_path() -> str:
    """Return the file's path as it is named in messages, `~` for the home folder."""
    where = path()
    if where is None:
        return "the configuration file"
    try:
        return f"~/{where.relative_to(Path.home()).as_posix()}"
    except (ValueError, RuntimeError):
        return str(where)


def variable(param: click.Parameter) -> str | None:
    """Return the environment variable of an option; None if it has none, as those that may be repeated."""
    if not isinstance(param, click.Option) or param.multiple:
        return None
    return "GEMKIT_" + max(param.opts, key=len).lstrip("-").replace("-", "_").upper()


def defaults(verb: str, params: Sequence[click.Parameter]) -> dict[str, object]:
    """Return the file's values for a verb by the names of its parameters, and the model.

    Raises UsageError for a file that is not TOML, an unknown key or table, and a value of the wrong kind.
    """
    where = path()
    if verb not in SETTABLE or where is None:
        return {}
    if not where.is_file():
        if os.environ.get("GEMKIT_CONFIG") and not where.exists():
            raise UsageError(f"there is no file {where}, which GEMKIT_CONFIG names: check the path")
        if os.environ.get("GEMKIT_CONFIG") and where.is_dir():
            raise UsageError(f"{where}, which GEMKIT_CONFIG names, is a folder: give a file")
        return {}
    table = _read(where)
    options = _options(verb, params)
    found: dict[str, object] = {}
    own = {}
    for key, value in table.items():
        if isinstance(value, dict):
            if key not in SETTABLE:
                raise _unknown(where, "table", key, list(SETTABLE))
            own = value if key == verb else own
        elif _plain(key) in options:
            found[options[_plain(key)].name] = _value(where, key, options[_plain(key)], value)
        elif _plain(key) == MODEL:
            found[_DEFAULT_MODEL] = _model(where, key, value)
        elif _plain(key) not in (known := _every_key()):  # a key at the top is for whichever verbs have it
            raise _unknown(where, "key", key, sorted(known))
    for key, value in own.items():
        if _plain(key) == MODEL:
            found[_DEFAULT_MODEL] = _model(where, f"[{verb}] {key}", value)
        elif _plain(key) in options:
            found[options[_plain(key)].name] = _value(where, f"[{verb}] {key}", options[_plain(key)], value)
        else:
            raise _unknown(where, f"key in [{verb}]", key, sorted([*options, MODEL]))
    return found


def flat_file(ctx: click.Context, param: click.Parameter, where: str | None) -> None:
    """Take a file's values, by the names of the command's options, as the defaults of this call.

    Raises UsageError for a file that is not TOML, an unknown key, and a value of the wrong kind.
    """
    if where is None:
        return
    options = {
        name.lstrip("-"): option
        for option in ctx.command.params
        if isinstance(option, click.Option) and option is not param
        for name in option.opts
        if name.startswith("--")
    }
    found: dict[str, object] = {}
    for key, value in _read(Path(where), "give another file").items():
        if _plain(key) not in options:
            raise _unknown(Path(where), "key", key, sorted(options))
        option = options[_plain(key)]
        found[option.name] = _value(Path(where), key, option, value)
    ctx.default_map = {**(ctx.default_map or {}), **found}


def default_model(ctx: click.Context) -> str | None:
    """Return the model for a verb that was given none: GEMKIT_MODEL, then the file's; None if there is neither."""
    return os.environ.get("GEMKIT_MODEL") or (ctx.default_map or {}).get(_DEFAULT_MODEL)


def is_given(ctx: click.Context, name: str) -> bool:
    """Return whether a parameter is on the command line, where it takes precedence over other values."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _read(where: Path, remedy: str = "mend it or set GEMKIT_CONFIG") -> dict[str, object]:
    import tomllib

    from gemkit.text.encoding import decode

    try:
        return tomllib.loads(decode(where.read_bytes()))
    except OSError as error:
        raise UsageError(f"{where} cannot be read ({error.strerror or error}): {remedy}") from None
    except ValueError as error:
        raise UsageError(f"{where} is not TOML ({error}): a line is key = value, with texts in quotes") from None


def _options(verb: str, params: Sequence[click.Parameter]) -> dict[str, click.Option]:
    """Return the settable options of a verb, by each of their long names."""
    return {
        name.lstrip("-"): param
        for param in params
        if isinstance(param, click.Option) and param.name in SETTABLE[verb]
        for name in param.opts
        if name.startswith("--")
    }


def _every_key() -> set[str]:
    """Return the keys allowed at the top level: those of `generate` and `chat`, which have all of them."""
    commands = {verb: import_module(f"gemkit.cli.{verb}").command for verb in ("generate", "chat")}
    return {key for verb, command in commands.items() for key in _options(verb, command.params)} | {MODEL}


def _plain(key: str) -> str:
    return key.replace("_", "-").lower()


def _value(where: Path, key: str, option: click.Option, value: object) -> object:
    """Return a value of the kind that the option takes; its range is checked by the option itself."""
    if option.multiple:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return value
        raise UsageError(f"{where}: {key} is {value!r:.60}; give a text or a list of texts")
    if option.is_flag:
        if isinstance(value, bool):
            return value
        raise UsageError(f"{where}: {key} is {value!r:.60}; give true or false")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{where}: {key} is {value!r:.60}; give a text or a number")
    if isinstance(value, float) and isinstance(option.type, IntParamType):  # click would cut the fraction off
        raise UsageError(f"{where}: {key} is {value!r:.60}; give a whole number")
    try:
        return option.type.convert(value, option, None)
    except click.BadParameter as error:
        raise UsageError(f"{where}: {key}: {error.message.replace('integer range', 'integer')}") from None


def _model(where: Path, key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{where}: {key} is {value!r:.60}; give the name of a model, a file or a folder in quotes")
    return value


def _unknown(where: Path, kind: str, name: str, known: Sequence[str]) -> UsageError:
    from difflib import get_close_matches

    near = get_close_matches(_plain(name), known, 1)
    remedy = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
    return UsageError(f"{where}: there is no {kind} {name!r:.60}; {remedy}")
