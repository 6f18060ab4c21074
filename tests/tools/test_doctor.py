"""The doctor tells the truth, keeps secrets, and works where the core does not load. Budget: 15 s."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gemkit
from gemkit.arch.presets import preset
from gemkit.errors import GemkitError
from gemkit.hub.demo import demo_path
from gemkit.tools import doctor, memory


def test_the_report_is_json_and_complete():
    report = doctor.examine()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["gemkit"] == gemkit.__version__
    assert report["native"]["loads"] and report["native"]["path"] in report["native"]["compiled"]
    assert 0 < report["processor"]["threads"] <= report["processor"]["usable_cpus"]
    assert 0 < report["memory"]["available"] <= report["memory"]["total"]
    assert [row["name"] for row in report["models"]][:2] == ["gemma-3-270m", "gemma-3-1b-pt"]
    assert len(report["models"]) == 10
    assert all(problem["what"] and problem["remedy"] for problem in report["problems"])


def test_a_model_that_does_not_fit_is_a_problem_and_the_longest_context_is_said(monkeypatch):
    found = memory.fit(str(demo_path()), None, None)
    weights = found["weights"]
    config = preset("gemma-3-270m").config
    free = weights + found["screen"] + memory.ROOM + memory.cache_bytes(config, 5000)
    monkeypatch.setattr(doctor, "system_memory", lambda: (free, free))
    report = doctor.examine(str(demo_path()))
    assert report["model"]["fits"] is False and report["model"]["longest"] == 5000
    assert any("ctx-size" in problem["remedy"] for problem in report["problems"])
    assert memory.fit(str(demo_path()), weights, None)["longest"] == 0


def test_variables_show_no_secret():
    found = doctor.variables(
        {
            "HF_TOKEN": "hf_secret",
            "KAGGLE_KEY": "secret",
            "KAGGLE_API_TOKEN": "secret",
            "GEMKIT_API_KEY": "secret",
            "HF_SOMETHING": "secret",
            "HF_ENDPOINT": "https://me:secret@mirror.example/x",
            "HF_HOME": "models",
            "GEMKIT_ISA": "avx2",
            "PATH": "elsewhere",
        }
    )
    assert "secret" not in str(found)
    assert found["HF_TOKEN"] == found["KAGGLE_KEY"] == found["GEMKIT_API_KEY"] == "set"
    assert (found["HF_HOME"], found["GEMKIT_ISA"]) == ("models", "avx2") and "PATH" not in found
    assert found["HF_ENDPOINT"] == "https://…@mirror.example/x"


def test_measured_bandwidth_predicts_rates():
    report = doctor.examine(measure=lambda threads: 10.0 * threads)
    rate = report["models"][0]["types"]["bf16"]["rate"]
    assert rate == pytest.approx(report["bandwidth"] * 1e9 / (2 * report["models"][0]["parameters"]))
    assert doctor.examine()["bandwidth"] is None


def test_a_folder_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "here"))
    monkeypatch.setattr(doctor, "_is_writable", lambda folder: folder != tmp_path)
    report = doctor.examine()
    assert [row["writable"] for row in report["folders"] if row["name"] == "gemkit"] == [False]
    assert any("GEMKIT_CACHE" in problem["remedy"] for problem in report["problems"])


def test_frameworks_are_named_with_their_version():
    import torch

    versions = {row["name"]: row["version"] for row in doctor.examine()["frameworks"]}
    assert versions["torch"] == torch.__version__ and set(versions) == set(doctor.FRAMEWORKS)
    assert doctor._version("no-such-package-of-anyone") is None


def test_tokens_are_found_in_the_environment_and_a_broken_key_file_is_a_problem(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    problems = []
    assert doctor.tokens(problems) == {"Hugging Face": False, "Kaggle": False} and not problems
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    (tmp_path / "kaggle.json").write_text('{"username": "me", "key": "secret"}')
    assert doctor.tokens(problems) == {"Hugging Face": True, "Kaggle": True} and not problems
    (tmp_path / "kaggle.json").write_text("secret")
    assert not doctor.tokens(problems)["Kaggle"]
    assert "secret" not in str(problems) and len(problems) == 1


def test_what_keeps_downloads_from_working_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example")
    monkeypatch.setenv("HF_TOKEN", "hf_ä")
    monkeypatch.setenv("GEMKIT_CACHE_SIZE", "much")
    report = doctor.examine()
    found = [problem["what"] for problem in report["problems"]]
    for words in ("HF_ENDPOINT is 'mirror.example'", "(ALL_PROXY)", "HF_TOKEN holds", "GEMKIT_CACHE_SIZE is 'much'"):
        assert len([text for text in found if words in text]) == 1, (words, found)
    assert report["cache"] is None
    monkeypatch.setenv("GEMKIT_CACHE_SIZE", "5GB")
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "a.bin").write_bytes(bytes(100))
    assert doctor.examine()["cache"] == {"bytes": 100, "limit": 5 * 10**9}


@pytest.mark.parametrize(
    ("path", "forced", "why", "problem"),
    [
        ("avx512", None, "the fastest", None),
        ("avx2", None, "avx512 needs avx512_vnni", None),
        ("portable", None, "the processor lacks", "many times slower"),
        ("portable", "portable", "GEMKIT_ISA", "avx2 would run"),
    ],
)
def test_the_kernels_in_use_are_explained(path, forced, why, problem, monkeypatch):
    flags = {"avx512": ["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni"], "avx2": ["avx2", "fma", "f16c"]}
    instructions = flags.get(path, flags["avx2"] if forced else ["avx"])
    monkeypatch.setattr("gemkit.models.native.kernel_path", lambda: path)
    monkeypatch.setattr(doctor, "machine", lambda: "x86_64")
    monkeypatch.delenv("GEMKIT_ISA", raising=False)
    if forced:
        monkeypatch.setenv("GEMKIT_ISA", forced)
    problems = []
    report = doctor._native(problems, instructions)
    assert why in report["why"].replace("which ", "") and report["path"] == path
    assert [problem in p.what for p in problems] == ([True] if problem else [])


def test_quota_and_remedies():
    assert "newer system" in doctor.core_remedy("version `GLIBC_2.38' not found")
    assert "another processor" in doctor.core_remedy("invalid ELF header")
    assert "force-reinstall" in doctor.core_remedy("No module named 'gemkit._native'")


def test_no_such_model_is_one_line():
    with pytest.raises(GemkitError) as error:
        doctor.examine("no-such-model.gguf")
    assert "\n" not in str(error.value)


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "gemkit._native":
            raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.32' not found")
sys.meta_path.insert(0, Block())
import socket
def refuse(*arguments, **options): raise AssertionError("the network was used")
socket.socket.connect = refuse
from gemkit.cli import cli
from gemkit.cli.doctor import command
sys.exit(command.main(sys.argv[1:], standalone_mode=False))
"""


@pytest.mark.parametrize("flags", [[], ["--json", "--measure"]])
def test_it_works_without_the_core_and_the_network(flags):
    environment = {**os.environ, "HF_TOKEN": "hf_secret", "KAGGLE_KEY": "secret", "PYTHONUTF8": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(gemkit.__file__).parents[1]), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", BLOCKED, *flags], capture_output=True, text=True, env=environment, timeout=60
    )
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr and "secret" not in run.stdout + run.stderr
    assert "GLIBCXX_3.4.32" in run.stdout and "--force-reinstall" in run.stdout
    if flags:
        report = json.loads(run.stdout)
        assert report["native"]["loads"] is False and report["bandwidth"] is None
        assert len(report["problems"]) >= 2
    else:
        assert "remedy:" in run.stdout and "gemma-3-270m" in run.stdout and "HF_TOKEN" in run.stdout
