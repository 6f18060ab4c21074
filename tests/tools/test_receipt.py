"""Receipts: the same tokens again at any batch and thread count, a clear line for all else. Budget: 15 s."""

import json
from pathlib import Path

import pytest
from engine.vocabulary import vocabulary
from weights.files import tiny_config, tiny_params

from gemkit.cli import main
from gemkit.errors import GemkitError
from gemkit.tools import receipt
from gemkit.tools.convert import convert
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.quant import GGMLType

PROMPT = "the sea was calm and the boats lay in the harbour"
DRAWN = ["--temp", "1.4", "--top-k", "0", "--seed", "5"]
SETTINGS = {
    "greedy": ["--temp", "0"],
    "drawn": DRAWN,
    "a seed of chance": ["--temp", "1.4"],
    "penalties and bias": [*DRAWN, "--repetition-penalty", "1.3", "--frequency-penalty", "0.2", "--logit-bias", "7=2"],
    "float32": [*DRAWN, "--activations", "float32"],
    "int8 weights": [*DRAWN, "--dtype", "int8"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    config = tiny_config("gemma3_text", head_dim=32, vocab_size=len(vocabulary().pieces))
    tiny = Checkpoint.from_params(config, tiny_params(config), GGMLType.Q8_0, vocabulary())
    return write_gguf(tmp_path_factory.mktemp("receipt") / "tiny.gguf", tiny)


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    return stop.value.code


def generate(model: Path, file: Path, *options: str) -> int:
    return run("generate", model, "--prompt", PROMPT, "--max-tokens", 24, "--receipt", file, *options)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_the_tokens_come_again(model, tmp_path, options, capsys):
    file = tmp_path / "receipt.json"
    assert generate(model, file, *options) == 0
    text = capsys.readouterr().out
    record = receipt.read_receipt(file)
    assert len(record["ids"]) > 3
    for threads, batch in ((1, 1), (2, 4), (3, 9)):
        assert run("replay", file, "--threads", threads, "--batch", batch) == 0
        out, err = capsys.readouterr()
        assert out == text and f"the same {len(record['ids'])} tokens" in err


def test_json_and_another_place_of_the_weights(model, tmp_path, capsys):
    file, copy = tmp_path / "receipt.json", tmp_path / "copy.gguf"
    assert generate(model, file, "--json", *DRAWN) == 0
    ids = json.loads(capsys.readouterr().out)["ids"]
    copy.write_bytes(model.read_bytes())
    assert run("replay", file, "--model", copy, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] and found["ids"] == ids == receipt.read_receipt(file)["ids"]


def test_a_token_that_differs_is_named(model, tmp_path, capsys):
    file = tmp_path / "receipt.json"
    generate(model, file, *DRAWN)
    record = receipt.read_receipt(file)
    record["ids"][3] += 1
    file.write_text(json.dumps(record | {"sha256": receipt._checksum(record)}))
    assert run("replay", file) == 1
    assert f"token 4 of {len(record['ids'])} differs" in capsys.readouterr().err


def test_other_weights_are_refused(model, tmp_path):
    file = tmp_path / "receipt.json"
    generate(model, file, *DRAWN)
    data = bytearray(model.read_bytes())
    data[-40] ^= 1  # in the last tensor
    other = tmp_path / "other.gguf"
    other.write_bytes(data)
    with pytest.raises(GemkitError, match="has other weights than the receipt"):
        receipt.replay(receipt.read_receipt(file), model=other)


def test_folders_have_receipts_too(model, tmp_path):
    folder = convert(model, tmp_path / "folder", "hf", "bfloat16")
    assert generate(folder, tmp_path / "receipt.json", *DRAWN) == 0
    assert receipt.replay(receipt.read_receipt(tmp_path / "receipt.json"), batch=3).first_difference is None


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda text: text[: len(text) // 2], "is no receipt"),
        (lambda text: "[" * 100_000, "is no receipt"),
        (lambda text: "[]", "is no receipt of format 1"),
        (lambda text: text.replace('"seed": 5', '"seed": 6'), "was changed"),
        (lambda text: json.dumps({"format": 1, "sha256": receipt._checksum({"format": 1})}), "lacks fields"),
    ],
    ids=["cut", "deep", "not an object", "changed", "fields"],
)
def test_a_spoilt_receipt_is_refused_in_one_line(model, tmp_path, capsys, spoil, words):
    file = tmp_path / "receipt.json"
    generate(model, file, *DRAWN)
    file.write_text(spoil(file.read_text()))
    capsys.readouterr()
    assert run("replay", file) == 1
    out, err = capsys.readouterr()
    assert words in err and len(err.splitlines()) == 1 and not out


def test_other_backends_have_none(model, tmp_path, capsys):
    assert generate(model, tmp_path / "receipt.json", "--backend", "torch") == 2
    assert "--receipt is for the native backend" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(model, capsys):
    assert generate(model, model / "receipt.json", *DRAWN) == 2
    assert "is not a folder" in capsys.readouterr().err
