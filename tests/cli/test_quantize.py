"""gemkit quantize as typed: its report, its JSON, its progress line and its refusals. Budget: 15 s."""

import json
import re

import numpy as np
import pytest
from engine.vocabulary import vocabulary
from weights.files import tiny_config, tiny_params

from gemkit.cli import main
from gemkit.cli.quantize import Line, _remedy
from gemkit.errors import GemkitError
from gemkit.tools.sample import TEXT
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.hf.write import write_hf
from gemkit.weights.open import open_checkpoint
from gemkit.weights.quant import GGMLType

WORDS = "the sea was calm and the boats lay in the harbour " * 2


@pytest.fixture
def checkpoint() -> Checkpoint:
    config = tiny_config("gemma3_text", hidden_size=64, head_dim=32, vocab_size=len(vocabulary().pieces))
    params = {name: value * 0.1 for name, value in tiny_params(config).items()}
    return Checkpoint.from_params(config, params, GGMLType.BF16, vocabulary(), name="Tiny")


@pytest.fixture
def start(tmp_path, checkpoint):
    return write_gguf(tmp_path / "start.gguf", checkpoint)


def run(capsys, *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["quantize", *map(str, args)])
    output = capsys.readouterr()
    return exit_.value.code or 0, output.out, output.err


def test_the_report(tmp_path, capsys, start):
    text = tmp_path / "text.txt"
    text.write_text(WORDS, encoding="utf-8")
    target = tmp_path / "end.gguf"
    code, out, err = run(capsys, start, target, "--type", "Q4_0", "--text-file", text)
    assert (code, err) == (0, "") and out.startswith(f"{target}\n")
    assert re.search(r"^weights +0\.\d MB +0\.\d MB +-\d\d\.\d %$", out, re.M)
    assert re.search(r"^perplexity +[\d.,]+ +[\d.,]+ +[+-][\d.]+ %$", out, re.M)
    assert re.search(r"^divergence, nats a token +0\.\d+$", out, re.M)
    assert re.search(r"^top-1 agreement +[\d.]+ %$", out, re.M)
    assert len(re.findall(r"^model\.layers\.\d\.\S+weight +\d+\.\d %$", out, re.M)) == 5
    assert "fewer than 1,000 tokens" in out
    with open_checkpoint(target) as end:
        assert end.tensors["model.layers.0.mlp.up_proj.weight"].type == GGMLType.Q4_0


def test_json_is_one_object_with_all_figures(tmp_path, capsys, checkpoint):
    """From a Hugging Face folder."""
    folder = write_hf(tmp_path / "folder", checkpoint)
    target = tmp_path / "end.gguf"
    code, out, err = run(capsys, folder, target, "--type", "q5_k_m", "--json")
    record = json.loads(out)
    assert (code, err) == (0, "") and out.count("\n") == 1
    assert record["path"] == str(target) and record["bytes"] == target.stat().st_size and record["type"] == "q5_k_m"
    assert record["parameters"] == checkpoint.config.parameter_count()
    assert record["types"]["Q8_0"] >= 1 and max(record["errors"].values()) == next(iter(record["errors"].values()))
    damage = record["damage"]
    assert damage["rise"] == damage["perplexity"][1] / damage["perplexity"][0] - 1
    assert damage["tokens"] == 128 and damage["kl"] > 0 and 0 <= damage["agreement"] <= 1
    assert damage["weight_bytes"][1] < damage["weight_bytes"][0]


def test_a_large_rise_is_said_with_its_remedy(tmp_path, capsys, start, monkeypatch):
    monkeypatch.setattr("gemkit.tools.quantize.MUCH", -1.0)
    code, out, _ = run(capsys, start, tmp_path / "end.gguf", "--type", "q4_0")
    assert code == 0 and re.search(r"Perplexity rises by .* --type q4_k_m, or q5_k_m\.$", out, re.M)
    code, out, err = run(capsys, start, tmp_path / "2.gguf", "--type", "q8_0", "--embedding-type", "Q4_0")
    assert code == 0 and "Leave --embedding-type out" in out
    assert err.count("\n") == 1 and "below 8 bits" in err
    assert _remedy("q8_0", None) == "Keep the source." and _remedy("q6_k", "q8_0").endswith("--type q8_0.")


