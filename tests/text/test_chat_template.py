"""A model's own chat template: the ids that transformers gives; no control token can be forged. Budget: 30 s."""

import random
import re
import subprocess
import sys

import pytest
from parity import llama_cpp
from text.templates import CHATML, DEVELOPER, FUNCTIONS, NAMES, TEMPLATES, TOOLS, _vocabulary, oracle, renamed
from text.test_chat import conversations

from gemkit.errors import GemkitError, GemkitWarning
from gemkit.text import chat, chat_template
from gemkit.text.chat_template import ChatTemplate, renders_gemma_turns
from gemkit.text.template import DEFAULT_TEMPLATE
from gemkit.text.tokenizer import Tokenizer
from gemkit.text.vocabulary import PieceType

TEXTS = [
    "a",
    " b \n",
    "",
    "é €\t\U0001f600",
    "two  spaces\n\n\nlines",
    "<think>x</think>\n\ny</think>z",
    "<b>&amp; \"q\" 'r' {x} {{ y }} {% z %}",
    "a < b > c [d] <|e |> <f",
    "\ue000\ue001",
    "</s> <div> \\n \\u003c",
]
ALL_CONTROL = [*NAMES, "<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<unused50>", "<mask>"]


def talk(rng: random.Random, first: str | None = None) -> list[dict]:
    roles = [first] * (first is not None) + ["user", "assistant"] * 4
    return [{"role": role, "content": rng.choice(TEXTS)} for role in roles[: rng.randrange(1, 8)]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers(name):
    """apply_chat_template gives the template's ids; gemkit puts one BOS in front where the template does not."""
    rng, template, seen = random.Random(5), ChatTemplate(TEMPLATES[name], renamed()), 0
    assert template.is_own
    for number in range(120):
        messages, add = (
            talk(rng, rng.choice(["system", None if name == "built" else "developer", None])),
            number % 2 == 0,
        )
        tools = TOOLS if number % 3 == 0 else None
        continued = add and messages[-1]["role"] == "assistant"
        options = {"add_generation_prompt": add and not continued, "continue_final_message": continued, "tools": tools}
        try:
            text = oracle().apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False, **options)
        except Exception as error:
            if "deletes portions" in str(error):  # the reasoning; what is left can be continued
                continue
            with pytest.raises(GemkitError, match=r"^the chat template cannot be followed: .*--raw"):
                template.render(messages, add, tools)
            continue
        seen += 1
        theirs = oracle().encode(text, add_special_tokens=False)
        ours = template.render(messages, add, tools)
        assert ours == [2, *theirs[theirs[:1] == [2] :]], (messages, text)
        assert ours[1] != 2
        if not continued:
            ids = oracle().apply_chat_template(messages, chat_template=TEMPLATES[name], **options)["input_ids"]
            assert ids == theirs
    assert seen >= 40


@pytest.mark.parametrize("name", ["developer", "thinking", "functions"])
def test_ids_in_the_published_vocabularies(gemma, name):
    template, seen = ChatTemplate(TEMPLATES[name], gemma.tokenizer), 0
    for number, messages in enumerate(conversations(80)):
        messages = [m | {"role": m["role"].replace("model", "assistant")} for m in messages]
        add = number % 2 == 0 and messages[-1]["role"] != "assistant"
        if all(isinstance(m["content"], str) for m in messages):
            seen += 1
            options = {"chat_template": TEMPLATES[name], "add_generation_prompt": add, "tokenize": False}
            wanted = gemma.templated.encode(oracle().apply_chat_template(messages, **options), add_special_tokens=False)
            assert template.render(messages, add) == wanted.ids, messages
    assert seen > 10


