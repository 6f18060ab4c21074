"""benchmarks/quality/perplexity.py: what is measured once, kept and drawn; its worker on the demo. Budget: 15 s."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import gemkit

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

import perplexity


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Record the requests to the engines; no files are made."""
    asked = []

    def measure(engine: str, python: str, path: Path, threads: int, ids: list[int]) -> dict[str, float]:
        asked.append((engine, path.name, python == sys.executable, len(ids)))
        return {"prefill": 500.0, "decode": 50.0 + len(asked), "perplexity": 16.0 + len(asked), "bytes": 250_000_000}

    monkeypatch.setattr(perplexity, "measure", measure)
    monkeypatch.setattr(perplexity, "make", lambda model, name, folder: folder / f"{name}.gguf")
    monkeypatch.setattr(perplexity, "folders", lambda model, folder, python, engine: folder / engine)
    monkeypatch.setattr(perplexity, "installed", lambda python: ["llama.cpp", "ctranslate2"])
    return asked


def test_what_was_measured_is_kept_and_drawn(measured, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("One two three four five. " * 50, encoding="utf-8")
    base = ["--json", str(tmp_path / "q.json"), "--folder", str(tmp_path), "--tokens", "64"]
    ask = [*base, "--text", str(text), "--file", "q8_0", "q4_0"]
    assert perplexity.main(ask) == 0
    ours, theirs = ("gemkit", "q8_0.gguf", True, 64), ("llama.cpp", "q8_0.gguf", False, 64)
    assert measured[:2] == [ours, theirs] and measured[-1][:2] == ("ctranslate2", "ctranslate2") and len(measured) == 5
    assert "left out: transformers" in capsys.readouterr().out
    assert perplexity.main(ask) == 0 and len(measured) == 5
    assert perplexity.main([*ask[:-1], "--again", "--no-peers"]) == 0 and len(measured) == 6
    picture = tmp_path / "docs" / "quality.svg"
    assert perplexity.main([*base, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "| q8_0 | gemkit | 250 | 22.000 | 56.0 | 500 |" in out and out.count("| llama.cpp |") >= 2
    drawn = picture.read_text(encoding="utf-8")
    assert all(drawn.count(f">{name}<") == 4 for name in ("q8_0", "q4_0")) and drawn.count(">int8<") == 2
    assert 2_000 < len(drawn) < 200_000


def test_nothing_measured_or_too_little_text_is_said(measured, tmp_path):
    with pytest.raises(SystemExit, match="give --text"):
        perplexity.main(["--json", str(tmp_path / "none.json")])
    text = tmp_path / "short.txt"
    text.write_text("Short.", encoding="utf-8")
    with pytest.raises(SystemExit, match="only"):
        perplexity.main(["--json", str(tmp_path / "none.json"), "--text", str(text)])


def test_every_file_type_is_one_that_quantize_knows():
    from gemkit.tools.quantize import MIXES, TYPES

    for name, arguments in perplexity.FILES.items():
        assert set(arguments[1::2]) <= {*TYPES, *MIXES}, name


def test_the_worker_scores_in_windows(tmp_path):
    with gemkit.load("demo", threads=2) as model:
        ids = [int(token) for token in model.tokenizer.encode("All happy families are alike. " * 120)[:530]]
        parts = [model.score(part).logprobs for part in (ids[:512], [ids[0], *ids[512:]])]
    expected = math.exp(-sum(float(part.sum(dtype=float)) for part in parts) / 529)
    command = [
        sys.executable,
        str(perplexity.HERE / "worker.py"),
        "gemkit",
        str(perplexity.make("demo", perplexity.SOURCE, tmp_path)),
        "2",
    ]
    done = subprocess.run(command, input=json.dumps(ids), capture_output=True, text=True, check=True)
    record = json.loads(done.stdout)
    assert record["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert record["prefill"] > 1 and record["decode"] > 1
