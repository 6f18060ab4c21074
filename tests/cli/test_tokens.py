"""`tokenize`, `embed` and the tokens in JSON are the API's and the vocabulary's. Budget: 15 s."""

import io
import json
from contextlib import contextmanager

import numpy as np
import pytest

import gemkit
from gemkit.api.load import load_tokenizer
from gemkit.cli import main
from gemkit.cli.tokens import shown_piece, token_record
from gemkit.text.tokenizer import Tokenizer
from gemkit.weights.open import open_checkpoint

TEXT = "Hello, wörld! 🦖 ก็\n\t<start_of_turn>"


@pytest.fixture(scope="module")
def model():
    with gemkit.load("demo", threads=2) as loaded:
        yield loaded


def run(capsys: pytest.CaptureFixture, *args: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    output = capsys.readouterr()
    assert (exit_.value.code or 0) == code, output.err
    return output.out, output.err


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_tokenize_prints_ids_and_pieces(capsys, model):
    ids = model.tokenizer.encode(TEXT)
    out, err = run(capsys, "tokenize", "demo", TEXT)
    rows = [line.split(None, 1) for line in out.splitlines()]
    assert [int(row[0]) for row in rows] == ids and len(rows) == len(ids)
    assert rows[0][1] == "<bos>" and ["9259", "Hello"] in rows and rows[3][1].startswith("▁")
    assert f"{len(ids)} tokens" in err and "--special" in err
    record = json.loads(run(capsys, "tokenize", "demo", TEXT, "--json")[0])
    assert [token["id"] for token in record["tokens"]] == ids and record["count"] == len(ids)
    assert record["ids"] == ids
    assert "".join(token["text"] for token in record["tokens"][1:]) == TEXT
    assert json.loads(run(capsys, "tokenize", "demo", TEXT, "--ids")[0]) == ids
    assert run(capsys, "tokenize", "demo", TEXT, "--count")[0] == f"{len(ids)}\n"
    assert json.loads(run(capsys, "tokenize", "demo", TEXT, "--ids", "--no-bos")[0]) == ids[1:]


def test_tokenize_reads_control_tokens_when_asked(capsys, model):
    out, err = run(capsys, "tokenize", "demo", TEXT, "--special", "--ids")
    assert json.loads(out)[-1] == model.tokenizer.start_of_turn_id and err == ""


def test_tokenize_renders_a_message_as_the_model_does(capsys, monkeypatch, tmp_path, model):
    expected = model.render([{"role": "user", "content": TEXT}])
    out, err = run(capsys, "tokenize", "demo", TEXT, "--chat", "--ids")
    assert json.loads(out) == expected and err == ""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.tokenizer._model.serialized_model_proto())
    assert json.loads(run(capsys, "tokenize", str(path), TEXT, "--chat", "--ids")[0]) == expected
    template = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    real = open_checkpoint

    @contextmanager
    def with_template(path):
        with real(path) as checkpoint:
            checkpoint.chat_template = template
            yield checkpoint

    monkeypatch.setattr("gemkit.weights.open.open_checkpoint", with_template)
    ids = json.loads(run(capsys, "tokenize", "demo", "hi", "--chat", "--ids")[0])
    assert model.tokenizer.decode(ids) == "[hi]"
    assert "leave out" in run(capsys, "tokenize", "demo", TEXT, "--chat", "--special", code=2)[1]


def test_tokenize_reads_files_and_pipes_and_refuses_two_forms(capsys, monkeypatch, tmp_path, model):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    expected = run(capsys, "tokenize", "demo", TEXT, "--ids")[0]
    assert run(capsys, "tokenize", "demo", "-f", str(path), "--ids")[0] == expected
    pipe(monkeypatch, TEXT)
    assert run(capsys, "tokenize", "demo", "--ids")[0] == expected
    assert "choose one" in run(capsys, "tokenize", "demo", TEXT, "--ids", "--json", code=2)[1]
    monkeypatch.setattr("sys.stdin", None)
    assert 'gemkit tokenize MODEL "TEXT"' in run(capsys, "tokenize", "demo", code=2)[1]


