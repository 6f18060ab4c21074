"""The shell's completion: verbs, options, values, models, files; without anything heavy. Budget: 10 s."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from gemkit.cli import VERBS, cli

GEMKIT = [sys.executable, "-m", "gemkit"]


def complete(*words: str) -> list[tuple[str, str]]:
    """(value, kind) of what may stand in place of the last word."""
    *before, incomplete = words
    found = ShellComplete(cli, {}, "gemkit", "_GEMKIT_COMPLETE").get_completions(before, incomplete)
    return [(item.value, item.type) for item in found]


def values(*words: str) -> list[str]:
    return [value for value, kind in complete(*words) if kind == "plain"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with models, and a cache with two downloads."""
    monkeypatch.chdir(tmp_path)
    hub = tmp_path / ".hub"
    for repo in ("models--google--gemma-9", "models--other--llama"):
        (hub / repo).mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    for name in ("my.gguf", "folder/config.json", "folder/inner.gguf", "other/readme.md", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def test_verbs_and_options():
    assert values("gen") == ["generate"] and values("ru") == ["run"]
    assert set(VERBS) <= set(values(""))
    assert values("chat", "demo", "--te") == ["--temp", "--temperature"]
    assert values("generate", "demo", "--backend", "j") == ["jax"]
    assert complete("generate", "demo", "--file", "x") == [("x", "file")]
    assert complete("generate", "demo", "--adapter-path", "x") == [("x", "file")]


@pytest.mark.parametrize("verb", ["generate", "chat", "score", "embed", "tokenize", "show", "bench", "check", "doctor"])
def test_models(here, verb):
    assert values(verb, "gemma-3-1b") == ["gemma-3-1b-pt", "gemma-3-1b-it"]
    assert values(verb, "de") == ["demo"]
    assert values(verb, "go") == ["google/gemma-9"]
    assert values(verb, "my") == ["my.gguf"] and values(verb, "fo") == ["folder"]
    assert values(verb, "folder/") == ["folder/inner.gguf"]
    assert complete(verb, "not") == [("not", "file")]
    assert complete(verb, "./") == [("./", "file")]
    assert not {"other", "notes.txt", ".hub", "other/llama"} & set(values(verb, ""))


def test_downloaded_and_published_names():
    assert "demo" in values("rm", "") and values("download", "codegemma-2b") == ["codegemma-2b"]


def test_models_are_found_without_heavy_imports():
    code = (
        "import sys; from click.shell_completion import ShellComplete; from gemkit.cli import cli\n"
        "ShellComplete(cli, {}, 'gemkit', '_X').get_completions(['generate'], 'g'); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"numpy", "sentencepiece", "huggingface_hub", "prompt_toolkit", "jinja2"} & set(done.stdout.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell):
    environment = {**os.environ, "_GEMKIT_COMPLETE": f"{shell}_source"}
    done = subprocess.run(GEMKIT, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and "_GEMKIT_COMPLETE" in done.stdout


def test_bash_completes_a_line(tmp_path):
    bash = shutil.which("bash")
    assert bash, "bash is not installed"
    program = tmp_path / "gemkit"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gemkit "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(_GEMKIT_COMPLETE=bash_source gemkit)"; COMP_WORDS=(gemkit generate gemma-3-1b-i); COMP_CWORD=2; '
        '_gemkit_completion gemkit; echo "${COMPREPLY[@]}"'
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [bash, "--norc", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=60
    )
    assert done.stdout == "gemma-3-1b-it\n", done.stderr
    assert Path(program).exists()
