"""Shared parts of the verbs: common options, tables, JSON and the process's peak memory."""

import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from gemkit.api.options import ACTIVATIONS, BACKENDS, LoadOptions
from gemkit.cli import config
from gemkit.cli.streams import is_utf8
from gemkit.errors import GemkitError, UsageError, listed

if TYPE_CHECKING:
    from gemkit.text.tokenizer import Tokenizer


class Text(click.ParamType):
    """An argument that is valid Unicode: bytes that are not UTF-8 arrive as lone surrogates and are refused."""

    name = "text"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if any("\ud800" <= character <= "\udfff" for character in str(value)):
            self.fail("is not UTF-8 text.", param, ctx)
        return str(value)


def failure(error: Exception) -> click.ClickException:
    """Return what the command line says of an error: one line, with its exit code."""
    if isinstance(error, MemoryError):
        error = GemkitError("not enough memory; close other programs or use a smaller model or context.")
    known = isinstance(error, GemkitError | OSError)
    result = click.ClickException(str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)")
    result.exit_code = 2 if isinstance(error, UsageError) else 1
    return result


def interrupted(left: str) -> NoReturn:
    """Print what an interrupted command leaves, and exit with the exit code of interrupted programs."""
    click.echo(f"gemkit: interrupted; {left}", err=True)
    sys.exit(130)


def model_argument(command: Callable) -> Callable:
    """Add the first positional argument: a model's file or folder, a hub's name for it, or `demo`."""
    return click.argument("model", metavar="MODEL", shell_complete=completion("models"))(command)


def default_model_argument(command: Callable) -> Callable:
    """Add the first positional argument where it may be left out, for the model that is the user's default."""
    return click.argument(
        "model",
        metavar="[MODEL]",
        required=False,
        type=Text(),
        callback=_model_or_default,
        shell_complete=completion("models"),
    )(command)


def completion(name: str) -> Callable:
    """Return a function of `gemkit.cli.complete`, which is imported when the shell asks."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list:
        from gemkit.cli import complete as functions

        return getattr(functions, name)(ctx, param, incomplete)

    return complete


def _model_or_default(ctx: click.Context, param: click.Parameter, model: str | None) -> str | None:
    model = model if model is not None else config.default_model(ctx)
    if model is None and "resume" not in {other.name for other in ctx.command.params}:
        raise missing_model(ctx)
    return model


def missing_model(ctx: click.Context) -> UsageError:
    """Return the error of a command without a model, which says how to name one and how to have a default."""
    return UsageError(
        f"MODEL is missing: name one, as in '{ctx.command_path} gemma-3-1b-it', or set a default, with GEMKIT_MODEL or "
        f'with model = "gemma-3-1b-it" in {config.shown_path()}'
    )


def split_text(ctx: click.Context, model: str, words: tuple[str, ...], alone: bool) -> tuple[str, tuple[str, ...]]:
    """Return the model and the texts after it, where a default model may have made the first argument a text.

    It is one if it has spaces, or if there is no other text (`alone`) and no model is called like that.
    Raises UsageError for a text with spaces and no model at all.
    """
    default = config.default_model(ctx)
    if os.path.exists(model):
        return model, words
    spaces = any(map(str.isspace, model.strip()))
    if default is None:
        if spaces and not words and not _MODEL.match(model):
            raise missing_model(ctx)
        return model, words
    is_text = spaces or (alone and not words and not _MODEL.match(model))
    return (default, (model, *words)) if is_text else (model, words)


# The beginnings of a model's name, or the form of a path.
_MODEL = re.compile(r"(code|shield)?gemma|demo$|hf:|kaggle:|.*[/\\]|.*\.(gguf|ckpt|safetensors)$", re.IGNORECASE)


LOAD_OPTIONS = (
    click.option("-t", "--threads", type=click.IntRange(1), metavar="N", help="Threads (default: the physical cores)."),
    click.option(
        "-c",
        "--ctx-size",
        type=click.IntRange(1),
        metavar="N",
        help="Context in tokens (default: the model's own).",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float32", "int8", "float16", "int4"]),
        default=LoadOptions.dtype,
        show_default=True,
        help="Type of the weights; auto keeps the stored type. float16, int4: torch, jax.",
    ),
    click.option(
        "--backend",
        type=click.Choice(BACKENDS),
        default=LoadOptions.backend,
        show_default=True,
        help="Backend; torch, jax and keras are extras.",
    ),
    click.option("--device", metavar="NAME", help="Device of the backends torch and jax: cpu, cuda, cuda:1, ... ."),
    click.option(
        "--adapter-path",
        "adapter",
        metavar="PATH",
        type=click.Path(),
        help="A folder with a LoRA or DoRA adapter (PEFT) to use.",
    ),
    click.option("--offline", is_flag=True, help="Use downloaded files only; make no request to a hub."),
    click.option(
        "--activations",
        type=click.Choice(ACTIVATIONS),
        default=LoadOptions.activations,
        show_default=True,
        help="int8 is fast; float32 is close to the reference.",
    ),
)


def load_options(command: Callable) -> Callable:
    """Add the options of `gemkit.load`; the command gets those that were given as the dictionary `load`."""

    @functools.wraps(command)
    def collected(**params: object) -> object:
        return command(load=given(**{name: params.pop(name) for name in config.LOAD}), **params)

    for option in reversed(LOAD_OPTIONS):
        collected = option(collected)
    return collected


def files_option(help: str) -> Callable:
    """Add `--file`, which may be repeated; `-` is standard input."""
    return click.option("-f", "--file", "files", multiple=True, type=click.Path(allow_dash=True), help=help)


def special_option(help: str) -> Callable:
    """Add `--special`, with which the names of control tokens in the text are those tokens."""
    return click.option("--special", is_flag=True, help=help)


def warn_of_control(tokenizer: "Tokenizer", text: str) -> None:
    """Warn on standard error of control tokens that are named in a text but read as plain text."""
    if names := tokenizer.find_control(text):
        click.echo(
            f"gemkit: the text holds {listed(names)}, read as plain text: --special reads control tokens", err=True
        )


def json_option(command: Callable) -> Callable:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


def target_file(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Check, before any work, that the folder of an output file exists; it is not created."""
    if path is not None and not path.parent.is_dir():
        message = f"the folder {path.parent} does not exist: make it first, or choose another"
        if path.parent.exists():
            message = f"{path.parent} is not a folder: choose another"
        raise click.BadParameter(message, ctx, param)
    return path


