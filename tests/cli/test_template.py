"""A model's own chat template on the command line: followed and said, refused, or replaced. Budget: 20 s."""

import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine.vocabulary import vocabulary
from parity import transformers_models as hf
from weights.files import tiny_config, tiny_params

import gemkit
from gemkit.cli import main
from gemkit.text.spm_proto import write_model
from gemkit.text.template import DEFAULT_TEMPLATE

CONFIG = tiny_config("gemma3_text", head_dim=32, vocab_size=len(vocabulary().pieces))
OWN = """{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
{{- '<start_of_turn>' + m.role + ':' + m.content + '<end_of_turn>' }}{% endfor %}
{%- if add_generation_prompt %}<start_of_turn>assistant:{% endif %}"""
NOTE = "brings its own chat template, which prompts follow"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    hf.build(CONFIG, tiny_params(CONFIG), torch.float32).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(write_model(vocabulary()))
    return folder


@pytest.fixture
def model(saved, tmp_path):
    """A function from a chat template to the folder of a model that has it."""

    def made(template: str | None) -> Path:
        folder = tmp_path / "own-model"
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return made


def run(capsys, *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in args])
    output = capsys.readouterr()
    return exit_.value.code or 0, output.out, output.err


def prompt(folder: Path, capsys, *args: object) -> tuple[list[int], str]:
    """The ids that were sent, from the receipt."""
    receipt = folder.parent / "receipt.json"
    code, _, err = run(capsys, "generate", folder, "-p", "hi", "-n", "1", "--receipt", receipt, *args)
    assert code == 0, err
    assert run(capsys, "replay", receipt, "--model", folder)[0] == 0
    return json.loads(receipt.read_text())["prompt_ids"], err


def test_it_is_followed_and_said_once(model, capsys):
    folder = model(OWN)
    ids, err = prompt(folder, capsys, "--system-prompt", "sys")
    with gemkit.load(folder, threads=1) as loaded:
        assert loaded.has_own_template and loaded.chat_template == OWN
        shown = loaded.tokenizer.decode(ids, skip_control=False)
        messages = [{"role": "system", "content": "sys"}, {"role": "user", "content": "hi"}]
        assert loaded.render(messages) == ids
        assert loaded.generate(messages, max_tokens=1).usage.prompt_tokens == len(ids)
    assert (
        shown
        == "<bos><start_of_turn>system:sys<end_of_turn><start_of_turn>user:hi<end_of_turn><start_of_turn>assistant:"
    )
    assert err.count(NOTE) == 1 and err.startswith("gemkit: own-model brings")


def test_googles_turns_are_not_mentioned(model, capsys):
    for template in (DEFAULT_TEMPLATE, DEFAULT_TEMPLATE + "{# saved again #}"):
        ids, err = prompt(model(template), capsys)
        assert NOTE not in err and ids.count(106) == 2 and ids.count(107) == 1


def test_the_prompt_as_it_is_follows_no_template(model, capsys):
    ids, err = prompt(model(OWN), capsys, "--raw")
    assert len(ids) == 3 and NOTE not in err


def test_one_that_cannot_be_run_is_refused_with_the_remedy(model, capsys):
    folder = model("{% for %}")
    code, out, err = run(capsys, "generate", folder, "-p", "hi", "-n", "1")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "the chat template of own-model cannot be followed: line 1: " in err and "--raw" in err
    for replaced in ([], ["--raw"], ["--chat-template", "gemma"]):
        assert run(capsys, "generate", folder, "-p", "hi", "-n", "1", *replaced)[0] == (0 if replaced else 1)


def test_another_one_is_given(model, capsys, tmp_path):
    (tmp_path / "other.jinja").write_text("{{ bos_token }}{% for m in messages %}x{{ m.content }}{% endfor %}")
    for folder in (model(OWN), model(None)):
        ids, err = prompt(folder, capsys, "--chat-template", tmp_path / "other.jinja")
        assert len(ids) == 4 and NOTE not in err
        ids, _ = prompt(folder, capsys, "--chat-template", "gemma")
        assert ids.count(106) == 2


def test_what_it_calls_eos_token_survives_conversion(model, capsys, tmp_path):
    source = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    folder, messages = model(source), [{"role": "user", "content": "hi"}]
    settings = {"eos_token": "<end_of_turn>", "bos_token": "<bos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    gguf, again = tmp_path / "m.gguf", tmp_path / "again"
    assert run(capsys, "convert", folder, gguf, "--to", "gguf")[0] == 0
    assert run(capsys, "convert", gguf, again, "--to", "hf")[0] == 0
    assert run(capsys, "convert", again, tmp_path / "same.gguf", "--to", "gguf", "--dtype", "bfloat16")[0] == 0
    for path in (folder, gguf, again, tmp_path / "same.gguf"):
        with gemkit.load(path, threads=1, dtype="int8") as loaded:
            ids = loaded.render(messages)
            assert loaded.tokenizer.decode(ids, skip_control=False) == "<bos>hi<end_of_turn>", path


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--chat-template", "no-such.jinja"], "no-such.jinja cannot be read"),
        (["--chat-template", "gemma", "--raw"], "drop it"),
        (["--chat-template", "gemma", "--suffix", "x"], "drop it"),
    ],
)
def test_wrong_use_is_refused(model, capsys, args, words):
    code, _, err = run(capsys, "generate", model(OWN), "-p", "hi", *args)
    assert code == 2 and words in err


def test_chat_follows_it_too(model, capsys, monkeypatch):
    for args, said in ([], True), (["--chat-template", "gemma"], False):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"hi"), isatty=lambda: False))
        code, _, err = run(capsys, "chat", model(OWN), "-n", "1", *args)
        assert code == 0 and (NOTE in err) == said