def test_llama_cpp_renders_the_same(tmp_path):
    """With its own Jinja, and content in strings as it wants it."""
    t = renamed()
    rng = random.Random(6)
    with llama_cpp.templates(DEVELOPER) as apply:
        template = ChatTemplate(DEVELOPER, t)
        for _ in range(60):
            messages = [m for m in talk(rng, "system") if m["content"].strip()]
            if messages and messages[-1]["role"] == "user":
                text = apply(messages)
                assert t.decode(template.render(messages), skip_control=False) == f"<bos>{text}", messages


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_message_forges_a_control_token(name, special):
    """Neither with names of control tokens nor with their halves; those are words of the vocabulary if not special."""
    tokenizer, rng = renamed(special), random.Random(7)
    template = ChatTemplate(TEMPLATES[name], tokenizer)
    pieces = [
        *ALL_CONTROL,
        "start_of_turn>",
        "<start_of_",
        "|im_end|>",
        "<|",
        "|>",
        "<",
        ">",
        "x",
        " ",
        "\n",
    ]
    # Words that the template does not name stay words
    named = [
        p for p in ALL_CONTROL if special or p in TEMPLATES[name] or p not in NAMES or ("|" in p and name == "built")
    ]
    control = {tokenizer.piece_to_id(piece) for piece in named}
    for _ in range(150):
        messages = [{"role": role, "content": "x"} for role in ["system", "user", "assistant", "user"]]
        wanted = [i for i in template.render(messages) if i in control]
        for message in messages:
            message["content"] = "".join(rng.choices(pieces, k=rng.randrange(1, 9))) or "x"
        ids = template.render(messages)
        assert [i for i in ids if i in control] == wanted, messages
        if name != "thinking":
            shown = tokenizer.decode(ids, skip_control=False)
            assert all(message["content"].strip() in shown for message in messages)


REWRITES = {
    "replace": "{{ m.content | replace('x', '') }}",
    "method": "{{ m.content.replace('x', '') }}",
    "lower": "{{ m.content | lower }}",
    "reverse": "{{ m.content | reverse }}",
    "escapes": "{{ m.content.replace('&lt;', '<').replace('&gt;', '>') }}",
    "glued": "{{ '<' + m.content }}",
    "split": "{% for part in m.content.split('x') %}{{ part }}{% endfor %}",
    "letters": "{% for c in m.content if c != 'x' %}{{ c }}{% endfor %}",
    "json": "{{ m | tojson }}",
    "ascii": "{{ m | tojson(ensure_ascii=True) }}",
    "printed": "{{ m }}",
    "format": "{{ '%s{}' | format(m.content) }}{{ '{}'.format(m.content) }}",
}


@pytest.mark.parametrize("name", REWRITES)
def test_no_message_forges_a_control_token_when_the_template_rewrites_it(name):
    source = "{{ bos_token }}{% for m in messages %}<start_of_turn>u" + REWRITES[name] + "<end_of_turn>{% endfor %}"
    template = ChatTemplate(source, renamed())
    start, end = (renamed().piece_to_id(piece) for piece in ("<start_of_turn>", "<end_of_turn>"))
    for forged in ("<start_of_turn>", "<sxtart_of_turnx>", "<START_OF_turn>", ">nrut_fo_trats<", "&lt;bos&gt;"):
        for text in (forged, "start_of_turn>", f"é {forged} \u2028"):
            ids = template.render([{"role": "user", "content": text}])
            assert [i for i in ids if renamed().is_control(i)] == [2, start, end], (text, ids)


def test_json_of_a_message_is_that_of_transformers():
    for source in ("{{ messages | tojson }}", "{{ messages | tojson(ensure_ascii=True, indent=1, sort_keys=True) }}"):
        messages = [{"role": "user", "content": "é <x> \u2028 \" ' \\"}]
        text = oracle().apply_chat_template(messages, chat_template=source, tokenize=False)
        assert ChatTemplate(source, renamed()).render(messages) == renamed().encode(text)
        forged = ChatTemplate(source, renamed()).render([{"role": "user", "content": "<bos>é"}])
        assert renamed().decode(forged).count("<bos>") == 1 and forged.count(2) == 1


# --- which template is Google's --------------------------------------------------------------------------------------

GEMMA1 = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim"
    " + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)


def published_gemma3() -> str:
    import json

    from testdata import data_file

    return json.loads(data_file("tokenizers", "gemma3.tokenizer_config.json").read_text("utf-8"))["chat_template"]


@pytest.fixture
def comparisons(monkeypatch, tmp_path):
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path))
    seen = []
    compare = chat_template._compare
    monkeypatch.setattr(chat_template, "_compare", lambda source: seen.append(source) or compare(source))
    return seen


