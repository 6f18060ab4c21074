"""Tuned stays tuned and pretrained stays pretrained through every format and name. Budget: 20 s."""

import json
import shutil

import pytest
from engine.vocabulary import vocabulary
from parity import llama_cpp

from gemkit.text.template import DEFAULT_TEMPLATE
from gemkit.tools.convert import convert
from gemkit.tools.quantize import quantize
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.gguf.write import write_gguf
from gemkit.weights.google.orbax_write import write_orbax
from gemkit.weights.hf.write import write_hf
from gemkit.weights.open import open_checkpoint
from gemkit.weights.quant import GGMLType

from . import files

WRITERS = {"gguf": write_gguf, "hf": write_hf, "orbax": write_orbax}


def model(tuned: bool, template: str | None = None, name: str = "") -> Checkpoint:
    config = files.tiny_config("gemma3_text", head_dim=32, vocab_size=300)
    return Checkpoint.from_params(
        config,
        files.tiny_params(config),
        GGMLType.BF16,
        vocabulary(),
        name=name,
        chat_template=template,
        instruction_tuned=tuned,
    )


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize("first", WRITERS)
@pytest.mark.parametrize("second", WRITERS)
def test_from_any_format_to_any(tmp_path, tuned, first, second):
    """Names say the contrary, at every step."""
    wrong, folder = ("pt", tmp_path / "a-pt") if tuned else ("it", tmp_path / "a-it")
    folder.mkdir()
    start = WRITERS[first](folder / f"gemma-3-1b-{wrong}", model(tuned, name=f"gemma-3-1b-{wrong}"))
    for path in (start, convert(start, folder / f"b-{wrong}", second)):
        with open_checkpoint(path) as back:
            assert back.instruction_tuned is tuned
            assert back.chat_template == (DEFAULT_TEMPLATE if tuned else None)
        other = path.with_name(f"c-{wrong}")
        shutil.move(path, other)
        with open_checkpoint(other) as back:
            assert back.instruction_tuned is tuned
        shutil.move(other, path)


def test_a_folder_whose_tokenizer_is_copied(tmp_path):
    """The name alone says that it is tuned, as in early releases."""
    source = write_hf(tmp_path / "plain", model(False))
    facts = json.loads((source / "config.json").read_text())
    assert facts.pop("gemkit_instruction_tuned") is False
    (source / "config.json").write_text(json.dumps(facts))
    shutil.move(source, tmp_path / "gemma-3-1b-it")
    again = convert(tmp_path / "gemma-3-1b-it", tmp_path / "my-folder", "hf")
    with open_checkpoint(again) as back:
        assert back.instruction_tuned and back.chat_template == DEFAULT_TEMPLATE
    quantize(again, tmp_path / "q.gguf", "q8_0")
    with open_checkpoint(tmp_path / "q.gguf") as back:
        assert back.instruction_tuned and back.chat_template == DEFAULT_TEMPLATE


def test_a_template_of_ones_own_stays(tmp_path):
    for first in WRITERS:
        with open_checkpoint(WRITERS[first](tmp_path / first, model(True, "{{ messages }}"))) as back:
            assert back.chat_template == "{{ messages }}"


def test_a_fine_tuning_of_a_marked_folder_is_tuned(tmp_path):
    """Fine-tuning adds a chat template, and transformers keeps keys of config.json that it does not know."""
    from transformers import AutoConfig

    folder = write_hf(tmp_path / "base", model(False))
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    with open_checkpoint(folder) as back:
        assert back.instruction_tuned is False
    shutil.copytree(folder, tmp_path / "x-it")
    with open_checkpoint(tmp_path / "x-it") as back:
        assert back.instruction_tuned is False
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with open_checkpoint(folder) as back:
        assert back.instruction_tuned is True


def test_transformers_and_llama_cpp_render_what_was_written(tmp_path):
    from transformers import AutoTokenizer

    folder = write_hf(tmp_path / "plain", model(True))
    turns = [{"role": "user", "content": "hello"}]
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n"
    path = convert(folder, tmp_path / "plain.gguf", "gguf")
    with open_checkpoint(path) as back, llama_cpp.templates(back.chat_template, path) as render:
        assert "<bos>" + render(turns) == text
