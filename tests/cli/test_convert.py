"""gemkit convert as typed: to and from Google's own checkpoints; what fails leaves nothing. Budget: 20 s."""

import dataclasses
import json
import resource
import sys

import pytest
from engine.vocabulary import vocabulary
from weights.files import tiny_config, tiny_params

from gemkit.cli import main
from gemkit.errors import GemkitError
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.quant import GGMLType


@pytest.fixture
def start(tmp_path):
    config = tiny_config("gemma", head_dim=32, vocab_size=len(vocabulary().pieces))
    checkpoint = Checkpoint.from_params(config, tiny_params(config), GGMLType.Q8_0, vocabulary(), name="Tiny")
    return write_gguf(tmp_path / "start.gguf", checkpoint)


def run(capsys, *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["convert", *map(str, args)])
    output = capsys.readouterr()
    return exit_.value.code or 0, output.out, output.err


def test_to_flax_and_back_with_proof(tmp_path, capsys, start):
    code, out, err = run(capsys, start, tmp_path / "flax", "--to", "orbax", "--verify", "--json")
    record = json.loads(out)
    assert code == 0 and err == "" and record["format"] == "orbax"
    assert record["verify"]["tensor"] is None and record["verify"]["logits"] == 0 and record["verify"]["same_ids"]
    code, out, err = run(
        capsys, tmp_path / "flax", tmp_path / "back.gguf", "--to", "gguf", "--dtype", "int8", "--verify"
    )
    assert code == 0 and "first tensor that differs" in out, (out, err)


def test_no_folder_is_made_unasked(tmp_path, capsys, start):
    for target in ("gguf", "hf", "orbax"):
        code, out, err = run(capsys, start, tmp_path / "absent" / "x", "--to", target)
        assert code == 2 and out == "" and "does not exist: make it first" in err
    assert not (tmp_path / "absent").exists()


def test_bad_requests_are_one_line(tmp_path, capsys, start, monkeypatch):
    code, out, err = run(capsys, start, tmp_path / "flax", "--to", "orbax", "--dtype", "float16")
    assert code == 2 and "float32 or bfloat16" in err and err.count("\n") == 1 and not out
    (tmp_path / "bad.ckpt").write_bytes(b"PK\x03\x04 and no more")
    code, out, err = run(capsys, tmp_path / "bad.ckpt", tmp_path / "x", "--to", "hf")
    assert code == 1 and "no whole zip archive" in err and err.count("\n") == 1 and not out
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    code, out, err = run(capsys, start, tmp_path / "flax", "--to", "orbax")
    assert code == 1 and "orbax-checkpoint: pip install" in err and err.count("\n") == 1 and not out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.ckpt", "start.gguf"]


@pytest.mark.parametrize("to", ["hf", "gguf", "orbax"])
def test_a_failed_proof_leaves_nothing(tmp_path, capsys, start, monkeypatch, to):
    """Other ids, other numbers, or an error while comparing."""
    from gemkit.tools import convert

    target, verify = tmp_path / "end", convert.verify

    def changed(**changes):
        return lambda *args: dataclasses.replace(verify(*args), **changes)

    def broken(*_):
        raise GemkitError("not enough memory for the model")

    for replacement, message in (
        (changed(same_ids=False), "its tokenizer gives other ids"),
        (changed(tensor=("model.norm.weight", 0.5)), "model.norm.weight differs"),
        (broken, "could not be compared: not enough memory"),
    ):
        monkeypatch.setattr(convert, "verify", replacement)
        code, out, err = run(capsys, start, target, "--to", to, "--verify")
        assert code == 1 and err.startswith(f"gemkit: {target} is not kept") and message in err and err.count("\n") == 1
        assert ("tokens compared" in out) == (replacement is not broken)
        assert [path.name for path in tmp_path.iterdir()] == ["start.gguf"]
    monkeypatch.setattr(convert, "verify", changed(same_ids=False))
    code, out, err = run(capsys, start, target, "--to", to, "--verify", "--json")
    assert code == 1 and json.loads(out)["path"] is None and not json.loads(out)["verify"]["same_ids"]
    # What was to be rounded may differ
    monkeypatch.setattr(convert, "verify", changed(tensor=("model.norm.weight", 0.5)))
    assert run(capsys, start, target, "--to", to, "--verify", "--dtype", "bfloat16")[0] == 0 and target.exists()


@pytest.mark.parametrize("to", ["hf", "gguf", "orbax"])
def test_what_cannot_be_read_back_is_not_kept(tmp_path, capsys, start, monkeypatch, to):
    target = tmp_path / "end"

    def broken(data):
        raise GemkitError("the vocabulary is broken")

    monkeypatch.setattr("gemkit.text.spm_proto._check", broken)
    code, out, err = run(capsys, start, target, "--to", to)
    assert (code, out) == (1, "") and "the vocabulary is broken" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["start.gguf"]


@pytest.mark.parametrize("to", ["hf", "gguf", "orbax"])
def test_an_interruption_says_that_nothing_is_left(tmp_path, capsys, start, monkeypatch, to):
    def stop(*_):
        raise KeyboardInterrupt

    target = tmp_path / "end"
    for where in ("gemkit.tools.convert.verify", "gemkit.weights.checkpoint.dequantise"):
        with monkeypatch.context() as patch:
            patch.setattr(where, stop)
            if to == "gguf":
                patch.setattr("gemkit.weights.gguf.write._stored", stop)
            code, out, err = run(capsys, start, target, "--to", to, "--verify")
        assert (code, out, err) == (130, "", f"gemkit: interrupted; nothing is left of {target}\n")
        assert [path.name for path in tmp_path.iterdir()] == ["start.gguf"]


@pytest.mark.parametrize("to", ["hf", "gguf", "orbax"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, capsys, start, to):
    """A limit of the system on the size of files ends each write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        code, out, err = run(capsys, start, tmp_path / "end", "--to", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, out, err.count("\n")) == (1, "", 1) and f"{tmp_path / 'end'} cannot be written" in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["start.gguf"]
