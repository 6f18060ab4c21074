"""gemkit convert: a model from one format to another, with a proof that nothing changed."""

import dataclasses
import sys
from pathlib import Path

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import json_option, model_argument, print_json, read_text, table
from gemkit.cli.paths import check_new
from gemkit.errors import UsageError


@click.command(cls=Verb, short_help="Write a model in another format.")
@model_argument
@click.argument("target", metavar="TARGET", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["hf", "gguf", "orbax"]),
    required=True,
    help="A Hugging Face folder, a GGUF file, or a folder as Google's Flax releases.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "int8"]),
    default="auto",
    show_default=True,
    help="Of the matrices; auto keeps what is stored. int8 (Q8_0) is for GGUF; Flax takes float32 or bfloat16.",
)
@click.option("--verify", "check", is_flag=True, help="Load the result and compare it with the original.")
@click.option(
    "--text-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The text to compare on (UTF-8)."
)
@click.option("--offline", is_flag=True, help="Never ask a hub: use what was downloaded before.")
@json_option
def command(
    model: str, target: Path, to: str, dtype: str, check: bool, text_file: Path | None, offline: bool, as_json: bool
) -> None:
    """Writes MODEL to TARGET, which must not exist.

    MODEL may also be one of Google's own checkpoints: a Flax/Orbax folder or a PyTorch .ckpt file.

    Tensors, tokenizer, chat template and stop ids go along; nothing half-written is left behind. Quantised weights
    become float32 in a Hugging Face or Flax folder, which is exact. With --verify the result is loaded and compared:
    exit code 1 if ids differ, or if nothing was to be rounded and something was.
    """
    if text_file is not None and not check:
        raise UsageError("--text-file is the text for --verify: give that too")
    check_new(target)
    from gemkit.apps import convert
    from gemkit.loading import find

    convert.check_request(to, dtype)
    source = find(model, offline, original=True)

    bar = _Bar(not as_json and sys.stderr.isatty())
    path = convert.convert(source, target, to, dtype, bar.show)
    bar.end()
    record: dict[str, object] = {"path": str(path), "format": to}
    failed = False
    if check:
        text = read_text(str(text_file)) if text_file else convert.SAMPLE
        found = convert.verify(source, path, text)
        record["verify"] = dataclasses.asdict(found)
        failed = not found.same_ids or (dtype == "auto" and found.tensor is not None)
    if as_json:
        print_json(record)
    else:
        click.echo(str(path))
        if check:
            click.echo(_report(found))
    if failed:
        sys.exit(1)


def _report(found) -> str:
    where = "none, all are equal" if found.tensor is None else f"{found.tensor[0]}, by {found.tensor[1]:.1e}"
    rows = [
        ("tokens compared", f"{found.tokens}"),
        ("ids", "the same" if found.same_ids else "different"),
        ("largest difference of logits, relative", f"{found.logits:.1e}"),
        ("mean divergence, nats a token", f"{found.kl:.1e}"),
        ("same likeliest token", f"{found.agreement:.2%}"),
        ("perplexity of the text", "{:.4f}, before {:.4f}".format(*reversed(found.perplexity))),
        ("first tensor that differs", where),
    ]
    return table(rows, ("compared with the original", ""))


class _Bar:
    """A line of progress on a terminal."""

    def __init__(self, shown: bool) -> None:
        self.shown, self.percent = shown, -1

    def show(self, done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        if self.shown and percent != self.percent:
            self.percent = percent
            click.echo(f"\rwriting {percent} % of {total / 1e9:.2f} GB", nl=False, err=True)

    def end(self) -> None:
        if self.shown and self.percent >= 0:
            click.echo(err=True)
