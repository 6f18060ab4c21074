"""The template that gemkit writes, as transformers and llama.cpp run it, against the turns. Budget: 10 s."""

import json
import random

import pytest
from parity import llama_cpp
from transformers.utils.chat_template_utils import render_jinja_template

from gemkit.errors import GemkitError
from gemkit.text.chat import turns
from gemkit.text.template import DEFAULT_TEMPLATE

TEXTS = ["a", " b ", "\n\nc\n", "", "d  d", " ", "é\t"]


def conversations(count: int) -> list[list[dict]]:
    rng = random.Random(4)
    made = []
    for _ in range(count):
        messages = []
        for _ in range(rng.randrange(6)):
            parts = [{"type": "text", "text": rng.choice(TEXTS)} for _ in range(rng.randrange(3))]
            role = rng.choice(["user", "assistant", "model", "system", "developer"])
            messages.append({"role": role, "content": rng.choice([rng.choice(TEXTS), parts])})
        made.append(messages)
    return made


def text(messages: list[dict], add: bool) -> str | None:
    try:
        shown = "".join(f"<start_of_turn>{role}\n{said}<end_of_turn>\n" for role, said in turns(messages))
    except GemkitError:
        return None
    return f"<bos>{shown}" + ("<start_of_turn>model\n" if add else "")


def test_the_default_template_renders_the_turns():
    refused = 0
    for number, messages in enumerate(conversations(2000)):
        add, wanted = number % 2 == 0, text(messages, number % 2 == 0)
        arguments = {"chat_template": DEFAULT_TEMPLATE, "add_generation_prompt": add, "bos_token": "<bos>"}
        if wanted is None:
            refused += 1
            with pytest.raises(Exception, match="conversation"):
                render_jinja_template([messages], **arguments)
        else:
            assert render_jinja_template([messages], **arguments)[0] == [wanted], messages
    assert 400 < refused < 1600
    for message in ({"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "image"}]}):
        with pytest.raises(Exception, match=r"^(The roles|This model reads text)"):
            render_jinja_template([[message]], chat_template=DEFAULT_TEMPLATE)


def test_llama_cpp_renders_the_default_template():
    """It leaves the BOS to its tokenizer and continues a last message of the assistant, which are not compared."""
    seen = 0
    with llama_cpp.templates(DEFAULT_TEMPLATE) as apply:
        for messages in conversations(300):
            if any(said.get("role") in ("assistant", "model") for said in messages[-1:]):
                continue
            # It gives a template content in parts as one string, and drops an empty list of them.
            plain = [m for m in messages if isinstance(m["content"], str)]
            if len(plain) == len(messages) and (wanted := text(messages, True)) is not None:
                seen += 1
                assert apply(messages) == wanted.removeprefix("<bos>"), json.dumps(messages)
        assert apply([{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": " b"}]}])
    assert seen > 20
