"""gemkit sft and gemkit lora as typed: results that everything loads, resume, refusals. Budget: 90 s."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.vocabulary import vocabulary
from parity.tolerances import LOSS_CURVE
from peft import PeftModel
from transformers import AutoModelForCausalLM
from weights.files import tiny_config, tiny_params

import gemkit
from gemkit.cli import cli, main
from gemkit.cli.tuning import BACKENDS, DATA
from gemkit.data.prepare import DataOptions
from gemkit.train.adapter import new_parts
from gemkit.train.metrics import read_metrics
from gemkit.train.plan import plan
from gemkit.train.tune import BITS, RECOMPUTE
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.hf.write import write_hf
from gemkit.weights.lora import LoraConfig
from gemkit.weights.peft.read import read_peft
from gemkit.weights.peft.write import write_peft
from gemkit.weights.quant import GGMLType

ROWS = [{"prompt": f"what follows {word}", "completion": f"after {word} comes the sea"} for word in "abcdefghijkl"]
CHAT = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}]
IDS = [2, *(4 + np.arange(24) * 7 % 30).tolist()]
SHORT = ("--max-seq-len", "64", "--batch-size", "2", "--eval-every", "2", "--seed", "3")
# Prepended to a program that trains: it kills itself when the row of this step would be logged
KILLED = """
import os, signal
from gemkit.train.log import RunLog
add = RunLog.add
def die(self, row):
    if row.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, row)
RunLog.add = die
"""


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A Gemma 3 in bfloat16 as a folder, in blocks, and an adapter of another model."""
    folder = tmp_path_factory.mktemp("made")
    config = tiny_config(
        "gemma3_text", hidden_size=64, head_dim=32, vocab_size=len(vocabulary().pieces), stop_token_ids=(1, 107)
    )
    params = {name: value * 0.2 for name, value in tiny_params(config).items()}
    checkpoint = Checkpoint.from_params(config, params, GGMLType.BF16, vocabulary(), name="Tiny")
    write_hf(folder / "tiny", checkpoint)
    write_gguf(folder / "q8.gguf", Checkpoint.from_params(config, params, GGMLType.Q8_0, vocabulary(), name="Tiny"))
    settings, other = LoraConfig(2, 4, targets=("q_proj",)), tiny_config("gemma", hidden_size=96)
    write_peft(folder / "foreign", settings, new_parts(settings, other, 0, dict))
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main([*map(str, args)])
        output = capsys.readouterr()
        return exit_.value.code or 0, output.out, output.err

    yield run
    torch.set_num_threads(threads)


def logprobs(model: torch.nn.Module) -> np.ndarray:
    """Log-probabilities of IDS[1:], by transformers' classes."""
    with torch.no_grad():
        logits = model.float()(torch.tensor([IDS])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(IDS)[1:, None])[:, 0].numpy()


def ours(path: Path, **options: object) -> np.ndarray:
    with gemkit.load(path, activations="float32", dtype="float32", **options) as model:
        return model.score(IDS).logprobs


def test_an_adapter_for_gemkit_and_for_peft(run, made, tmp_path):
    data, model = made / "rows.jsonl", made / "tiny"
    code, out, err = run(
        "lora", model, "--data", data, *SHORT, "--max-steps", 12, "--lr", 0.02, "--sample-prompt", "what follows b"
    )
    folder = Path("tiny-lora")
    assert code == 0, err
    assert re.fullmatch(
        r"tiny-lora\nloss [\d.]+, validation loss [\d.]+ \(before the first step: [\d.]+\)\ntry it: gemkit chat .*\n",
        out,
    )
    assert "step 12/12  loss" in err and "step 12: what follows b →" in err
    rows = read_metrics(folder / "metrics.csv")
    assert [row.step for row in rows] == list(range(13)) and rows[-1].validation_loss < rows[0].validation_loss - 0.3
    files = {path.name for path in folder.iterdir()}
    assert files >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "NOTICE",
        "loss.svg",
        "loss.png",
        "checkpoints",
    }
    assert not [name for name in files if name.startswith(".")]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 16, str(model))

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before, found = logprobs(base), ours(model, adapter=folder)
    assert np.abs(found - before).max() > 0.1
    np.testing.assert_allclose(found, logprobs(PeftModel.from_pretrained(base, folder)), atol=1e-4)
    # The pretrained model expects turns with it
    with gemkit.load(model) as plain, gemkit.load(model, adapter=folder) as tuned:
        assert (plain.checkpoint.instruction_tuned, tuned.checkpoint.instruction_tuned) == (False, True)
    code, out, err = run("generate", model, "--adapter-path", folder, "what follows b", "-n", 4, "--temp", 0, "--json")
    assert code == 0 and json.loads(out)["usage"]["prompt_tokens"] > 20


