"""`gemkit ls`: which models are downloaded."""

from datetime import UTC, datetime

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import json_option, megabytes, print_json, table


@click.command("ls", cls=Verb, short_help="List the downloaded models.")
@json_option
def command(as_json: bool) -> None:
    """List the Gemma models in the caches of Hugging Face, Kaggle and gemkit."""
    from gemkit.hub.resolve import installed
    from gemkit.models.kept import packed

    entries, size = installed(), sum(copy.size for copy in packed())
    if as_json:
        rows = [
            {
                "name": entry.name,
                "ready": entry.ready,
                "format": entry.format,
                "size": entry.size,
                "modified": datetime.fromtimestamp(entry.modified, UTC).isoformat(timespec="seconds"),
                "path": str(entry.path),
            }
            for entry in entries
        ]
        print_json({"models": rows, "packed_size": size})
        return
    if not entries:
        click.echo("No model is downloaded. 'gemkit download gemma-3-1b-it' fetches one.")
    else:
        rows = [
            (
                entry.name,
                "ready" if entry.ready else "incomplete",
                entry.format,
                megabytes(entry.size),
                datetime.fromtimestamp(entry.modified).strftime("%Y-%m-%d %H:%M"),
                str(entry.path),
            )
            for entry in entries
        ]
        click.echo(table(rows, ("name", "state", "format", "size", "when", "path")))
    if size:
        click.echo(f"\npacked weights of all models: {megabytes(size)} ('gemkit cache' lists them)")
