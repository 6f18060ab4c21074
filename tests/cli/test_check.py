"""`gemkit check` and `gemkit doctor`: exit codes, text and JSON. Budget: 10 s."""

import json
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from gemkit.errors import UsageError
from gemkit.hub.demo import demo_path
from gemkit.tools import check as package
from gemkit.tools.check import Finding


def command(verb: str) -> click.Command:
    return import_module(f"gemkit.cli.{verb}").command


def run(verb: str, *args: str):
    return CliRunner().invoke(command(verb), list(args), standalone_mode=True)


def finding(rule: str, level: str, where: str = "config.json") -> Finding:
    return Finding(rule, level, "It is wrong.", where, "found", "it hurts", "mend it")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Enough of a model to have an error and a warning: no weights, no terms."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma"}))
    return tmp_path


def test_a_clean_model_exits_with_0_and_what_was_looked_at():
    result = run("check", str(demo_path()))
    assert result.exit_code == 0 and result.output.endswith("\n0 errors, 0 warnings\n")
    text = " ".join(result.output.split())
    assert "GGUF file, gemma3_text, sizes of gemma-3-270m, 236 tensors sampled, 262,144 pieces" in text


def test_errors_exit_with_1_and_are_followed_by_their_remedy(folder):
    result = run("check", str(folder))
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert "error" in lines[-1] and lines[-1].startswith(tuple("123456789"))
    at = lines.index("error weights-missing: A folder has a configuration and no weights.")
    assert [line[:6] for line in lines[at + 1 : at + 4]] == ["  at  ", "  why ", "  fix "]
    levels = [line.split()[0] for line in lines if line.startswith(("error ", "warning ", "note "))]
    assert levels == sorted(levels) and {"error", "warning"} <= set(levels)


def test_json_has_the_same(folder):
    record = json.loads(run("check", str(folder), "--json").output)
    assert record["errors"] == sum(f["level"] == "error" for f in record["findings"]) > 0
    assert set(record["findings"][0]) == {"rule", "level", "what", "where", "found", "why", "remedy"}
    assert record["deep"] is False and record["scope"]["tensors"] == 0


def test_strict_fails_on_warnings(folder, monkeypatch):
    found = [finding("a", "warning"), finding("a", "warning", "x"), finding("b", "note")]
    monkeypatch.setattr(package, "judge", lambda subject: found)
    result = run("check", str(folder))
    assert result.exit_code == 0 and result.output.endswith("0 errors, 2 warnings, 1 note\n")
    assert result.output.count("  fix ") == 2
    assert run("check", str(folder), "--strict").exit_code == 1


def test_deep_is_passed_on(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(package, "read", lambda path, deep: asked.append(deep) or package.Subject(path, "hf"))
    run("check", str(folder), "--deep")
    run("check", str(folder))
    assert asked == [True, False]


def test_findings_fit_in_80_columns(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("check", str(folder)).output.splitlines()
    assert max(len(line) for line in lines if str(folder) not in line) <= 80


def test_hostile_input_is_one_finding_or_one_line(tmp_path):
    cut, text, listed = (tmp_path / name for name in ("cut.gguf", "text.gguf", "listed"))
    cut.write_bytes(Path(demo_path()).read_bytes()[:3_000_000])
    text.write_text("This is no model. " * 100)
    listed.mkdir()
    (listed / "config.json").write_text("[1]")
    for path, words in ((cut, "end of the file"), (text, "GGUF"), (listed, "a list, not an object")):
        result = run("check", str(path), "--json")
        (only,) = json.loads(result.output)["findings"]
        assert result.exit_code == 1 and only["rule"] == "unreadable" and words in only["found"], only
    for name in ("empty", "adapter", "bare"):
        (tmp_path / name).mkdir()
    for name in ("adapter/adapter_model.safetensors", "bare/model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    for name in ("empty", "adapter", "bare", "no-such.gguf", "no/such/folder"):
        result = run("check", str(tmp_path / name))
        assert isinstance(result.exception, UsageError) and "\n" not in str(result.exception)


def test_doctor_prints_tables_and_json(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = run("doctor")
    assert result.exit_code == 0 and "hf_secret" not in result.output
    assert "Hugging Face token  there" in result.output and "torch" in result.output
    for word in ("processor", "kernels", "huge pages", "gemma-3-27b-pt", "writable", "HF_TOKEN"):
        assert word in result.output
    report = json.loads(run("doctor", str(demo_path()), "--json").output)
    assert report["model"]["weights"] > 2e8 and report["variables"]["HF_TOKEN"] == "set"
    assert report["tokens"]["Hugging Face"] is True and report["native"]["why"]
    assert "cache of 32,768 tokens" in run("doctor", str(demo_path())).output
