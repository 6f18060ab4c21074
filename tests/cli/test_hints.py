"""Notes about the weights: which file a short name meant, and a faster type where one helps. Budget: 8 s."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine.vocabulary import vocabulary
from hub.world import World, server_fixture, world_fixture  # noqa: F401
from weights.files import tiny_config, tiny_params

import gemkit
import gemkit.cli
from gemkit.cli import hints
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.hf.write import write_hf
from gemkit.weights.quant import GGMLType

QAT, FILE = "google/gemma-3-1b-it-qat-q4_0-gguf", "gemma-3-1b-it-q4_0.gguf"


def checkpoint(body: GGMLType, head: GGMLType) -> Checkpoint:
    config = tiny_config("gemma3_text", head_dim=32, vocab_size=len(vocabulary()))
    kinds = lambda name: head if "embed" in name else body  # noqa: E731
    return Checkpoint.from_params(config, tiny_params(config), kinds, vocabulary(), name="Tiny")


def run(capsys: pytest.CaptureFixture, *args: object) -> tuple[str, str]:
    with pytest.raises(SystemExit) as exit_:
        gemkit.cli.main([str(arg) for arg in args])
    output = capsys.readouterr()
    assert not exit_.value.code, output.err
    return output.out, output.err


@pytest.fixture(name="folder")
def folder_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hints, "_LARGE", 1000)
    return write_hf(tmp_path / "folder", checkpoint(GGMLType.BF16, GGMLType.BF16))


def test_large_weights_in_16_bits_get_one_line(capsys, folder: Path):
    score = ("score", folder, "--text", "tatata")
    out, err = run(capsys, *score)
    assert err.count("\n") == 1 and "are in 16 bits: --dtype int8 takes half the memory" in err
    assert "about twice as fast" in err and out.startswith("perplexity")
    for more in (["--json"], ["--dtype", "int8"], ["--dtype", "bfloat16"], ["--activations", "float32"]):
        assert run(capsys, *score, *more)[1] == "", more
    generate = ("generate", folder, "--prompt", "ta", "--raw", "--max-tokens", "2")
    assert "--dtype int8" in run(capsys, *generate)[1] and run(capsys, *generate, "--json")[1] == ""


def test_small_or_quantised_weights_get_none(capsys, folder: Path, tmp_path, monkeypatch):
    quantised = write_gguf(tmp_path / "q.gguf", checkpoint(GGMLType.Q8_0, GGMLType.Q8_0))
    assert run(capsys, "score", quantised, "--text", "tatata")[1] == ""
    monkeypatch.setattr(hints, "_LARGE", 10**9)
    assert run(capsys, "score", folder, "--text", "tatata")[1] == ""


def test_float32_gains_more_and_a_short_name_has_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(hints, "_LARGE", 1000)
    model = SimpleNamespace(checkpoint=checkpoint(GGMLType.F32, GGMLType.F32))
    text = hints.faster("gemma-3-270m", model, {})
    assert "32 bits: --dtype int8 takes a quarter of the memory" in text and "download" not in text
    text = hints.faster("gemma-3-1b-it", model, {"dtype": "auto", "backend": "native"})
    assert "'gemkit download gemma-3-1b-it' fetches Google's 4-bit file" in text
    assert hints.faster("gemma-3-1b-it", model, {"backend": "torch"}) is None
    assert "download" not in hints.faster(str(tmp_path), model, {})


def test_show_says_which_file_a_short_name_is(capsys, world: World, tmp_path):
    snapshot = world.hf / f"models--{QAT.replace('/', '--')}" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    path = write_gguf(snapshot / FILE, checkpoint(GGMLType.Q4_0, GGMLType.F16))
    out, err = run(capsys, "show", "gemma-3-1b-it", "--offline")
    assert err == "" and f"{QAT}), its embedding used in Q8_0 instead of F16" in out
    assert "the original weights: google/gemma-3-1b-it, or gemma-3-1b-it with --dtype bfloat16" in out
    record = json.loads(run(capsys, "show", "gemma-3-1b-it", "--offline", "--json")[0])
    original = "google/gemma-3-1b-it"
    assert record["variant"] == {"repository": QAT, "original": original, "embedding": ["F16", "Q8_0"]}
    copy = tmp_path / FILE
    copy.write_bytes(path.read_bytes())
    assert json.loads(run(capsys, "show", copy, "--json")[0])["variant"] is None
