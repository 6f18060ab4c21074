"""`gemkit merge MODEL ADAPTER... TARGET`: adapters merged into the weights, in floats or in a quantised file."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import (
    interrupted,
    json_option,
    megabytes,
    model_argument,
    print_json,
    read_text,
    table,
    target_file,
)
from gemkit.cli.convert import Bar
from gemkit.cli.paths import check_new
from gemkit.cli.quantize import NAMES, Line, Measure, quality, record
from gemkit.errors import GemkitError, UsageError

if TYPE_CHECKING:
    from gemkit.tools.quantize import Damage, Quantized
    from gemkit.weights.lora import LoraAdapter


@click.command("merge", cls=Verb, short_help="Merge adapters into a model's weights.")
@model_argument
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("target", metavar="TARGET", type=click.Path(path_type=Path), callback=target_file)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Type of the matrices in a folder; auto keeps the stored type.",
)
@click.option(
    "--requantize",
    "kind",
    type=click.Choice(NAMES, case_sensitive=False),
    metavar="TYPE",
    help=f"Write a GGUF file with matrices of this type, and measure what that costs: {', '.join(NAMES)}.",
)
@click.option(
    "--text-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The text to measure on (UTF-8)."
)
@click.option("--offline", is_flag=True, help="Use downloaded files only; make no request to a hub.")
@json_option
def command(
    model: str,
    adapters: tuple[Path, ...],
    target: Path,
    dtype: str,
    kind: str | None,
    text_file: Path | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Write MODEL with LoRA or DoRA adapters (PEFT) in its weights to TARGET, which must not exist.

    TARGET is a Hugging Face folder. Its matrices have the type of the stored ones, or --dtype; several adapters are
    merged in turn, as in peft. The embedding and the norms stay as they are, and a tied output matrix stays tied.

    Quantised weights would be rounded again, so they are refused, unless --dtype names a float type, or --requantize
    TYPE a file's: TARGET is then a GGUF file, and the merged model is run on a text before and after, to tell what
    the rounding costs. TARGET gets its name when it was read back and measured.
    """
    _check_request(target, dtype, kind, text_file)
    text = read_text(str(text_file)) if text_file is not None else None
    if text is not None and not text.strip():
        raise UsageError(f"{text_file} is empty: nothing to measure on")
    check_new(target)
    from gemkit.api.load import find
    from gemkit.weights.peft.read import read_peft

    parts = [read_peft(path) for path in adapters]
    source = find(model, offline, original=True)
    shown = not as_json and sys.stderr.isatty()
    try:
        if kind is None:
            _merge(source, parts, target, dtype, shown)
            done = measured = None
        else:
            done, measured = _requantize(source, parts, target, kind, text, shown)
    except KeyboardInterrupt:
        interrupted(f"nothing is left of {target}")
    if measured is not None and measured.interrupted:
        interrupted(f"{target} is complete, but its damage was not measured")
    if measured is not None and measured.shortage:
        raise GemkitError(f"{target} is complete, but its damage was not measured: {measured.shortage}")
    damage = measured and measured.damage
    matrices = len({name for adapter in parts for name in adapter.parts})
    if as_json:
        more = {"format": "hf"} if done is None else record(kind, done, damage)
        print_json({"path": str(target), "adapters": [str(path) for path in adapters], "merged": matrices} | more)
        return
    size = "" if done is None else f"{megabytes(done.bytes)}; "
    click.echo(f"{target}\n{size}matrices merged: {matrices:,}")
    if damage is not None:
        click.echo("\n" + _report(damage))


def _check_request(target: Path, dtype: str, kind: str | None, text_file: Path | None) -> None:
    """Raise UsageError for options that do not go together."""
    is_gguf = target.suffix.lower() == ".gguf"
    if is_gguf and kind is None:
        raise UsageError(f"{target} would be a GGUF file: give --requantize TYPE, such as q8_0, or name a folder")
    if kind is not None and not is_gguf:
        raise UsageError(f"--requantize writes a GGUF file: let the target end in .gguf, or give --dtype for {target}")
    if kind is not None and dtype != "auto":
        raise UsageError("--dtype is for a folder and --requantize for a GGUF file: leave one out")
    if kind is None and text_file is not None:
        raise UsageError("--text-file is the text to measure --requantize on: give that too")


def _merge(source: Path, adapters: "list[LoraAdapter]", target: Path, dtype: str, shown: bool) -> None:
    from gemkit.tools.merge import merge

    bar = Bar(shown)
    try:
        merge(source, adapters, target, dtype, bar.show)
    finally:
        bar.end()


def _requantize(
    source: Path, adapters: "list[LoraAdapter]", target: Path, kind: str, text: str | None, shown: bool
) -> "tuple[Quantized, Measure]":
    from gemkit.tools import sample
    from gemkit.tools.merge import merged_gguf
    from gemkit.tools.quantize import check_measurable, quantize

    check_measurable(source)
    with merged_gguf(source, adapters, target) as whole:
        measured = Measure(whole, target, sample.TEXT if text is None else text, shown)
        with Line("quantizing", "M numbers", 1e6, shown) as line:
            done = quantize(whole, target, kind, progress=line.show, check=measured)
    return done, measured


def _report(damage: "Damage") -> str:
    found = damage.compared
    return table(quality(damage), (f"on {found.tokens:,} tokens", "merged", "requantized", "change"))