def test_published_templates_are_known_without_running_them(comparisons):
    for source in (published_gemma3(), published_gemma3().replace("\n", "\r\n") + "\n", DEFAULT_TEMPLATE):
        assert renders_gemma_turns(source)
    assert not comparisons
    assert chat_template._compare(published_gemma3()) and chat_template._compare(
        DEFAULT_TEMPLATE
    )  # and the comparison would say the same


def test_googles_templates_need_no_jinja():
    code = "import sys; from gemkit.text.chat_template import renders_gemma_turns as f; import gemkit.api.model\n"
    code += "assert f(sys.stdin.read()); print([m for m in ('jinja2', 'gemkit.text.marks') if m in sys.modules])"
    source = published_gemma3()
    run = subprocess.run([sys.executable, "-c", code], input=source, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr


def test_others_that_render_the_same_are_compared_once(comparisons):
    for source in (
        GEMMA1,
        "{{ bos_token }}" + GEMMA1,
        DEFAULT_TEMPLATE + "{# a note #}",
        published_gemma3() + "{# a note #}",
    ):
        assert renders_gemma_turns(source) and renders_gemma_turns(source)
        template = ChatTemplate(source, renamed())
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
        assert template.render(messages) == chat.gemma_turns(renamed(), messages)
    assert len(comparisons) == 4


@pytest.mark.parametrize(
    "source",
    [
        *TEMPLATES.values(),
        GEMMA1.replace(" | trim", ""),
        GEMMA1.replace("raise_exception('alternate')", "''"),
        GEMMA1.replace("'model' if", "'assistant' if"),
        GEMMA1 + "{{ tools }}",
        GEMMA1 + "{% if enable_thinking %}x{% endif %}",
        GEMMA1.replace("{% for m in messages %}", "{% for m in messages[-5:] %}"),
        GEMMA1.replace("m['content']", "m['content'].split('</think>')[-1]"),
        "{% broken",
        "",
    ],
)
def test_others_are_followed(source, comparisons):
    assert not renders_gemma_turns(source) and not renders_gemma_turns(source) and len(comparisons) == 1


def test_a_cache_that_cannot_be_used_costs_time_alone(comparisons, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "file"))
    assert renders_gemma_turns(GEMMA1) and renders_gemma_turns(GEMMA1) and len(comparisons) == 2


# --- messages and refusals -------------------------------------------------------------------------------------------


def test_content_in_parts():
    parts = [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]
    for source in (CHATML, DEVELOPER, "{% for m in messages %}x{{ m.content }}{% endfor %}"):
        template = ChatTemplate(source, renamed())
        assert template.render([{"role": "user", "content": parts}]) == template.render(
            [{"role": "user", "content": " a b"}]
        )
    template = ChatTemplate(FUNCTIONS, renamed())  # which knows them, and trims each
    assert template.render([{"role": "user", "content": parts}]) == template.render([{"role": "user", "content": "ab"}])
    last = [{"role": "user", "content": "q"}, {"role": "model", "content": parts}]
    assert renamed().decode(template.render(last), skip_control=False).endswith("model\nab")
    with pytest.raises(GemkitError, match="cannot be followed"):
        ChatTemplate(CHATML, renamed()).render([{"role": "user", "content": [{"type": "image"}]}])


def test_calls_of_tools():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "é", "days": 2}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "21", "name": None},
    ]
    ids = ChatTemplate(FUNCTIONS, renamed()).render(messages, tools=TOOLS)
    text = oracle().apply_chat_template(
        messages, chat_template=FUNCTIONS, tools=TOOLS, add_generation_prompt=True, tokenize=False
    )
    assert ids == oracle().encode(text, add_special_tokens=False)
    call["function"]["arguments"]["place"] = "<escape>"
    forged = ChatTemplate(FUNCTIONS, renamed()).render(messages, tools=TOOLS)
    assert [i for i in forged if renamed().is_control(i)] == [i for i in ids if renamed().is_control(i)]
    with pytest.raises(GemkitError, match="no place for tools"):
        ChatTemplate(None, renamed()).render(messages[:1], tools=TOOLS)


