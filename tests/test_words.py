"""Texts use standard terms: docstrings, comments, help texts and documents avoid the words below. Budget: 10 s."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A pattern to avoid, and terms to use in its place. Code is not searched, nor what stands between backticks.
WORDS = {
    r"likeliest": "most probable, argmax",
    r"rooms?": "memory, capacity, space",
    r"beside": "next to, besides, compared with, in the background",
    r"beneath": "below, underlying",
    r"anew": "again",
    r"facts?": "configuration, metadata, settings",
    r"deal(?:s|t|ing)? out|dealt": "distribute, dynamic scheduling, work queue",
    r"spread(?:s|ing)? (?:by|over)": "split by, divided by",
    r"nobody(?:'s)?|whoever|whom|whomever": "name the user, program or object; padding page",
    r"want of": "lack of, out of memory",
    r"(?:is|are|was|were)(?: not)? there(?! (?:is|are)\b)": "exists, is missing, is installed, is complete",
    r"(?:is|are|was|were) made of": "consists of, is built from",
    r"known of": "describe the values",
    r"(?<!at )least(?! squares)": "minimum, smallest",
    r"lies?|lying": "is in, is stored",
    r"stands? (?:beside|in front of)": "is next to, precedes",
    r"(?:finite|stored|float32|bfloat16|float16) numbers|blocks? of \d+ numbers|numbers of (?:a|an|each|the) "
    r"(?:tensor|group|block|norm|row)": "elements, values",
}
# Openings of a docstring: it begins with a verb, or with a noun that is a term.
OPENINGS = re.compile(r"(?:What|Which|Whether|Whose|Who|Whoever|Those|How|Some|Of|Where|Why|When)\b")
COVERED = [
    *(
        f"src/gemkit/{name}"
        for name in ("arch", "text", "weights", "hub", "engine", "api", "tools", "data", "train", "cli")
    ),
    *(f"src/gemkit/{name}.py" for name in ("cache", "errors", "extras", "forks", "host")),
    *("src/gemkit/models", "native/src", "native/tests", "native/bench"),
    *(f"tests/{name}" for name in ("arch", "text", "weights", "hub", "engine", "api", "tools", "data", "train", "cli")),
    *("tests/parity", "tests/docs", "tests/benchmarks", "tests/models"),
    *("benchmarks/cpu", "benchmarks/gpu", "benchmarks/quality", "benchmarks/peers"),
    *("docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
]
SUFFIXES = {".py", ".md", ".cc", ".h"}
# Texts with such a word in another sense: the path and a part of the line, with the reason.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def files(covered: str) -> list[Path]:
    path = ROOT / covered
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    yield first.value


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of what a reader reads: docstrings, comments, help texts; prose in Markdown."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        fenced = False
        for number, line in enumerate(source.splitlines(), 1):
            fenced ^= line.lstrip().startswith("```")
            if not fenced:
                yield number, line
    elif path.suffix == ".py":
        tree = ast.parse(source)
        for constant in docstrings(tree):
            yield from enumerate(constant.value.splitlines(), constant.lineno)
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in ("help", "short_help"):
                for part in ast.walk(node.value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.lineno, part.value
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
    else:
        for number, line in enumerate(source.splitlines(), 1):
            if comment := re.search(r"(?:^|\s)//+(.*)", line):
                yield number, comment[1]


def test_the_words_are_found():
    """A list that finds nothing would pass for ever."""
    found = [word for word in WORDS if re.search(rf"\b(?:{word})\b", "it is not there, and lies beside the facts")]
    assert len(found) == 4
    assert OPENINGS.match("What it is.") and not OPENINGS.match("Whatever") and not OPENINGS.match("Offset")
    assert not re.search(rf"\b(?:{next(word for word in WORDS if 'least' in word)})\b", "at least one")
    here = dict(texts(Path(__file__)))
    assert here[1].startswith("Texts use") and any("A pattern to avoid" in text for text in here.values())


@pytest.mark.parametrize("covered", COVERED)
def test_texts_avoid_the_words(covered: str):
    assert files(covered), f"{covered} has no files"
    found = []
    for path in files(covered):
        name = path.relative_to(ROOT).as_posix()
        for number, text in texts(path):
            text = re.sub(r"``[^`]*``|`[^`]*`", "", text)
            if any(name == where and part in text for where, part in EXCEPTIONS):
                continue
            for word, instead in WORDS.items():
                if match := re.search(rf"\b(?:{word})\b", text, re.IGNORECASE):
                    found.append(f"{name}:{number}: {match[0]!r}: {instead}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("covered", [name for name in COVERED if "." not in name or name.endswith(".py")])
def test_docstrings_begin_with_a_verb_or_a_noun(covered: str):
    found = []
    for path in files(covered):
        if path.suffix == ".py":
            for constant in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
                if OPENINGS.match(constant.value.lstrip()):
                    first = constant.value.strip().splitlines()[0]
                    found.append(f"{path.relative_to(ROOT).as_posix()}:{constant.lineno}: {first}")
    assert not found, "\n".join(found)
