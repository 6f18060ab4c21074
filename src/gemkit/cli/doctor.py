"""`gemkit doctor [MODEL]`: what this machine has, what is wrong with it, and which models run on it."""

import shutil
import textwrap
from collections.abc import Iterable
from typing import Any

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import Text, completion, json_option, print_json, table


@click.command("doctor", cls=Verb, short_help="Report on this machine: models that it can run, and problems.")
@click.argument("model", metavar="[MODEL]", required=False, type=Text(), shell_complete=completion("models"))
@click.option("--measure", is_flag=True, help="Measure the read bandwidth, and predict decode rates from it.")
@json_option
def command(model: str | None, measure: bool, as_json: bool) -> None:
    """Report on this machine: processor, memory, folders, and the published models that fit; with MODEL, if it fits.

    Exits with 1 if the C++ core does not load. Tokens are never printed, and no network is needed.
    """
    from gemkit.tools.doctor import examine

    report = examine(model, _bandwidth if measure else None)
    if as_json:
        print_json(report)
    else:
        _print(report)
    if not report["native"]["loads"]:
        click.get_current_context().exit(1)


def _bandwidth(threads: int) -> float:
    from gemkit import _native

    return _native.measure_bandwidth(threads)


def _print(report: dict[str, Any]) -> None:
    _print_machine(report)
    rows = [
        (row["name"], row["path"], _size(row["free"]), "yes" if row["writable"] else "no") for row in report["folders"]
    ]
    click.echo(table(rows, ("cache", "folder", "free", "writable")) + "\n")
    if report["cache"] is not None:
        kept, limit = _size(report["cache"]["bytes"]), _size(report["cache"]["limit"])
        click.echo(f"packed weights and tokenizers: {kept} of at most {limit} (gemkit cache)\n")
    if report["variables"]:
        click.echo(table(list(report["variables"].items()), ("variable", "value")) + "\n")
    rows = [(row["name"], row["version"] or f"pip install {row['name']}") for row in report["frameworks"]]
    for row in report["extras"]:
        missing = f"missing {', '.join(row['missing'])}: {row['install']}"
        rows.append((row["name"], missing if row["missing"] else "installed"))
    click.echo(table(rows, ("optional", "version, or how to get it")) + "\n")
    _print_models(report["models"], report["bandwidth"] is not None)
    if report["model"] is not None:
        _print_fit(report["model"])
    if not report["problems"]:
        click.echo("no problems found")
    for problem in report["problems"]:
        click.echo(_wrapped("problem: ", problem["what"]) + "\n" + _wrapped("  remedy: ", problem["remedy"]))


def _print_machine(report: dict[str, Any]) -> None:
    processor, native, memory = report["processor"], report["native"], report["memory"]
    quota = "" if processor["quota"] is None else f", of which the container may use {processor['quota']:g}"
    compiled = ", ".join(native["compiled"])
    rows = [
        ("gemkit", f"{report['gemkit']} on Python {report['python']}"),
        ("system", report["system"]),
        ("processor", processor["name"]),
        ("instruction sets", " ".join(processor["instructions"]) or "unknown"),
        ("kernels", f"{native['path'] or 'none'}, of {compiled}: {native['why']}"),
        ("CPUs", f"{processor['cpus']}, usable {processor['usable_cpus']}{quota}"),
        ("threads", f"{processor['threads']} by default"),
        ("memory", f"{_size(memory['total'])}, free {_size(memory['available'])}"),
        ("huge pages", memory["huge_pages"] or "unknown"),
    ]
    if report["bandwidth"] is not None:
        rows.append(("read bandwidth", f"{report['bandwidth']:.1f} GB/s"))
    without = {"Hugging Face": "set HF_TOKEN", "Kaggle": "set KAGGLE_API_TOKEN"}
    for hub, there in report["tokens"].items():
        rows.append((f"{hub} token", "there" if there else f"none: Gemma's weights need one, {without[hub]}"))
    click.echo(_rows(rows) + "\n")


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    """Return names and values, a long value on several lines below each other."""
    rows = list(rows)
    indent = max(len(name) for name, _ in rows) + 2
    return "\n".join(_wrapped(name.ljust(indent), value) for name, value in rows)


def _wrapped(head: str, text: str) -> str:
    width = min(100, max(40, shutil.get_terminal_size().columns))
    style = {"break_on_hyphens": False, "break_long_words": False}
    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head), **style)


def _print_models(models: list[dict[str, Any]], rated: bool) -> None:
    from gemkit.tools.memory import CONTEXT, TYPES

    click.echo(f"memory for the weights and a context of {CONTEXT:,} tokens (Q4: embedding in Q8_0)")
    if rated:
        click.echo("t/s: tokens a second that the read bandwidth allows for")
    rows = [(row["name"], *(_cell(row["types"][name]) for name in TYPES)) for row in models]
    click.echo(table(rows, ("model", *TYPES)) + "\n")


def _cell(cell: dict[str, Any]) -> str:
    fits = {True: "fits", False: "too big", None: "?"}[cell["fits"]]
    rated = cell["rate"] is not None and cell["fits"]
    return f"{_size(cell['bytes'])} " + (f"{cell['rate']:.1f} t/s" if rated else fits)


def _print_fit(model: dict[str, Any]) -> None:
    rows = [
        ("weights", _size(model["weights"])),
        (f"cache of {model['ctx_size']:,} tokens", _size(model["cache"])),
        ("together, with activations", _size(model["total"])),
        ("fits", {True: "yes", False: "no", None: "unknown"}[model["fits"]]),
    ]
    if model["longest"] is not None:
        rows.append(("longest context that fits", f"{model['longest']:,} tokens"))
    if model["rate"] is not None:
        rows.append(("decode, about", f"{model['rate']:.1f} tok/s"))
    click.echo(model["source"])
    click.echo(_rows(rows) + "\n")


def _size(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e9:.{2 if size < 1e9 else 1}f} GB"
