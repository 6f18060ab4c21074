"""Chat templates of several families, written for the tests, and a small vocabulary with their control tokens."""

import functools
import json

import numpy as np
import tokenizers
from engine.vocabulary import vocabulary
from transformers import PreTrainedTokenizerFast

from gemkit.text.tokenizer import Tokenizer
from gemkit.text.tokenizer_json import write_tokenizer_json
from gemkit.text.vocabulary import PieceType, Vocabulary

NAMES = """<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_function_declaration>
<end_function_declaration> <start_function_call> <end_function_call> <escape> <|user|> <|assistant|> <|system|>"""
NAMES = NAMES.split()

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'
}}{% endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ZEPHYR = """{{ bos_token }}{% if messages[0]['role'] == 'user' %}{% set rest = messages %}{% else %}
{{ '<|im_start|>system\n' ~ messages[0]['content'] | trim ~ '<|im_end|>\n' }}{% set rest = messages[1:] %}{% endif %}
{%- for m in rest %}
  {{- '<|im_start|>' ~ m.role ~ '\n' }}{{ m.content }}{{- '<|im_end|>\n' -}}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
DEVELOPER = """{{ bos_token }}{% for m in messages %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\n' + m.content + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
FUNCTIONS = """{{ bos_token }}
{%- macro shown(value) -%}
  {%- if value is string -%}<escape>{{ value }}<escape>
  {%- elif value is mapping -%}{ {%- for k, v in value | dictsort -%}
    {{ k }}:{{ shown(v) }}{{ ',' if not loop.last }}{%- endfor -%} }
  {%- elif value is iterable -%}[{% for v in value %}{{ shown(v) }}{{ ',' if not loop.last }}{% endfor %}]
  {%- else -%}{{ value | tojson }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(first=true) -%}
{%- if tools or messages[0].role in ['system', 'developer'] -%}
  {{- '<start_of_turn>developer\n' -}}
  {%- if messages[0].role in ['system', 'developer'] %}{{ messages[0].content | trim }}{% endif -%}
  {%- for tool in tools or [] -%}
    <start_function_declaration>declaration:{{ tool.function.name }}{{ shown(tool.function) }}<end_function_declaration>
  {%- endfor -%}
  {{- '<end_of_turn>\n' -}}
{%- endif -%}
{%- for m in messages if m.role not in ['system', 'developer'] -%}
  {{- '<start_of_turn>' + (m.role if m.role != 'assistant' else 'model') + '\n' -}}
  {%- if m.tool_calls is defined -%}
    {%- for call in m.tool_calls -%}
      <start_function_call>call:{{ call.function.name }}{{ shown(call.function.arguments) }}<end_function_call>
    {%- endfor -%}
  {%- endif -%}
  {%- if m.content is string %}{{ m.content | trim }}{% elif m.content %}{% for part in m.content -%}
    {{ part.text | trim }}{%- endfor %}{% endif -%}
  {{- '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif -%}"""
LLAMA = """{%- for message in messages -%}
{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim -%}
{%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif -%}
{{ content + '<|eot_id|>' }}{% endfor -%}
{%- if tools is not none and tools %}{{ tools | tojson(indent=2) }}{% endif -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt -}}"""
THINKING = """{{- bos_token }}{%- for m in messages %}
    {%- if m.role == 'assistant' and '</think>' in m.content %}
        {%- set said = m.content.split('</think>')[-1].lstrip('\n') %}
    {%- else %}{%- set said = m.content %}{%- endif %}
    {%- if m.role == 'assistant' %}
    {{- '<start_of_turn>model\n' }}{% generation %}{{ said }}<end_of_turn>{% endgeneration %}
    {%- else %}{{- '<start_of_turn>' ~ m.role ~ '\n' ~ said ~ '<end_of_turn>' }}{%- endif %}
    {%- if not loop.last %}{{ '\n' }}{% endif %}{% if loop.index > 6 %}{% break %}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '\n<start_of_turn>model\n' }}{% endif %}"""
BUILT = """{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
STRICT = """{{ bos_token }}{% for m in messages %}{%- if not (m.role == 'user') == (loop.index0 % 2 == 1) -%}
{{ raise_exception('turns\nmust alternate') }}{%- endif -%}{{ '<start_of_turn>' + m.role + ': ' + m.content
+ '<end_of_turn>' }}{% endfor %}{{ '<start_of_turn>model: ' if add_generation_prompt }}"""

TEMPLATES = {
    "chatml": CHATML,
    "zephyr": ZEPHYR,
    "developer": DEVELOPER,
    "functions": FUNCTIONS,
    "llama": LLAMA,
    "thinking": THINKING,
    "built": BUILT,
    "strict": STRICT,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Says "the weather" of é & <a place>.',
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "days": {"type": "integer", "enum": [1, 3]}},
                "required": ["place"],
            },
        },
    }
]


@functools.cache
def renamed(special: bool = True) -> Tokenizer:
    """A vocabulary with NAMES besides Gemma's control tokens, as words if not `special`."""
    return Tokenizer.from_vocabulary(_vocabulary(special))


@functools.cache
def oracle() -> PreTrainedTokenizerFast:
    """transformers' tokenizer of the same pieces, without the BOS that it puts before each text."""
    data = json.loads(write_tokenizer_json(_vocabulary()))
    data["post_processor"] = None
    made = tokenizers.Tokenizer.from_str(json.dumps(data))
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def _vocabulary(special: bool = True) -> Vocabulary:
    base = vocabulary()
    kinds = [PieceType.CONTROL if special else PieceType.USER_DEFINED] * len(NAMES) + [PieceType.CONTROL] * 2
    return Vocabulary(
        [*base.pieces, *(name.encode() for name in [*NAMES, "<mask>", "<unused50>"])],
        np.concatenate([base.scores, np.zeros(len(kinds), np.float32)]),
        np.concatenate([base.types, np.array(kinds, np.int32)]),
    )