def test_every_framework_trains_alike(run, made, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    losses = {}
    for backend in ("torch", "jax", "keras"):
        options = ("--max-steps", 6, "--lr", 0.01, "--backend", backend, "--output-dir", backend)
        code, _, err = run(
            "lora", made / "tiny", "--data", made / "rows.jsonl", *SHORT, *options, "--sample-prompt", "b"
        )
        assert code == 0 and "step 6: b →" in err, err
        rows = read_metrics(Path(backend) / "metrics.csv")[1:]
        losses[backend] = np.array([(row.loss, row.validation_loss) for row in rows], float)
        np.testing.assert_allclose(losses[backend], losses["torch"], atol=LOSS_CURVE)
        assert read_peft(Path(backend)).parts.keys() == read_peft(Path("torch")).parts.keys()
    assert losses["torch"][-1][0] < losses["torch"][0][0] - 0.1


def test_a_model_for_gemkit_and_for_transformers(run, made):
    args = ("--data", made / "rows.jsonl", *SHORT, "--max-steps", 4, "--lr", 0.005, "-o", "end")
    code, out, _ = run("finetune", made / "tiny", *args, "--json")
    record = json.loads(out)
    assert code == 0 and record["path"] == "end" and record["validation_loss"] < record["first_validation_loss"]
    before = AutoModelForCausalLM.from_pretrained(made / "tiny", dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained("end", dtype=torch.float32)
    found = ours(Path("end"))
    assert np.abs(found - logprobs(before)).max() > 0.05
    np.testing.assert_allclose(found, logprobs(after), atol=1e-4)
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert sum(changed) > 0.7 * len(changed)
    assert (
        "modified" in Path("end/NOTICE").read_text()
        and json.loads(Path("end/config.json").read_text())["dtype"] == "bfloat16"
    )
    with gemkit.load("end") as model:
        assert model.checkpoint.instruction_tuned and model.stop_ids >= {1, 107}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(("verb", "result"), [("lora", "adapter_model.safetensors"), ("sft", "model.safetensors")])
def test_a_killed_run_ends_with_the_same_bits(run, made, verb, result):
    args = [verb, made / "tiny", "--data", made / "rows.jsonl", *SHORT, "--max-steps", 8, "--save-every", 2]
    args += ["--lora-dropout", 0.1] if verb == "lora" else []
    assert run(*args, "-o", "whole")[0] == 0
    program = f"{KILLED.format(step=6)}\nimport sys, gemkit.cli\ngemkit.cli.main(sys.argv[1:])"
    command = [sys.executable, "-c", program, *map(str, args), "-o", "killed"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not Path("killed", result).exists()
    code, _, err = run(*args, "-o", "killed")
    assert code == 1 and "killed has a run: resume it (--resume)" in err
    code, _, err = run(*args, "-o", "killed", "--resume")
    assert code == 0 and "resumed after step 4 of 8" in err
    assert Path("killed", result).read_bytes() == Path("whole", result).read_bytes()
    # A finished run is written again; another data set or adapter is not the run's
    assert run(*args, "-o", "killed", "--resume")[0] == 0
    assert Path("killed", result).read_bytes() == Path("whole", result).read_bytes()
    other = write_rows(Path("other.jsonl"), ROWS[:-1])
    for more, word in ((["--data", other], "data set"), (["--no-mask-prompt"], "masking of prompts")):
        code, _, err = run(*args, "-o", "killed", "--resume", *more)
        assert (
            code == 1 and err.splitlines()[1].startswith(f"gemkit: the {word} is not that of") and err.count("\n") == 2
        )
    assert Path("killed", result).read_bytes() == Path("whole", result).read_bytes()


@pytest.mark.parametrize("model", ["tiny", "q8.gguf"])
def test_an_adapter_that_goes_on_from_another(run, made, model):
    """Also on matrices of few bits, from quantised files, with DoRA, some targets and a plain template."""
    args = ("lora", made / model, "--data", made / "rows.jsonl", *SHORT, "--max-steps", 2, "--template", "none")
    kinds = ("--lora-target", "q_proj,v_proj", "--lora-rank", 3, "--lora-alpha", 5, "--dora", "--rslora")
    assert run(*args, "-o", "first", *kinds, "--quantize", "int8")[0] == 0
    first = read_peft("first")
    assert first.config == LoraConfig(3, 5, 0.0, ("q_proj", "v_proj"), rslora=True, dora=True)
    assert first.chat_template is None
    code, out, err = run(*args, "-o", "second", "--adapter-path", "first", "--lr", 1e-9)
    assert code == 0 and "try it: gemkit generate" in out, err
    second = read_peft("second")
    assert dataclasses.replace(second.config) == first.config
    for name, part in first.parts.items():
        np.testing.assert_allclose(second.parts[name].b, part.b, atol=1e-7)
        assert part.b.any() and not np.array_equal(second.parts[name].b, part.b)
    code, _, err = run(*args, "-o", "third", "--adapter-path", "first", "--lora-rank", 3)
    assert code == 2 and "--lora-rank is of a new adapter" in err


def test_a_dry_run_shows_data_and_plan_and_writes_nothing(run, made, tmp_path):
    before = sorted(tmp_path.iterdir())
    code, out, err = run("lora", made / "tiny", "--data", made / "rows.jsonl", *SHORT, "--max-steps", 5, "--dry-run")
    assert (code, err) == (0, "") and sorted(tmp_path.iterdir()) == before
    assert re.search(r"^«after \w comes the sea<end_of_turn>»$", out, re.M) and re.search(
        r"^ +\d+-\d+ +\d+ +#+$", out, re.M
    )
    assert re.search(r"^Parameters: 0\.\d M, of which 0\.\d\d M are trained$", out, re.M)
    assert "Steps: 5 with batches of up to 2×64 tokens" in out
    assert re.search(r"^Memory: about 0\.\d\d GB \(weights .*\)(; [\d.]+ GB are free)?$", out, re.M)
    assert re.search(r"^Time: about \d+ s, at ", out, re.M)


def test_the_plan_counts_the_trained_parameters(made):
    with gemkit.load(made / "tiny") as model:
        config = model.config
    lora = LoraConfig(4, 8, dora=True)
    parts = new_parts(lora, config, 0, lambda name: np.ones(lora.weights(config)[name][0]))
    count = sum(part.a.size + part.b.size + part.magnitude.size for part in parts.values())
    found = plan(config, lora, 10, (2, 64), 1, 0.5, "float32")
    assert found.trained == count and found.parameters == config.parameter_count() + count
    whole = plan(config, None, 10, (2, 64), 1, 0.5, "float32")
    assert whole.trained == config.parameter_count()
    assert whole.memory["trained weights and optimiser"] == 16 * whole.trained
    packed = plan(config, lora, 10, (2, 64), 1, 0.5, "float32", bits=4)
    assert packed.memory["weights"] < 0.4 * found.memory["weights"]


def test_too_little_memory_is_refused(run, made, monkeypatch):
    monkeypatch.setattr("gemkit.train.tune.free_memory", lambda: 10**8)
    code, _, err = run("sft", made / "tiny", "--data", made / "rows.jsonl")
    assert code == 1 and re.fullmatch(r"gemkit: not enough memory: the run takes .*; lower --batch-size .*\n", err)
    assert not Path("tiny-sft").exists()


def test_a_file_with_the_options(run, made):
    Path("run.toml").write_text(f'data = "{(made / "rows.jsonl").as_posix()}"\nmax-steps = 9\nlora_rank = 2\n')
    args = ("lora", made / "tiny", "--config", "run.toml", "--dry-run")
    assert "Steps: 9 with" in run(*args)[1] and "Steps: 7 with" in run(*args, "--max-steps", 7)[1]
    for text, words in (("max-stepz = 1", "did you mean 'max-steps'?"), ("lr = true", "give a text or a number")):
        Path("run.toml").write_text(text)
        code, _, err = run(*args)
        assert code == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no rows"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}\n', "rows.jsonl:1: "),
        (b'{"prompt": "a", "completion": "b"}\n{"text": "c"}\n', "rows.jsonl:2: the row has another format"),
        (b'{"prompt": "a", "completion": "\xff"}\n', "rows.jsonl:1: invalid UTF-8: byte 0xFF"),
        (b'{"prompt": "a", "completion": "' + b"long " * 99 + b'"}\n', "rows.jsonl:1: longer than 64 tokens"),
        (b'{"prompt": "' + b"long " * 99 + b'", "completion": "b"}\n', "rows.jsonl:1: longer than 64 tokens"),
        (None, "does not exist"),
    ],
)
def test_bad_data_is_one_line(run, made, content, words):
    if content is not None:
        Path("rows.jsonl").write_bytes(content)
    code, out, err = run("sft", made / "tiny", "--data", "rows.jsonl", *SHORT, "--on-long", "fail", "-o", "end")
    assert (code, out) == (1, "") and err.startswith("gemkit: ") and err.count("\n") == 1 and words in err
    assert not Path("end").exists()


@pytest.mark.parametrize(
    ("verb", "more", "code", "words"),
    [
        ("lora", ["--lr", "-1"], 2, "lr is -1.0; give a number above 0"),
        ("lora", ["--lora-rank", "0"], 2, "the rank is 0"),
        ("lora", ["--lora-target", "no_proj"], 2, "no projection of a layer"),
        ("lora", ["--lora-dropout", "1"], 2, "the dropout is 1.0"),
        ("sft", ["--epochs", "1", "--max-steps", "2"], 2, "steps and epochs are both given"),
        ("sft", ["--batch-size", "0"], 2, "batch_size is 0"),
        ("sft", ["--sample-prompt", " "], 2, "--sample-prompt is blank"),
        ("sft", ["--validation", "1"], 2, "validation is 1.0"),
        ("sft", ["--device", "nowhere"], 2, "no device 'nowhere'"),
        ("sft", ["--lora-rank", "4"], 2, "No such option"),
        ("lora", ["--adapter-path", "FOREIGN"], 1, "load it with the model it was trained on"),
        ("sft", ["-o", "full"], 1, "full is not empty"),
        ("sft", ["-o", "full", "--resume"], 1, "full is not empty"),
        ("sft", ["-o", "full/file"], 1, "full/file is a file"),
    ],
)
def test_wrong_options_are_one_line(run, made, verb, more, code, words):
    Path("full").mkdir()
    Path("full/file").write_text("something")
    more = [str(made / "foreign") if one == "FOREIGN" else one for one in more]
    found, out, err = run(verb, made / "tiny", "--data", made / "rows.jsonl", "--max-seq-len", 64, *more)
    assert (found, out) == (code, "") and err.startswith("gemkit: ") and err.count("\n") == 1 and words in err, err
    assert sorted(path.name for path in Path().iterdir()) == ["full"] and len(list(Path("full").iterdir())) == 1


def test_rows_that_are_left_out_or_cut_are_told(run, made):
    Path("rows.jsonl").write_bytes(b'{"text": "%s"}\n{"text": ""}\n{"text": "a b c"}\n' % (b"long " * 99))
    args = ("sft", made / "tiny", "--data", "rows.jsonl", *SHORT, "--max-steps", 1, "--on-bad-row", "skip")
    code, _, err = run(*args, "--validation", 0)
    assert code == 0 and "  1 × " in err and "rows.jsonl:2" in err and "1 rows are longer than 64 tokens" in err
    with gemkit.load("tiny-sft") as model:  # text teaches no turns
        assert model.checkpoint.instruction_tuned is False


def test_the_help_states_the_defaults_of_the_options():
    defaults = {field.name: field.default for field in dataclasses.fields(DataOptions)}
    for verb in ("sft", "lora"):
        options = {option.name: option for option in cli.get_command(None, verb).params}
        for param, name in DATA.items():
            text = options[param].help
            assert f"(default: {defaults[name]})" in text or "(default)" in text, param
        assert (
            tuple(options["recompute"].type.choices) == RECOMPUTE and tuple(options["backend"].type.choices) == BACKENDS
        )
    assert tuple(options["quantize"].type.choices) == tuple(BITS)
