"""`gemkit rm NAME`: delete a downloaded model."""

import sys

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import Text, completion, megabytes
from gemkit.errors import GemkitError, UsageError


@click.command("rm", cls=Verb, short_help="Delete a downloaded model.")
@click.argument("name", metavar="NAME", type=Text(), shell_complete=completion("downloaded"))
@click.option("--yes", is_flag=True, help="Do not ask.")
def command(name: str, yes: bool) -> None:
    """Delete the model NAME, a name as in `gemkit ls`, and its cached copies."""
    from gemkit.hub.resolve import named, remove
    from gemkit.models.kept import drop

    entries = named(name)
    for entry in entries:
        click.echo(f"{entry.name}  {megabytes(entry.size)}  {entry.path}", err=True)
    if not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise UsageError("nothing was deleted: --yes is needed where nobody can be asked")
        question = "Delete it?" if len(entries) == 1 else f"Delete these {len(entries)}?"
        if not click.confirm(question, err=True):
            raise GemkitError("nothing was deleted")
    drop(remove(entries))
