"""gemkit convert from and to Google's own checkpoints, as typed. Budget: 10 s."""

import json
import sys

import pytest
from engine.vocabulary import vocabulary
from weights.files import tiny_config, tiny_params

from gemkit.cli import main
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf_writer import write_gguf
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
