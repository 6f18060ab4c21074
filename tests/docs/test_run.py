"""Every command and program of README.md and docs/ runs, and prints what the page shows. Budget: 200 s.

Where a page shows output, it is that of the demo model. Commands without output run on stand-ins of the same shape, and
published models come from a hub on this machine. What cannot run here is in `NOT_RUN`, with the reason.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.world import World, server_fixture, world_fixture  # noqa: F401

from gemkit.cache import cache_dir
from gemkit.hub import demo as demo_module

from . import shell, standins
from .blocks import LANGUAGES, Block, blocks, steps
from .output import difference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if blocks(page)]

# Commands that are read but not run, by a pattern for their beginning: why not, and what covers them instead.
NOT_RUN = {
    r"pip install ": "it changes the environment and asks an index",
    r"make \w+": "targets of the Makefile: test_docs.py looks that they exist, CI runs run, test and lint",
    r"python benchmarks/": "they take minutes and an idle machine; tests/benchmarks runs them on small models",
    r"echo 'eval |_GEMKIT_COMPLETE=": "they change the shell's own files; tests/cli tests completion itself",
}
# What a page takes for granted, made before its first command.
FILES = {
    "question.txt": "What is a piece?\n",
    "beginning.txt": "Dear reader,",
    "first.md": "# First\n",
    "second.md": "# Second\n",
    "book.txt": "Call me Ishmael. " * 50,
    "lines.txt": "a cat\na kitten\n",
    "german.txt": "Es war einmal ein kleines Dorf am Meer. " * 200,
    "some.txt": "Once upon a time. ",
    "other.txt": "The end. ",
    "run.toml": 'data = "tuning.jsonl"\nmax-steps = 2\nlora-target = ["q_proj", "v_proj"]\n',
    "tuning.jsonl": "".join(
        f'{{"prompt": "{question}", "completion": "{answer}"}}\n'
        for question, answer in [
            ("Name a planet with rings.", "Saturn has the brightest rings."),
            ("What is 12 times 12?", "144"),
            ("Turn into a question: It rains.", "Does it rain?"),
        ]
    ),
}


# Added to a verb where a page does not say it: random text never ends by itself, and no user can be asked.
ADDED = {"generate": ["--max-tokens", "8"], "rm": ["--yes"]}
TIMEOUT = 300  # seconds for a program


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standins.demo(tmp_path_factory.mktemp("demo") / "gemma-3-270m-q4_k_m.gguf")


@pytest.fixture(scope="module")
def whole_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For programs, which may name any id."""
    return standins.demo(tmp_path_factory.mktemp("demo") / "gemma-3-270m-q4_k_m.gguf", pieces=None)