def test_special_tokens_of_the_file():
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{{ image_token }}{% endfor %}"
    special = {"eos_token": "<|im_end|>", "image_token": "<escape>"}
    ids = ChatTemplate(source, renamed(), "", special).render([{"role": "user", "content": "<escape>"}])
    assert ids[-2:] == [renamed().piece_to_id("<|im_end|>"), renamed().piece_to_id("<escape>")]
    assert ids.count(ids[-1]) == 1
    assert ChatTemplate(source, renamed()).render([{"role": "user", "content": "x"}])[-1] == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", "line 1: "),
        ("{% for m in messages %}", "line 1: "),
        ("{{ raise_exception('no\n way') }}", "it says 'no way'"),
        ("{{ messages[9].content.x }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("gemma", "it writes nothing of the messages"),
        ("{% include 'x' %}", "cannot be followed"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 10 seconds"),
    ],
)
def test_what_cannot_be_rendered_is_refused_in_one_line(source, words, monkeypatch):
    if "seconds" in words:
        from gemkit.text import jinja

        monkeypatch.setattr(jinja._Guard, "__init__", with_seconds(jinja._Guard.__init__, 0.3))
        words = "more than 0.3 seconds"
    with pytest.raises(GemkitError, match=words) as error:
        ChatTemplate(source, renamed(), "Mine").render([{"role": "user", "content": "x"}])
    text = str(error.value)
    assert text.startswith("the chat template of Mine cannot be followed: ") and "--chat-template" in text
    assert "\n" not in text


def with_seconds(function, seconds):
    return lambda self, _: function(self, seconds)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{{ bos_token }}<|no_such|>user\n{{ messages[0].content }}<|no_such|>\n", "<|no_such|>"),
        ("{{ bos_token }}{{ '<|' ~ messages[0].role ~ 'x|>' }}{{ messages[0].content }}", "<|userx|>"),
    ],
)
def test_a_template_of_missing_tokens_is_followed_as_plain_text(source, name):
    """A model tuned on such turns without new tokens: transformers gives these ids; it is said once."""
    template = ChatTemplate(source, renamed(), "Mine")
    messages = [{"role": "user", "content": "é and b"}]
    text = oracle().apply_chat_template(messages, chat_template=source, tokenize=False)
    with pytest.warns(GemkitWarning, match=f"of Mine writes {re.escape(name)}, which the vocabulary lacks"):
        ids = template.render(messages, False)
    assert ids == oracle()(text, add_special_tokens=False).input_ids
    messages = [{"role": "user", "content": f"b{name}b"}]  # once is enough: a second warning would be an error here
    text = oracle().apply_chat_template(messages, chat_template=source, tokenize=False)
    assert renamed().decode(template.render(messages, False), skip_control=False) == text


def test_a_text_that_names_a_missing_token_is_a_text():
    ids = ChatTemplate(DEVELOPER, renamed()).render([{"role": "user", "content": "<|no_such|>"}])
    assert "<|no_such|>" in renamed().decode(ids)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ("hello", "no list"),
        ([{"content": "x"}], "message 0"),
        (["x"], "message 0"),
        ([{"role": "user", "content": object()}], "message 0 holds"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ],
)
def test_messages_are_checked(messages, words):
    with pytest.raises(GemkitError, match=words):
        ChatTemplate(CHATML, renamed()).render(messages)


def test_words_that_a_vocabulary_calls_control_are_words_to_the_template():
    """Such as the eos_token of a file that names a plain word: keys and roles are still found by their names."""
    base = _vocabulary()
    base.types[[base.pieces.index(letter) for letter in (b"e", b"u", b"t")]] = PieceType.CONTROL
    tokenizer = Tokenizer.from_vocabulary(base)
    ids = ChatTemplate(FUNCTIONS, tokenizer).render([{"role": "user", "content": "true"}], tools=TOOLS)
    assert tokenizer.decode(ids, skip_control=False).count("\ntrue<end_of_turn>") == 1


def test_nothing_of_the_messages_is_changed():
    messages = [{"role": "model", "content": [{"type": "text", "text": "a"}], "x": None}]
    before = repr(messages)
    ChatTemplate(FUNCTIONS, renamed()).render(messages)
    assert repr(messages) == before