def test_a_tokenizer_needs_no_weights(capsys, tmp_path, model):
    import sentencepiece

    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.tokenizer._model.serialized_model_proto())
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode("The planets, in order")
    assert json.loads(run(capsys, "tokenize", str(path), "The planets, in order", "--ids", "--no-bos")[0]) == theirs
    assert isinstance(load_tokenizer(path), Tokenizer)
    assert "nowhere.gguf" in run(capsys, "tokenize", str(tmp_path / "nowhere.gguf"), "x", code=1)[1]


def test_the_text_of_a_token_that_is_a_byte(model):
    byte = model.tokenizer.piece_to_id("<0xF0>")
    assert token_record(model.tokenizer, byte) == {"id": byte, "text": "\ufffd", "bytes": [0xF0]}
    newline = model.tokenizer.piece_to_id("\n")
    assert token_record(model.tokenizer, newline) == {"id": newline, "text": "\n"}
    assert shown_piece(model.tokenizer, newline) == "\\n"


def test_generate_json_has_the_tokens_of_its_text(capsys):
    args = ["generate", "demo", "The dinosaur emoji is", "-n", "12", "-s", "3", "--json", "--logprobs", "2"]
    record = json.loads(run(capsys, *args)[0])
    assert [token["id"] for token in record["tokens"]] == record["ids"]
    data = b"".join(bytes(token.get("bytes", token["text"].encode())) for token in record["tokens"])
    assert data.decode("utf-8", "replace").startswith(record["text"])
    for entry, token in zip(record["logprobs"], record["tokens"], strict=True):
        assert entry["text"] == token["text"] and all(isinstance(top["text"], str) for top in entry["top"])


def test_embed_prints_what_the_api_gives(capsys, monkeypatch, tmp_path, model):
    texts = ["a cat", "a kitten", "naïve 🦖"]
    expected = model.embed(texts)
    rows = [json.loads(line) for line in run(capsys, "embed", "demo", *texts)[0].splitlines()]
    assert np.array_equal(np.array(rows, np.float32), expected)
    pipe(monkeypatch, "\r\n".join(texts) + "\n")
    record = json.loads(run(capsys, "embed", "demo", "--json")[0])
    assert [row["text"] for row in record["embeddings"]] == texts and record["width"] == expected.shape[1]
    assert np.array_equal(np.array([row["vector"] for row in record["embeddings"]], np.float32), expected)
    path, target = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    path.write_text("\n".join(texts[1:]), encoding="utf-8")
    out, err = run(capsys, "embed", "demo", texts[0], "-f", str(path), "-o", str(target))
    assert out == "" and "3 vectors" in err
    assert np.array_equal(np.load(target), expected) and np.load(target).dtype == np.float32
    assert run(capsys, "embed", "demo", "a", "-o", str(tmp_path / "one.npy"))[1].startswith("1 vector of ")


def test_what_embed_refuses(capsys, monkeypatch, tmp_path):
    pipe(monkeypatch, "a\n \nb\n")
    assert "line 2 of standard input is blank" in run(capsys, "embed", "demo", code=2)[1]
    pipe(monkeypatch, "")
    assert "there is no text" in run(capsys, "embed", "demo", code=2)[1]
    monkeypatch.setattr("sys.stdin", None)
    assert 'gemkit embed MODEL "TEXT"' in run(capsys, "embed", "demo", code=2)[1]
    assert "text 1 is blank" in run(capsys, "embed", "demo", "", code=2)[1]
    for target in ("x.txt", "x.npz"):
        assert "ends in .npy" in run(capsys, "embed", "demo", "a", "-o", str(tmp_path / target), code=2)[1]
    assert "does not exist" in run(capsys, "embed", "demo", "a", "-o", str(tmp_path / "no" / "x.npy"), code=2)[1]
    assert list(tmp_path.iterdir()) == []
