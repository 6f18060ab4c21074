"""`--chat-template` of the verbs that hold conversations, and the note on a model's own template."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemkit.cli.common import Text, decode_text
from gemkit.errors import UsageError

if TYPE_CHECKING:
    from gemkit.api.model import Model

GOOGLES = "gemma"
OWN = "{name} brings its own chat template, which prompts follow (--chat-template gemma: Google's turns)"


def template_option(command: Callable) -> Callable:
    """Add `--chat-template`; the command gets the text as `template`, "" for Google's turns, None if not given."""
    return click.option(
        "--chat-template",
        "template",
        metavar="FILE",
        type=Text(),
        callback=_read,
        help="The chat template, a file in Jinja, or gemma for Google's turns; by default the model's own.",
    )(command)


def _read(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None or value == GOOGLES:
        return None if value is None else ""
    try:
        text = decode_text(Path(value).read_bytes(), value)
    except OSError as error:
        raise UsageError(
            f"--chat-template {value} cannot be read ({error.strerror or error}): give a file in Jinja, or gemma"
        ) from None
    if not text.strip():
        raise UsageError(f"--chat-template {value} is empty: give a file in Jinja, or gemma")
    return text


def set_template(model: "Model", template: str | None) -> str | None:
    """Set the requested template; return the note on a template of the model's own, if it has one."""
    if template is not None:
        model.chat_template = template or None
        return None
    return OWN.format(name=model.checkpoint.name) if model.has_own_template else None
