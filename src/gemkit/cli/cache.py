"""`gemkit cache`: what gemkit keeps to start faster, and partial downloads; list and remove them."""

import time
from datetime import datetime
from typing import TYPE_CHECKING

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import json_option, megabytes, print_json, table
from gemkit.errors import UsageError

if TYPE_CHECKING:
    from gemkit.cache import Copy


@click.command("cache", cls=Verb, short_help="List or remove packed weights and other copies.")
@click.argument("action", metavar="[list|prune]", type=click.Choice(["list", "prune"]), default="list")
@click.option("--all", "everything", is_flag=True, help="prune: remove all copies, and partial downloads.")
@click.option("--older-than", metavar="TIME", help="prune: remove copies not used for this time, such as 30d or 12h.")
@click.option("--max-size", metavar="SIZE", help="prune: keep no more than this, such as 5GB, the last used first.")
@json_option
def command(action: str, everything: bool, older_than: str | None, max_size: str | None, as_json: bool) -> None:
    """List, or with `prune` remove, the copies that gemkit keeps to start faster: packed weights and tokenizers.

    All of them are made again when they are needed; `gemkit rm` deletes models. Without an option, prune
    removes the copies whose models are gone or changed, and copies over the limit (GEMKIT_CACHE_SIZE, 20 GB), which
    also happens automatically. Partial downloads, which the next download continues, are listed, and removed by --all
    and --older-than.
    """
    from gemkit.cache import parse_age, parse_size
    from gemkit.hub.partial import downloads
    from gemkit.models import kept

    if action == "list" and (everything or older_than or max_size):
        raise UsageError("--all, --older-than and --max-size say what to remove: gemkit cache prune")
    if everything and (older_than or max_size):
        raise UsageError("--all removes everything: leave the other options out")
    age = parse_age(older_than, "--older-than") if older_than else None
    limit = parse_size(max_size, "--max-size") if max_size else kept.size_limit()[0]
    if action == "list":
        _list(kept.copies(), downloads(), limit, as_json)
        return
    removed = []
    if everything or age is not None:
        since = time.time() - (age or 0)
        removed = [copy for copy in [*kept.copies(), *downloads()] if everything or copy.used < since]
        removed = [copy for copy in removed if copy.remove()]
    removed += kept.tidy(limit=limit)
    if as_json:
        print_json({"removed": [_row(copy) for copy in removed], "bytes": sum(copy.size for copy in removed)})
    else:
        click.echo(f"removed {megabytes(sum(copy.size for copy in removed))} in {len(removed)} copies")


def _list(copies: "list[Copy]", downloads: "list[Copy]", limit: int, as_json: bool) -> None:
    from gemkit.cache import cache_dir
    from gemkit.models.kept import TOKENIZER

    total = sum(copy.size for copy in copies)
    if as_json:
        rows = [_row(copy) for copy in [*copies, *downloads]]
        print_json({"folder": str(cache_dir()), "copies": rows, "bytes": total, "limit": limit})
        return
    rows = [_cells(copy) for copy in [*copies, *downloads] if copy.kind != TOKENIZER]
    if tokenizers := [copy for copy in copies if copy.kind == TOKENIZER]:
        size, used = sum(copy.size for copy in tokenizers), max(copy.used for copy in tokenizers)
        rows.append(("tokenizers", megabytes(size), _when(used), "", ""))
    if rows:
        click.echo(table(rows, ("what", "size", "last used", "source", "of")) + "\n")
    click.echo(f"{megabytes(total)} of at most {megabytes(limit)} in {cache_dir()}")
    if dead := sum(copy.size for copy in copies if copy.is_dead):
        click.echo(f"'gemkit cache prune' removes {megabytes(dead)} of models that are gone or changed")


def _row(copy: "Copy") -> dict[str, object]:
    return {
        "kind": copy.kind,
        "size": copy.size,
        "used": datetime.fromtimestamp(copy.used).astimezone().isoformat(timespec="seconds"),
        "source": copy.state,
        "of": copy.sources,
        "files": [str(path) for path in copy.files],
    }


def _cells(copy: "Copy") -> tuple[str, ...]:
    state = "" if copy.state == "unknown" else copy.state
    return (copy.kind, megabytes(copy.size), _when(copy.used), state, ", ".join(copy.sources) or copy.files[0].name)


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
