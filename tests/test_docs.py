"""The documents hold: the generated pages are current, links and tests exist. Budget: 10 s.

Whether commands and programs do what the pages say is in docs/test_run.py.

`python tests/test_docs.py --write` writes the generated pages.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_overloads

import click
import pytest

import gemkit
from gemkit.cli import ALIASES, VERBS, cli
from gemkit.cli.command import Verb

ROOT = Path(__file__).parents[1]
CLI_PAGE = ROOT / "docs" / "reference" / "cli.md"
PYTHON_PAGE = ROOT / "docs" / "reference" / "python.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def cli_page() -> str:
    """The command reference in Markdown, from the click commands themselves."""
    lines = ["# The command line", "", "Generated from the program by `make docs`; a test compares them.", ""]
    lines += [
        "`gemkit --version` prints the version. Exit codes: 0 done, 1 failure, 2 wrong usage, 130 interrupted.",
        "",
    ]
    lines += _options(cli, "gemkit")
    for verb in VERBS:
        command = cli.get_command(click.Context(cli), verb)
        names = " or ".join(f"`gemkit {name}`" for name in [verb, *(a for a, v in ALIASES.items() if v == verb)])
        lines += [f"## gemkit {verb}", "", f"{names} `{_usage(command)}`", "", inspect.cleandoc(command.help), ""]
        lines += _options(command, f"gemkit {verb}")
    return "\n".join(lines).rstrip() + "\n"


def _usage(command: click.Command) -> str:
    arguments = [p.make_metavar(click.Context(command)) for p in command.params if isinstance(p, click.Argument)]
    return " ".join([*arguments, "[OPTIONS]"])


def _options(command: click.Command, name: str) -> list[str]:
    context = click.Context(command, info_name=name)
    sections = command.sections(context) if isinstance(command, Verb) else {"Options": command.params}
    lines = []
    for title, options in sections.items():
        records = [
            option.get_help_record(context)
            for option in options
            if isinstance(option, click.Option) and not option.is_eager
        ]
        if records:
            bar = "\\|"  # in a table, also between backticks
            rows = [f"| `{left.replace('|', bar)}` | {text} |" for left, text in records]
            lines += [f"| {title if len(sections) > 1 else 'option'} | meaning |", "|---|---|", *rows, ""]
    return lines or ["| option | meaning |", "|---|---|", ""]


def python_page() -> str:
    """The Python reference in Markdown, from the signatures and docstrings of all that the package exports."""
    lines = ["# The Python API", "", "Generated from the program by `make docs`; a test compares them.", ""]
    for name in gemkit.__all__[1:]:
        value = getattr(gemkit, name)
        lines += [f"## {name}", ""]
        if isinstance(value, type) and not dataclasses.is_dataclass(value):
            bases = [base.__name__ for base in value.__bases__ if base is not object]
            lines += [f"`class {name}{f'({bases[0]})' if bases else ''}`", ""]
        else:
            lines += [f"`{_signature(name, value)}`", ""]
        lines += [_documented(inspect.getdoc(value)), ""]
        for member, method in vars(value).items() if isinstance(value, type) else ():
            if not member.startswith("_") and isinstance(method, property):
                lines += [f"### {name}.{member}", "", _documented(method.__doc__), ""]
            elif not member.startswith("_") and callable(method):
                lines += [f"### {name}.{member}", ""]
                for one in get_overloads(method) or [method]:
                    lines += [f"`{_signature(member, one)}`", ""]
                lines += [_documented(method.__doc__), ""]
    return "\n".join(lines).rstrip() + "\n"


def _signature(name: str, function: Callable) -> str:
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(function)))
    text = text.replace("(self, ", "(").replace("(self)", "()")
    text = text.removesuffix(" -> None") if isinstance(function, type) else text
    return name + text.replace("Unpack[GenerateKeywords]", "GenerateOptions").replace(
        "Unpack[LoadKeywords]", "LoadOptions"
    )


def _documented(docstring: str | None) -> str:
    """A docstring as Markdown: a line that begins with the name of an argument or field is an item of a list."""
    assert docstring, "all that is exported has a docstring"
    lines = []
    for line in inspect.cleandoc(docstring).splitlines():
        if item := re.match(r"((?:[a-z_]\w*, )*[a-z_]\w*): (.*)", line):
            if lines and not lines[-1].startswith(("- ", "  ")) and lines[-1]:
                lines.append("")
            line = f"- `{item[1]}`: {item[2]}"
        elif line.startswith("    ") and lines and lines[-1].startswith(("- ", "  ")):
            line = f"  {line.strip()}"
        lines.append(line)
    return "\n".join(lines)


def test_the_python_reference_is_current():
    page = python_page()
    assert PYTHON_PAGE.read_text(encoding="utf-8") == page, "run `make docs`"
    for kind in (gemkit.GenerateOptions, gemkit.LoadOptions, gemkit.Usage):
        for field in dataclasses.fields(kind):
            assert f"- `{field.name}`: " in page, f"{kind.__name__}.{field.name} has no line in the docstring"


def test_the_command_reference_is_current():
    assert CLI_PAGE.read_text(encoding="utf-8") == cli_page(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_paths_and_targets_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    for path, name in re.findall(r"`(tests/[\w/]+\.py|native/tests/\w+\.cc)(?:::(\w+))?`", text):
        assert (ROOT / path).exists(), path
        assert not name or re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), f"{path}::{name}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"`make ([\w-]+)", text):
        assert target in targets, target


def _files(span: str) -> list[Path]:
    """Return the files that a path on a page of docs/concepts names: of the project, or of the package."""
    return [top / span for top in (ROOT, ROOT / "src" / "gemkit") if (top / span).is_file()]


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "concepts").glob("*.md")), ids=lambda page: page.name)
def test_files_and_names_of_the_concept_pages_exist(page: Path):
    """A name between backticks is in one of the files that its paragraph, list item or table row names."""
    paragraphs = re.split(r"\n\s*\n|\n(?=\d+\. |- |\|)", page.read_text(encoding="utf-8"))
    checked = 0
    for paragraph in paragraphs:
        spans = re.findall(r"`([^`]+)`", paragraph)
        paths = [span for span in spans if re.fullmatch(r"[\w/.-]+\.(?:py|cc|h|md)", span) and "/" in span]
        assert not [path for path in paths if not _files(path)], paragraph
        text = "\n".join(file.read_text(encoding="utf-8") for path in paths for file in _files(path))
        for span in spans:
            if span not in paths and re.fullmatch(r"[A-Za-z_]\w*(?:(?:\.|::)\w+)*", span):
                missing = [part for part in re.split(r"\.|::", span) if not re.search(rf"\b{part}\b", text)]
                assert not missing, f"{span}: {missing} not in {paths}"
                checked += 1
    assert checked > 5


def test_every_line_of_the_numerics_contract_names_its_test():
    rows = [line for line in (ROOT / "docs" / "numerics.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith("| promise")]
    assert len(promises) > 15
    assert not [row for row in promises if not re.search(r"`(tests|native/tests)/[\w/.:]+` \|$", row)]


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    CLI_PAGE.write_text(cli_page(), encoding="utf-8", newline="\n")
    PYTHON_PAGE.write_text(python_page(), encoding="utf-8", newline="\n")