@pytest.fixture
def place(world: World, small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the files that the pages name, and a hub with the models that they name."""
    folder = tmp_path / "place"
    folder.mkdir()
    standins.published(world.served / "hf")
    standins.adapter(folder / "my-lora")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    os.link(small_demo, folder / "some-model.gguf")
    monkeypatch.chdir(folder)
    for name in [name for name in os.environ if name.startswith("GEMKIT_") and name != "GEMKIT_CACHE"]:
        monkeypatch.delenv(name)
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GEMKIT_CONFIG", "")
    # A cache of their own: pages prune it, and other tests use the demo's packed copy meanwhile
    monkeypatch.setenv("GEMKIT_CACHE", str(cache_dir() / "docs"))
    return folder


def _faults(page: Path, small_demo: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns all that is wrong with a page, by line."""
    faults = []
    for block in blocks(page):
        if block.language == "toml":
            Path("config.toml").write_text(block.text, encoding="utf-8")
            faults += _command("GEMKIT_CONFIG=config.toml gemkit show MODEL", None, small_demo)
        if block.language == "python":
            faults += _program(block, None if block.output else request.getfixturevalue("whole_vocabulary"))
        for step in steps(block) if block.language == "" else []:
            if any(re.match(pattern, step.command) for pattern in NOT_RUN):
                continue
            if exported := re.match(r"export (\w+)=(\S+)$", step.command):
                monkeypatch.setenv(*exported.groups())
                continue
            with monkeypatch.context() as patch:
                if step.output is None:
                    patch.setattr(demo_module, "demo_path", lambda: small_demo)
                faults += [f"line {step.line}: {fault}" for fault in _command(step.command, step.output, small_demo)]
    return faults


def _command(command: str, output: str | None, small_demo: Path) -> list[str]:
    replaced = {"MODEL": str(small_demo)}
    try:
        parts = shell.parse(command)
        for words in [part.words for part in parts if output is None and part.words[0] == "gemkit"]:
            more = ADDED.get(words[1], [])
            words += [] if more[:1] in [[word] for word in words] else more
        ran = shell.run(parts, "Hello\n", lambda word: replaced.get(word, word))
    except AssertionError as error:
        return [f"{command}: {error}"]
    if output is None:
        return [f"{command}: exit {ran.code}: {ran.both[-400:]}"] if ran.code else []
    found = [difference(output, text) for text in (ran.out, ran.both)]
    return [f"{command}: {found[0]}"] if all(found) else []


def _program(block: Block, standin: Path | None) -> list[str]:
    """Runs a program in a process of its own."""
    code = block.text
    if standin is not None:
        code = f"import gemkit.hub.demo as d; d.demo_path = lambda: {str(standin)!r}\n{code}"
    environment = {**os.environ, "PYTHONUTF8": "1", "KERAS_BACKEND": "jax"}  # TensorFlow alone takes 10 s to import
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=TIMEOUT, env=environment)
    if run.returncode:
        return [f"line {block.line}: {run.stderr.decode()[-800:]}"]
    found = None if block.output is None else difference(block.output, run.stdout.decode())
    return [f"line {block.line}: {found}"] if found else []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_does_what_it_says(page, place, small_demo, request, monkeypatch):
    unknown = [f"line {b.line}: mark it as one of {LANGUAGES}" for b in blocks(page) if b.language not in LANGUAGES]
    faults = unknown or _faults(page, small_demo, request, monkeypatch)
    assert not faults, "\n".join(faults)


def test_what_is_not_run_is_still_said():
    commands = [step.command for page in PAGES for b in blocks(page) if not b.language for step in steps(b)]
    for pattern in NOT_RUN:
        assert any(re.match(pattern, command) for command in commands), f"{pattern}: take it off the list"
    for command in commands:
        if match := re.match(r"python (\S+)", command):
            assert (ROOT / match[1]).is_file(), match[1]
        elif match := re.match(r"make ([\w-]+)", command):
            assert re.search(rf"^{match[1]}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE), match[1]


def test_outputs_are_compared():
    shown = "perplexity  16.184   18.8\n…\nlast … line\n91 tok/s, 3 files"
    good = "perplexity 16.19 18.81\na\nb\nlast odd line\n12.5 tok/s, 3 files\n"
    assert difference(shown, good) is None
    for old, new in (("16.19", "17.19"), ("perplexity", "Perplexity"), ("last", "lost"), ("3 files", "4 files")):
        assert difference(shown, good.replace(old, new))
    assert difference(shown, good + "more\n") and difference(shown, good.rpartition("12.5")[0])


def test_commands_are_parsed():
    one, two = shell.parse("A=b echo 'x | y' | gemkit chat demo --prompt \"…\" < in.txt > out.txt   # a # comment")
    assert (one.environment, one.words) == ({"A": "b"}, ["echo", "x | y"])
    assert (two.words[1:], two.source, two.target) == (["chat", "demo", "--prompt", "…"], "in.txt", "out.txt")
    for wrong in ("", "gemkit ls && gemkit rm x", "gemkit ls >"):
        with pytest.raises(AssertionError):
            shell.parse(wrong)
