"""`gemkit download NAME`: fetch a model, and print where it is."""

import sys
import warnings

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import Text, completion, json_option, print_json
from gemkit.errors import GemkitWarning


@click.command("download", cls=Verb, short_help="Fetch a model from Hugging Face or Kaggle.")
@click.argument("name", metavar="NAME", type=Text(), shell_complete=completion("published"))
@click.option("--revision", metavar="R", type=Text(), help="Branch, tag or commit; on Kaggle, the version.")
@click.option("--offline", is_flag=True, help="Use downloaded files only; make no request to a hub.")
@json_option
def command(name: str, revision: str | None, offline: bool, as_json: bool) -> None:
    """Fetch the model NAME, or its missing or newer files, and print its path."""
    from gemkit.hub.names import with_revision
    from gemkit.hub.resolve import resolve

    if revision is not None:
        name = with_revision(name, revision)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GemkitWarning)
        path = resolve(name, offline=offline, refresh=True)
    for warning in caught:
        click.echo(f"gemkit: {' '.join(str(warning.message).split())}", err=True)
    if as_json:
        print_json({"name": name, "path": str(path)})
    else:
        click.echo(str(path))
    sys.stdout.flush()
