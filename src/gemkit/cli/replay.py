"""`gemkit replay FILE`: make the text of a receipt again and compare it, token for token."""

import dataclasses
import sys
from pathlib import Path

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import import_numpy, json_option, print_json


@click.command(cls=Verb, short_help="Make the text of a receipt again.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", metavar="MODEL", help="Path of the weights, if they were moved.")
@click.option("-t", "--threads", type=click.IntRange(1), metavar="N", help="Threads (default: the physical cores).")
@click.option(
    "--batch",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    metavar="N",
    help="Number of requests that run together.",
)
@json_option
def command(file: Path, model: str | None, threads: int | None, batch: int, as_json: bool) -> None:
    """Make the text of FILE, which `gemkit generate --receipt FILE` wrote, again.

    The tokens must be the same with any number of threads and any company in the batch. Exit code 1 if one differs.
    """
    import_numpy()
    from gemkit.tools import receipt

    record = receipt.read_receipt(file)
    found = receipt.replay(record, model=model, threads=threads, batch=batch)
    if as_json:
        print_json({"equal": found.first_difference is None, **dataclasses.asdict(found)})
    else:
        click.echo(found.text)
        then, now = found.instructions
        kernels = f"{now} kernels" if then == now else f"{now} kernels, the receipt has {then}"
        if found.first_difference is None:
            click.echo(f"the same {len(found.ids)} tokens ({kernels})", err=True)
        else:
            click.echo(f"token {found.first_difference + 1} of {len(record['ids'])} differs ({kernels})", err=True)
    if found.first_difference is not None:
        sys.exit(1)
