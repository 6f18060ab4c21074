"""Defaults: the command line, then GEMKIT_…, then the file; what the file may say; a model by default. Budget: 2 s."""

import json
import sys
from pathlib import Path

import click
import pytest

from gemkit.cli import VERBS, cli, config, main
from gemkit.cli.common import split_text
from gemkit.errors import UsageError


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes the configuration file."""
    path = tmp_path / "config.toml"
    path.write_text("", encoding="utf-8")
    monkeypatch.setenv("GEMKIT_CONFIG", str(path))
    for name in ("GEMKIT_MODEL", "GEMKIT_THREADS", "GEMKIT_TOP_K"):
        monkeypatch.delenv(name, raising=False)
    return lambda text: path.write_text(text, encoding="utf-8")


def params(*args: str) -> dict[str, object]:
    """The arguments that a verb is called with."""
    context = click.Context(cli, info_name="gemkit")
    command = cli.get_command(context, args[0])
    return command.make_context(args[0], list(args[1:]), context).params


def error(capsys: pytest.CaptureFixture, *args: str, code: int = 2) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    output = capsys.readouterr()
    assert (exit_.value.code, output.out, output.err.count("\n")) == (code, "", 1), output
    return output.err


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(file, monkeypatch):
    file("threads = 3\ntop_k = 7\ntemp = 0.5\n[generate]\ntop-k = 8\n")
    found = params("generate", "demo")
    assert (found["threads"], found["top_k"], found["temperature"]) == (3, 8, 0.5)
    assert params("chat", "demo")["top_k"] == 7
    assert params("score", "demo")["threads"] == 3
    assert params("run", "demo")["top_k"] == 8
    monkeypatch.setenv("GEMKIT_THREADS", "5")
    monkeypatch.setenv("GEMKIT_TOP_K", "9")
    found = params("generate", "demo", "-t", "6")
    assert (found["threads"], found["top_k"], found["temperature"]) == (6, 9, 0.5)


def test_nothing_else_has_such_defaults(file, monkeypatch):
    file('threads = 3\nmax-tokens = 9\ndtype = "int8"\nmodel = "demo"\n')
    monkeypatch.setenv("GEMKIT_DTYPE", "int8")
    monkeypatch.setenv("GEMKIT_MAX_TOKENS", "9")
    assert params("convert", "demo", "x", "--to", "hf")["dtype"] == "auto"
    assert params("bench", "demo")["max_tokens"] == 64
    assert params("doctor")["model"] is None
    for verb in VERBS:
        command = cli.get_command(click.Context(cli), verb)
        names = [param.name for param in command.params]
        assert set(config.SETTABLE.get(verb, ())) & set(names) == {
            param.name for param in command.params if (param.envvar or "").startswith("GEMKIT_")
        } | {param.name for param in command.params if param.name == "stop"}


def test_kinds_of_values(file):
    file('stop = "x"\nraw = true\nsystem-prompt = "Be brief."\n')
    found = params("generate", "demo")
    assert (found["stop"], found["raw"], found["system_prompt"]) == (("x",), True, "Be brief.")
    file('stop = ["x", "y"]\n')
    assert params("generate", "demo")["stop"] == ("x", "y")
    assert params("generate", "demo", "--stop", "z")["stop"] == ("z",)


def test_a_flag_of_the_file_can_be_taken_back(file, monkeypatch):
    file("[chat]\nno-history = true\n")
    assert params("chat", "demo")["no_history"] is True
    monkeypatch.setenv("GEMKIT_NO_HISTORY", "0")
    assert params("chat", "demo")["no_history"] is False
    monkeypatch.setenv("GEMKIT_NO_HISTORY", "1")
    file("")
    assert params("chat", "demo")["no_history"] is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tmep = 3", "there is no key 'tmep'; did you mean 'temp'?"),
        ("xyzzy = 3", "there is no key 'xyzzy'; choose from "),
        ("prompt = 'x'", "there is no key 'prompt'; "),
        ("[chta]", "there is no table 'chta'; did you mean 'chat'?"),
        ("[convert]\ndtype = 'int8'", "there is no table 'convert'; choose from generate, "),
        ("[generate]\nreps = 3", "there is no key in [generate] 'reps'"),
        ("temp = 'hot'", "temp: 'hot' is not a valid float"),
        ("threads = 0", "threads: 0 is not in the range"),
        ("threads = true", "threads is True; give a text or a number"),
        ("threads = [1]", "threads is [1]; give a text or a number"),
        ("threads = 1.5", "threads is 1.5; give a whole number"),
        ("seed = nan", "seed is nan; give a whole number"),
        ("threads = 'many'", "threads: 'many' is not a valid integer."),
        ("raw = 1", "raw is 1; give true or false"),
        ("stop = 3", "stop is 3; give a text or a list of texts"),
        ("dtype = 'int9'", "dtype: 'int9' is not one of 'auto', "),
        ("model = 3", "model is 3; give the name of a model"),
        ("threads", "is not TOML"),
    ],
)
def test_what_is_wrong_with_the_file_is_one_line(file, capsys, text, words):
    file(text)
    found = error(capsys, "generate", "nowhere.gguf", "-p", "x")
    assert "config.toml" in found and words in found, found


@pytest.mark.parametrize("name", ["GEMKIT_TOP_K", "GEMKIT_THREADS"])
def test_a_wrong_variable_is_named(file, capsys, monkeypatch, name):
    monkeypatch.setenv(name, "many")
    found = error(capsys, "generate", "demo", "-p", "x")
    assert f"'many' is not a valid integer. It was set by {name}." in found


def test_a_folder_is_no_configuration_file(file, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GEMKIT_CONFIG", str(tmp_path))
    found = error(capsys, "generate", "demo", "-p", "x")
    assert f"{tmp_path}, which GEMKIT_CONFIG names, is a folder" in found


def test_a_default_gives_way_to_the_call(file, capsys, monkeypatch):
    file('system-prompt = "Be brief."\n')
    args = ["generate", "demo", "One, two,", "-n", "1", "--temp", "0", "--json"]

    def tokens(*more: str) -> int:
        with pytest.raises(SystemExit) as exit_:
            main([*args, *more])
        output = capsys.readouterr()
        assert not exit_.value.code, output.err
        return json.loads(output.out)["usage"]["prompt_tokens"]

    assert tokens() == tokens("--raw") == tokens("--special") == 5  # the demo is pretrained
    file("raw = true\n")
    assert "needs an instruction-tuned model" in error(capsys, *args, "--system-prompt", "x")
    assert "CodeGemma" in error(capsys, *args, "--suffix", "x", code=1)


def test_a_file_that_is_named_must_be_there(file, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GEMKIT_CONFIG", str(tmp_path / "nowhere.toml"))
    assert "which GEMKIT_CONFIG names" in error(capsys, "generate", "demo", "-p", "x")
    monkeypatch.delenv("GEMKIT_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nowhere"))
    assert params("generate", "demo")["threads"] is None


def test_the_help_and_other_verbs_work_with_a_wrong_file(file, capsys):
    file("tmep = 3")
    for args in (["--help"], ["ls", "-h"], ["generate", "-h"], ["--version"]):
        with pytest.raises(SystemExit) as exit_:
            main(args)
        assert not exit_.value.code and capsys.readouterr().out


def test_the_model_by_default(file, capsys, monkeypatch):
    found = error(capsys, "chat")
    assert "'gemkit chat gemma-3-1b-it'" in found and "GEMKIT_MODEL" in found and "config.toml" in found
    assert "MODEL is missing" in error(capsys, "generate", "-p", "x")
    file('model = "one"\n[chat]\nmodel = "two"\n')
    assert params("generate", "-p", "x")["model"] == "one"
    assert params("chat")["model"] == "two"
    assert params("score", "three")["model"] == "three"
    monkeypatch.setenv("GEMKIT_MODEL", "four")
    assert params("chat")["model"] == "four"
    assert params("chat", "five")["model"] == "five"


@pytest.mark.parametrize(
    ("args", "alone", "model", "words"),
    [
        (["demo", "Hello"], False, "demo", ("Hello",)),
        (["demo"], True, "demo", ()),
        (["Tell me a story"], False, "one", ("Tell me a story",)),
        (["Tell me\na story", "or two"], False, "one", ("Tell me\na story", "or two")),
        (["Hello"], True, "one", ("Hello",)),
        (["Hello"], False, "Hello", ()),
        (["gemma-3-1b-ti"], True, "gemma-3-1b-ti", ()),
        (["hf:org/name"], True, "hf:org/name", ()),
        (["my.gguf"], True, "my.gguf", ()),
        (["./folder"], True, "./folder", ()),
    ],
)
def test_a_first_argument_that_is_a_text(file, tmp_path, args, alone, model, words):
    def split() -> tuple[str, tuple[str, ...]]:
        context = cli.get_command(click.Context(cli), "generate").make_context("generate", list(args))
        return split_text(context, args[0], tuple(args[1:]), alone)

    if args == ["Tell me a story"]:
        with pytest.raises(UsageError, match="MODEL is missing"):
            split()
    else:
        assert split() == (args[0], tuple(args[1:]))
    file('model = "one"')
    assert split() == (model, words)


def test_a_path_with_spaces_is_a_model(file, tmp_path):
    file('model = "one"')
    path = tmp_path / "my model.gguf"
    path.write_bytes(b"")
    context = cli.get_command(click.Context(cli), "generate").make_context("generate", [str(path)])
    assert split_text(context, str(path), (), True) == (str(path), ())


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("GEMKIT_CONFIG", "")
    assert config.path() is None and config.shown_path() == "the configuration file"
    monkeypatch.delenv("GEMKIT_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config.path() == tmp_path / "gemkit" / "config.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    if sys.platform != "win32":
        assert config.path() == Path.home() / ".config" / "gemkit" / "config.toml"
        assert config.shown_path() == "~/.config/gemkit/config.toml"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("APPDATA", str(tmp_path))
    assert config.path() == tmp_path / "gemkit" / "config.toml"


def test_the_file_costs_nothing_where_there_is_none(file, monkeypatch):
    monkeypatch.setenv("GEMKIT_CONFIG", "")
    code = "import sys, gemkit.cli.generate as g; g.command.make_context('generate', ['demo']); print(*sys.modules)"
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"tomllib", "difflib", "json.tool", "gemkit.cli.chat", "numpy"} & set(done.stdout.split())
