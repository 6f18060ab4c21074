"""The Jinja template that gemkit writes into models which expect turns and come without one.

It renders what `gemkit.text.chat` renders as ids: system text in front of the next user's, messages of one role
in a row as one turn, both with a blank line between, white space around a message dropped. transformers
(``apply_chat_template``), vLLM and llama.cpp run it.
"""

DEFAULT_TEMPLATE = r"""
{{- bos_token -}}
{%- set ns = namespace(turn='', text='', system='', waiting=false) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {%- set role = 'user' -%}
    {%- elif message['role'] in ['assistant', 'model'] -%}
        {%- set role = 'model' -%}
    {%- elif message['role'] in ['system', 'developer'] -%}
        {%- set role = 'system' -%}
    {%- else -%}
        {{- raise_exception('The roles of a conversation are user, assistant and system.') -}}
    {%- endif -%}
    {%- set ns.text = '' -%}
    {%- if message['content'] is string -%}
        {%- set ns.text = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] != 'text' -%}
                {{- raise_exception('This model reads text only.') -}}
            {%- endif -%}
            {%- if role == 'system' -%}
                {%- set ns.text = ns.text + part['text'] -%}
            {%- else -%}
                {%- set ns.text = ns.text + (part['text'] | trim) -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if role == 'system' -%}
        {%- set ns.system = (ns.system + '\n\n' if ns.waiting else '') + ns.text -%}
        {%- set ns.waiting = true -%}
    {%- else -%}
        {%- set turns = [[role, ns.text | trim]] -%}
        {%- if ns.waiting and role == 'user' -%}
            {%- set turns = [[role, ns.system + '\n\n' + (ns.text | trim)]] -%}
        {%- elif ns.waiting -%}
            {%- set turns = [['user', ns.system | trim], [role, ns.text | trim]] -%}
        {%- elif role == 'model' and ns.turn == '' -%}
            {{- raise_exception('A conversation begins with a message of the user or the system.') -}}
        {%- endif -%}
        {%- for turn in turns -%}
            {%- if turn[0] == ns.turn -%}
                {{- '\n\n' + turn[1] -}}
            {%- else -%}
                {{- ('<end_of_turn>\n' if ns.turn else '') + '<start_of_turn>' + turn[0] + '\n' + turn[1] -}}
            {%- endif -%}
            {%- set ns.turn = turn[0] -%}
        {%- endfor -%}
        {%- set ns.waiting = false -%}
    {%- endif -%}
{%- endfor -%}
{%- if ns.waiting and ns.turn == 'user' -%}
    {{- '\n\n' + (ns.system | trim) -}}
{%- elif ns.waiting -%}
    {{- ('<end_of_turn>\n' if ns.turn else '') + '<start_of_turn>user\n' + (ns.system | trim) -}}
{%- elif ns.turn == '' -%}
    {{- raise_exception('The conversation is empty.') -}}
{%- endif -%}
{{- '<end_of_turn>\n' -}}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\n' -}}
{%- endif -%}
""".strip()