def test_without_measuring_nothing_is_run(tmp_path, capsys, start, monkeypatch):
    monkeypatch.setattr("gemkit.tools.quantize.measure", None)
    code, out, err = run(capsys, start, tmp_path / "end.gguf", "--type", "q8_0", "--no-measure")
    assert (code, err) == (0, "") and "perplexity" not in out and "tensors that lost most" in out
    code, out, _ = run(capsys, start, tmp_path / "2.gguf", "--type", "q8_0", "--no-measure", "--json")
    assert code == 0 and "damage" not in json.loads(out)


def test_bad_requests_are_one_line(tmp_path, capsys, start, checkpoint):
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xc3(")
    target = tmp_path / "end.gguf"
    silent = Checkpoint(checkpoint.config, checkpoint.tensors)
    mute = write_gguf(tmp_path / "mute.gguf", silent)

    def refused(code: int, message: str, *args: object) -> None:
        found, out, err = run(capsys, *args)
        assert (found, out, err.count("\n")) == (code, "", 1) and message in err, err
        assert not target.exists()

    refused(2, "'q3_k' is not one of", start, target, "--type", "q3_k")
    refused(2, "Missing option '--type'", start, target)
    refused(2, "not UTF-8", start, target, "--type", "q4_0", "--text-file", text)
    text.write_bytes(b" \n")
    refused(2, "is empty", start, target, "--type", "q4_0", "--text-file", text)
    refused(2, "--no-measure", start, target, "--type", "q4_0", "--text-file", text, "--no-measure")
    refused(1, "exists", start, start, "--type", "q4_0")
    refused(1, "there is no file", tmp_path / "none.gguf", target, "--type", "q4_0")
    target = tmp_path / "mute-end.gguf"
    code, out, err = run(capsys, mute, target, "--type", "q4_0")
    assert code == 1 and not out and err.count("\n") == 1 and "has no tokenizer" in err and "--no-measure" in err
    assert not target.exists()


def test_an_interruption_is_130_and_leaves_nothing(tmp_path, capsys, start, monkeypatch):
    def stop(*_: object) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr("gemkit.tools.quantize.search", stop)
    code, out, err = run(capsys, start, tmp_path / "end.gguf", "--type", "q4_0")
    assert (code, out) == (130, "") and err == f"gemkit: interrupted; nothing is left of {tmp_path / 'end.gguf'}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["start.gguf"]


def test_a_measurement_that_fails_leaves_no_file_unless_memory_is_short(tmp_path, capsys, start, monkeypatch):
    target = tmp_path / "end.gguf"

    def fails(error: BaseException):
        def measure(*_: object) -> None:
            raise error

        monkeypatch.setattr("gemkit.tools.quantize.measure", measure)
        return run(capsys, start, target, "--type", "q8_0")

    code, out, err = fails(GemkitError("the logits are not finite"))
    assert (code, out) == (1, "") and err == (
        f"gemkit: {target} is not kept, since it could not be measured: the logits are not finite\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["start.gguf"]
    for error in (GemkitError("not enough memory for weights (9.00 GB)"), MemoryError()):
        code, out, err = fails(error)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert f"{target} is complete, but its damage was not measured: not enough memory" in err
        open_checkpoint(target).close()
        target.unlink()
    code, out, err = fails(KeyboardInterrupt())
    assert (code, out) == (130, "")
    assert err == f"gemkit: interrupted; {target} is complete, but its damage was not measured\n"
    open_checkpoint(target).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["end.gguf", "start.gguf"]


def test_the_line_of_progress(capsys, monkeypatch):
    """Nothing in the first second; then share, rate and time left; cleared at the end."""
    now = [100.0]
    monkeypatch.setattr("gemkit.cli.quantize.time.monotonic", lambda: now[0])
    monkeypatch.setattr("gemkit.cli.quantize.shutil.get_terminal_size", lambda: type("Size", (), {"columns": 80})())
    with Line("quantizing", "M numbers", 1e6, True) as line:
        line.show(1_000_000, 300_000_000)
        assert capsys.readouterr().err == ""
        now[0] = 102.0
        line.show(40_000_000, 300_000_000)
        assert capsys.readouterr().err == "\rquantizing: 13 %, 20 M numbers/s, 0:13 left"
        line.show(41_000_000, 300_000_000)
    assert re.fullmatch(r"\r {40,50}\r", capsys.readouterr().err)
    with Line("quantizing", "M numbers", 1e6, False) as line:
        now[0] = 200.0
        line.show(1, 2)
    assert capsys.readouterr().err == ""


def test_the_text_has_all_kinds():
    assert len(TEXT) > 5000 and "def " in TEXT and "| " in TEXT
    assert "の" in TEXT and "é" in TEXT and "ä" in TEXT and '"' in TEXT
