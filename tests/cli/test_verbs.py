"""Every verb on the demo model gives what the Python API gives. Budget: 60 s."""

import io
import json
import math

import pytest

import gemkit
from gemkit.cli import main

PROMPT = "The planets, in order from the Sun, are"


@pytest.fixture(scope="module")
def model():
    with gemkit.load("demo", threads=2) as loaded:
        yield loaded


def run(capsys: pytest.CaptureFixture, *args: str) -> tuple[str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    output = capsys.readouterr()
    assert not exit_.value.code, output.err
    return output.out, output.err


def test_generate_prints_what_the_api_gives(capsys, model):
    expected = model.generate(PROMPT, max_tokens=12, temperature=0)
    out, err = run(capsys, "generate", "demo", "--prompt", PROMPT, "--max-tokens", "12", "--temp", "0")
    assert out == f"{expected.text}\n"
    assert "Mercury, Venus" in out and "tok/s" not in err


def test_run_is_generate_and_verbose_prints_rates_apart(capsys):
    args = ["--prompt", PROMPT, "--max-tokens", "4", "--temp", "0", "--verbose"]
    out, err = run(capsys, "run", "demo", *args)
    assert "tok/s" in err and "first token" in err and "peak memory" in err
    assert "tok/s" not in out


def test_the_prompt_can_come_from_standard_input(capsys, monkeypatch):
    args = ["generate", "demo", "--max-tokens", "4", "--temp", "0", "--prompt"]
    direct, _ = run(capsys, *args, PROMPT)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert run(capsys, *args, "-")[0] == direct


def test_generate_json(capsys, model):
    args = ["--prompt", PROMPT, "--max-tokens", "6", "--temp", "0", "--json", "--logprobs", "2"]
    record = json.loads(run(capsys, "generate", "demo", *args)[0])
    expected = model.generate(PROMPT, max_tokens=6, temperature=0)
    assert (record["text"], record["ids"], record["finish_reason"]) == (expected.text, list(expected.ids), "length")
    assert record["usage"]["completion_tokens"] == 6
    assert len(record["logprobs"]) == 6
    for entry in record["logprobs"]:
        assert len(entry["top"]) == 2
        assert entry["top"][0] == {name: entry[name] for name in ("id", "text", "logprob")}


def test_sampling_flags_reach_the_engine(capsys, model):
    flags = ["--temp", "0.9", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.01", "--repetition-penalty", "1.1"]
    flags += ["--presence-penalty", "0.2", "--frequency-penalty", "0.1", "--logit-bias", "236743=-3", "--seed", "5"]
    out, _ = run(capsys, "generate", "demo", "--prompt", PROMPT, "--max-tokens", "12", *flags)
    expected = model.generate(
        PROMPT,
        max_tokens=12,
        temperature=0.9,
        top_k=50,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        logit_bias={236743: -3.0},
        seed=5,
    )
    assert out == f"{expected.text}\n"


def test_stop_ends_the_text(capsys):
    args = ["generate", "demo", "--prompt", PROMPT, "--max-tokens", "20", "--temp", "0", "--stop", " Earth", "--json"]
    record = json.loads(run(capsys, *args)[0])
    assert record["finish_reason"] == "stop"
    assert record["text"].endswith("Venus,")


def test_score_is_the_api_and_windows_add_up(capsys, model, tmp_path):
    text = "Paris is the capital of France. Rome is the capital of Italy."
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    expected = model.score(text)
    record = json.loads(run(capsys, "score", "demo", "--file", str(path), "--json")[0])
    assert record["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert record["tokens"] == len(expected.logprobs)
    bos, *ids = expected.ids
    parts = [model.score([bos, *ids[start : start + 5]]).logprobs.sum() for start in range(0, len(ids), 5)]
    record = json.loads(run(capsys, "score", "demo", "--text", text, "--window", "5", "--json")[0])
    assert record["perplexity"] == pytest.approx(math.exp(-float(sum(parts)) / len(ids)), rel=1e-6)
    assert run(capsys, "score", "demo", "--text", text)[0].startswith("perplexity ")


def test_score_takes_its_text_as_an_argument_and_from_a_pipe(capsys, monkeypatch):
    text = "Paris is the capital of France."
    expected = json.loads(run(capsys, "score", "demo", "--text", text, "--json")[0])["perplexity"]
    assert json.loads(run(capsys, "score", "demo", text, "--json")[0])["perplexity"] == expected
    for extra in ([], ["-"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert json.loads(run(capsys, "score", "demo", *extra, "--json")[0])["perplexity"] == expected


def test_show(capsys):
    record = json.loads(run(capsys, "show", "demo", "--ctx-size", "2048", "--json")[0])
    assert record["parameters"]["total"] == 268_098_176
    assert record["stop_ids"] == [1, 106]
    assert sum(record["bytes_by_type"].values()) == sum(row["bytes"] for row in record["tensors"])
    assert sum(math.prod(row["shape"]) * row["count"] for row in record["tensors"]) == 268_098_176
    assert [run["attention"] for run in record["layers"]] == ["window 512", "full"] * 3
    memory = record["memory"]
    assert sum(group["layers"] for group in memory["cache"]) == 18
    cache = sum(group["bytes"] for group in memory["cache"])
    parts = sum(memory[part] for part in ("program", "weights", "screen", "activations"))
    assert memory["running"] == parts + cache and memory["total"] == max(memory["running"], memory["loading"])
    assert record["tensors"][0]["name"] == "model.embed_tokens.weight"
    out = run(capsys, "show", "demo", "--ctx-size", "2048")[0]
    assert "268,098,176" in out and "model.embed_tokens.weight" in out and "2,048 tokens" in out


def test_a_longer_context_costs_full_layers_only(capsys):
    short, long = (
        json.loads(run(capsys, "show", "demo", "--ctx-size", size, "--json")[0])["memory"]["cache"]
        for size in ("4096", "8192")
    )
    for before, after in zip(short, long):
        assert after["bytes"] == before["bytes"] * (2 if before["window"] is None else 1)


def test_bench(capsys):
    args = ["bench", "demo", "--prompt-tokens", "32", "--max-tokens", "8", "--reps", "1"]
    record = json.loads(run(capsys, *args, "--json")[0])
    for key, value in record.items():
        if key.endswith(("second", "seconds", "bytes", "gops", "peak", "bandwidth")):
            assert value > 0, key
    assert 0 < record["decode_share_of_bandwidth"] < 1.5
    out = run(capsys, *args)[0]
    assert "prefill, 32 tokens" in out and "GB/s" in out