def import_numpy() -> None:
    """Import NumPy without the threads of its OpenBLAS: no verb multiplies matrices with it, and they cost a start."""
    name = "OPENBLAS_NUM_THREADS"
    before = os.environ.get(name)
    os.environ.setdefault(name, "1")
    import numpy  # noqa: F401

    if before is None:
        del os.environ[name]


def given(**options: object) -> dict[str, object]:
    """Return the options that were given, so that those left out take the Python API's defaults."""
    return {name: value for name, value in options.items() if value is not None and value != ()}


def read_text(path: str) -> str:
    """Return the text of a file, or of standard input for `-`: UTF-8, or what a byte order mark says.

    Raises UsageError if it is neither.
    """
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    return decode_text(data, "standard input" if path == "-" else path)


def decode_text(data: bytes, name: str) -> str:
    """Return the text of bytes, read as `read_text` does; raises UsageError with the name of their source."""
    from gemkit.text.encoding import decode

    try:
        return decode(data)
    except UnicodeDecodeError as error:
        kind = error.encoding.upper().removesuffix("-LE").removesuffix("-BE")
        where = error.reason if "mark" in error.reason else f"byte {error.start}"
        raise UsageError(f"{name} is not {kind} text ({where}): save it as UTF-8") from None


def print_json(value: object) -> None:
    """Print one JSON object on one line, with escapes unless standard output is UTF-8.

    A NaN or an infinity, which JSON lacks, becomes null.
    """
    escaped = not is_utf8(sys.stdout)
    try:
        text = json.dumps(value, ensure_ascii=escaped, allow_nan=False)
    except ValueError:
        value = _without_infinities(value)
        text = json.dumps(value, ensure_ascii=escaped, allow_nan=False)
    if not escaped and not _is_unicode(text):
        text = json.dumps(value, allow_nan=False)  # a file's name that is not UTF-8
    click.echo(text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_infinities(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Return an aligned table; numbers to the right, words to the left."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    right = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) if end else cell.ljust(width) for cell, width, end in zip(row, widths, right))
        for row in [list(header), *cells]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if isinstance(value, float) else str(value)


def megabytes(size: float) -> str:
    """Return a size in bytes as decimal megabytes."""
    return f"{size / 1e6:,.1f} MB"
