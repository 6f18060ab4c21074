"""`gemkit check MODEL`: what is wrong with a model's files, before anyone loads them."""

import shutil
import textwrap
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

import click

from gemkit.cli.command import Verb
from gemkit.cli.common import Text, completion, json_option, print_json
from gemkit.errors import GemkitError, UsageError

if TYPE_CHECKING:
    from gemkit.tools.check import Finding

FORMATS = {
    "gguf": "GGUF file",
    "hf": "Hugging Face folder",
    "keras": "KerasHub preset",
    "google": "Google's checkpoint",
}
_MOST = 6  # places of one fault that are printed; --json has all
_COLOURS = {"error": "red", "warning": "yellow", "note": "blue"}


@click.command("check", cls=Verb, short_help="Lint a model's files: GGUF, Hugging Face or KerasHub.")
@click.argument("model", metavar="MODEL", type=Text(), shell_complete=completion("models"))
@click.option("--deep", is_flag=True, help="Read every tensor to its end, not a sample of the large ones.")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings too.")
@json_option
def command(model: str, deep: bool, strict: bool, as_json: bool) -> None:
    """Report faults in the files of MODEL, also of one that does not load, with the remedy of each fault.

    MODEL is a GGUF file, a Hugging Face folder, a KerasHub preset's folder, `demo`, or the name of a downloaded model.
    Exits with 1 if there are errors.
    """
    from gemkit.api.load import find
    from gemkit.tools.check import judge, read, scope

    try:
        path = find(model, download=False)
    except GemkitError as error:
        raise UsageError(str(error)) from None
    subject = read(path, deep)
    found, seen = judge(subject), scope(subject)
    counts = {level: sum(finding.level == level for finding in found) for level in _COLOURS}
    if as_json:
        plurals = {f"{level}s": count for level, count in counts.items()}
        print_json({"model": str(path), "deep": deep, "scope": seen, **plurals, "findings": [asdict(f) for f in found]})
    else:
        _print_findings(found)
        click.echo("\n".join([str(path), *textwrap.wrap(_scope(seen, deep), _width()), _counted(counts)]))
    if counts["error"] or (strict and counts["warning"]):
        click.get_current_context().exit(1)


def _print_findings(found: "list[Finding]") -> None:
    """Print a paragraph for each rule: the fault, its locations, the consequence and the remedy."""
    width = _width()
    for rule, findings in groupby(found, key=lambda finding: finding.rule):
        first, *rest = findings
        head = f"{first.level} {rule}: "
        body = textwrap.wrap(head + first.what, width, subsequent_indent="  ", break_on_hyphens=False)
        body[0] = click.style(head, fg=_COLOURS[first.level], bold=True) + body[0].removeprefix(head)
        parts = [("at", f"{finding.where}: {finding.found}") for finding in (first, *rest)][:_MOST]
        if len(rest) >= _MOST:
            parts.append(("at", f"and {len(rest) + 1 - _MOST:,} more places; --json lists all"))
        for label, text in [*parts, ("why", first.why), ("fix", first.remedy)]:
            indents = {"initial_indent": f"  {label:<4}", "subsequent_indent": " " * 6}
            body += textwrap.wrap(text, width, **indents, break_on_hyphens=False)
        click.echo("\n".join(body) + "\n")


def _width() -> int:
    return min(100, max(40, shutil.get_terminal_size().columns))


def _scope(seen: dict, deep: bool) -> str:
    """Return the scope of the check, in a line."""
    parts = [FORMATS[seen["format"]], seen["family"] or "family unknown"]
    if seen["parameters"]:
        parts.append(f"sizes of {seen['published_as']}" if seen["published_as"] else "sizes of no published model")
    if seen["format"] == "keras":
        parts.append("weights not inspected (HDF5, which gemkit does not load)")
    else:
        how = "read whole" if deep else "sampled"
        unread = seen["tensors"] - seen["tensors_inspected"]
        parts.append(f"{seen['tensors']:,} tensors {how}" + (f", {unread:,} not inspected" if unread else ""))
    parts.append(f"{seen['pieces']:,} pieces" if seen["pieces"] else "no tokenizer")
    parts.append("chat template" if seen["chat_template"] else "no chat template")
    return "looked at: " + ", ".join(parts)


def _counted(counts: dict[str, int]) -> str:
    """Count findings. Example: "2 errors, 1 warning"; notes only if there are any."""
    shown = [level for level in counts if level != "note" or counts[level]]
    return ", ".join(f"{counts[level]} {level}{'' if counts[level] == 1 else 's'}" for level in shown)
