"""gemkit merge as typed: its reports, its JSON and its refusals; what fails leaves nothing. Budget: 15 s."""

import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
from engine.vocabulary import vocabulary
from weights.adapters import trained_parts
from weights.files import tiny_config, tiny_params

from gemkit.cli import main
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.hf.write import write_hf
from gemkit.weights.lora import LoraConfig
from gemkit.weights.open import open_checkpoint
from gemkit.weights.peft.write import write_peft
from gemkit.weights.quant import GGMLType


@pytest.fixture
def place(tmp_path) -> Path:
    """A model as a folder and in blocks, an adapter for it and one for another model."""
    config = tiny_config("gemma", hidden_size=64, head_dim=32, vocab_size=len(vocabulary().pieces))
    params = {name: value * 0.2 for name, value in tiny_params(config).items()}
    write_hf(tmp_path / "model", Checkpoint.from_params(config, params, GGMLType.BF16, vocabulary(), name="Tiny"))
    write_gguf(tmp_path / "q8.gguf", Checkpoint.from_params(config, params, GGMLType.Q8_0, vocabulary(), name="Tiny"))
    for name, shape in (("lora", config), ("foreign", tiny_config("gemma", hidden_size=96, head_dim=32))):
        settings = LoraConfig(2, 4, targets=("q_proj", "up_proj"))
        write_peft(tmp_path / name, settings, trained_parts(settings, shape, {}))
    return tmp_path


@pytest.fixture
def run(capsys, place):
    before = sorted(path.name for path in place.iterdir())

    def run(*args: object, verb: str = "merge") -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main([verb, *map(str, args)])
        output = capsys.readouterr()
        code = exit_.value.code or 0
        assert code == 0 or sorted(path.name for path in place.iterdir()) == before
        return code, output.out, output.err

    return run


def test_a_folder(run, place):
    layers = tiny_config("gemma").num_hidden_layers
    code, out, err = run(place / "model", place / "lora", place / "end")
    assert (code, out, err) == (0, f"{place / 'end'}\nmatrices merged: {2 * layers}\n", "")
    with open_checkpoint(place / "end") as end, open_checkpoint(place / "model") as start:
        changed = {
            name for name, tensor in end.tensors.items() if not np.array_equal(tensor.data, start.tensors[name].data)
        }
        assert {name.split(".")[-2] for name in changed} == {"q_proj", "up_proj"} and len(changed) == 2 * layers
        assert {tensor.type for tensor in end.tensors.values() if len(tensor.shape) > 1} == {GGMLType.BF16}
    code, out, err = run(
        place / "q8.gguf", place / "lora", place / "lora", place / "two", "--dtype", "float32", "--json", verb="fuse"
    )
    record = json.loads(out)
    assert (code, err) == (0, "") and record["path"] == str(place / "two") and record["format"] == "hf"
    assert record["adapters"] == [str(place / "lora")] * 2 and record["merged"] == 2 * layers


def test_blocks_with_what_they_cost(run, place):
    text = place / "q8.txt"
    text.write_text("the sea was calm and the boats lay in the harbour " * 2, encoding="utf-8")
    code, out, err = run(
        place / "q8.gguf", place / "lora", place / "end.gguf", "--requantize", "Q4_0", "--text-file", text
    )
    assert code == 0 and err.count("\n") == 1 and "quantised already" in err  # what the adapter left alone
    assert re.search(r"^0\.\d MB; matrices merged: \d+$", out, re.M)
    assert re.search(r"^on \d+ tokens +merged +requantized +change$", out, re.M)
    assert re.search(r"^perplexity +[\d.,]+ +[\d.,]+ +[+-][\d.]+ %$", out, re.M)
    with open_checkpoint(place / "end.gguf") as end:
        assert end.tensors["model.layers.0.mlp.up_proj.weight"].type == GGMLType.Q4_0
    code, out, err = run(place / "q8.gguf", place / "lora", place / "2.gguf", "--requantize", "q8_0", "--json")
    record = json.loads(out)
    assert (code, err) == (0, "") and record["merged"] == 4 and record["damage"]["tokens"] == 128
    assert record["damage"]["rise"] != 0 and record["types"]["Q8_0"] > 4 and len(record["errors"]) == 4
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_bad_requests_are_one_line(run, place):
    model, lora, end = place / "model", place / "lora", place / "end"

    def refused(code: int, message: str, *args: object) -> None:
        found, out, err = run(*args)
        assert (found, out, err.count("\n")) == (code, "", 1) and message in err, err

    refused(2, "--requantize TYPE, such as q8_0", model, lora, place / "end.gguf")
    refused(2, "let the target end in .gguf", model, lora, end, "--requantize", "q8_0")
    refused(2, "leave one out", model, lora, place / "x.gguf", "--requantize", "q8_0", "--dtype", "float32")
    refused(2, "give that too", model, lora, end, "--text-file", lora / "NOTICE")
    refused(2, "Missing argument", model, end)
    refused(2, "does not exist: make it first", model, lora, place / "absent" / "end")
    refused(1, "is quantised (Q8_0)", place / "q8.gguf", lora, end)
    refused(1, "exists: give another name", model, lora, lora)
    refused(1, "holds a model (config.json), not an adapter", model, model, end)
    refused(1, "the adapter", model, place / "none", end)
    for more in ((end,), (place / "end.gguf", "--requantize", "q8_0")):
        refused(
            1, "this model has [128, 64]: load it with the model it was trained on", model, place / "foreign", *more
        )


@pytest.mark.parametrize("more", [["end"], ["end.gguf", "--requantize", "q8_0"]])
def test_a_full_disk_is_one_line_and_leaves_nothing(run, place, monkeypatch, more):
    """A limit of the system on the size of files ends each write as a full disk does."""
    monkeypatch.chdir(place)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        code, out, err = run("model", "lora", *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith(f"gemkit: {more[0]} cannot be written"), err


@pytest.mark.parametrize("more", [["end"], ["end.gguf", "--requantize", "q8_0"]])
def test_an_interruption_is_130_and_leaves_nothing(run, place, monkeypatch, more):
    def stop(*_: object) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.chdir(place)
    monkeypatch.setattr("gemkit.weights.lora.merge", stop)
    code, out, err = run("model", "lora", *more)
    assert (code, out, err) == (130, "", f"gemkit: interrupted; nothing is left of {more[0]}\n")
