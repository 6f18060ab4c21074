"""Rules about the chat template, judged by the turns that it renders for a few short conversations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gemkit.errors import GemkitError, listed
from gemkit.text.chat import turns
from gemkit.text.special import END_OF_TURN, START_OF_TURN
from gemkit.tools.check.finding import ERROR, NOTE, WARNING, Hit, rule
from gemkit.tools.check.subject import GGUF, GOOGLE, KERAS, Subject

_SECONDS = 2.0
_USER, _MODEL, _NEXT, _SYSTEM = "Probe alpha.", "Probe beta.", "Probe gamma.", "Probe delta."
_ONE = [{"role": "user", "content": _USER}]
_TWO = [*_ONE, {"role": "assistant", "content": _MODEL}]
_MORE = [*_TWO, {"role": "user", "content": _NEXT}]
_WITH_SYSTEM = [{"role": "system", "content": _SYSTEM}, *_ONE]
_MARKER = re.compile(r"<[|/]?\w[^<>\s]{0,40}>|\[/?[A-Z]{2,12}\]")


@dataclass(frozen=True)
class Rendered:
    """The template's output for the probes; fault: the error for the plainest ones.

    one, more: with the model's turn opened; bare: `one` without that; two: a conversation that the model ended.
    system: with a system message, None if the template refuses that.
    """

    fault: str = ""
    one: str = ""
    bare: str = ""
    two: str = ""
    more: str = ""
    system: str | None = None


def rendered(s: Subject) -> Rendered | None:
    """Return the probes by the model's template, once for all rules; None if there is none that answers turns."""
    if not s.template or not s.answers or s.kind == KERAS:
        return None
    if "rendered" not in s.memory:
        s.memory["rendered"] = _render(s)
    return s.memory["rendered"]


def _render(s: Subject) -> Rendered:
    from gemkit.text.jinja import Template

    try:
        template = Template(s.template)
        variables = _variables(s)

        def text(messages: list[dict[str, str]], opened: bool = True) -> str:
            given = {"messages": messages, "add_generation_prompt": opened}
            return template.render({**variables, **given}, seconds=_SECONDS)

        one, bare, two, more = text(_ONE), text(_ONE, False), text(_TWO, False), text(_MORE)
    except GemkitError as error:
        return Rendered(fault=str(error))
    try:
        system = text(_WITH_SYSTEM)
    except GemkitError:
        system = None
    return Rendered("", one, bare, two, more, system)


def _variables(s: Subject) -> Mapping[str, str]:
    """Return the special tokens by the names that templates use."""
    found = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    for key in found:
        value = (s.tokenizer_config or {}).get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[key] = value
    return found


def closer(s: Subject) -> str | None:
    """Return the token that closes the model's turn in the template, "" if it is not a token; None if unknown."""
    made = rendered(s)
    if made is None or made.fault or s.tokens is None or _MODEL not in made.two:
        return None
    rest = made.two.rpartition(_MODEL)[2].lstrip()
    marker = _MARKER.match(rest)
    return marker[0] if marker and s.token_id(marker[0]) is not None else ""


def _google(messages: list[dict[str, str]]) -> str:
    text = "".join(f"{START_OF_TURN}{role}\n{content}{END_OF_TURN}\n" for role, content in turns(messages))
    return f"<bos>{text}{START_OF_TURN}model\n"


@rule(
    "template-broken",
    ERROR,
    "The chat template cannot be rendered.",
    why="programs refuse to chat, or fall back to turns of their own",
    remedy="take the chat_template of the instruction-tuned model that it was made from",
    causes=("unloadable",),
)
def template_broken(s: Subject) -> Iterator[Hit]:
    if (made := rendered(s)) and made.fault:
        yield s.where_template, made.fault


@rule(
    "template-missing",
    ERROR,
    "An instruction-tuned model has no chat template.",
    why="programs refuse to chat, or put the turns in a form that the model does not know",
    remedy="copy chat_template from the instruction-tuned model that it was made from",
)
def template_missing(s: Subject) -> Iterator[Hit]:
    if s.answers and not s.template and s.kind not in (KERAS, GOOGLE):
        where = (
            f"{s.config_file}: tokenizer.chat_template" if s.kind == GGUF else "tokenizer_config.json: chat_template"
        )
        yield where, "it is missing"


@rule(
    "template-drops",
    ERROR,
    "The chat template leaves out a part of the conversation.",
    why="the model never sees what was said there, and nothing tells the user",
    remedy="write every message's content; the published Gemma templates put system text in front of the first user's",
)
def template_drops(s: Subject) -> Iterator[Hit]:
    made = rendered(s)
    if made is None or made.fault:
        return
    parts = {"the user's text": _USER, "the model's text": _MODEL, "the user's second text": _NEXT}
    lost = [name for name, text in parts.items() if text not in made.more]
    if made.system is not None and _SYSTEM not in made.system:
        lost.append("the system text")
    if lost:
        yield s.where_template, f"it drops {listed(lost)}"


@rule(
    "template-bos",
    ERROR,
    "The chat template does not begin with <bos>.",
    why="a rendered conversation is tokenized as it is, and without <bos> a Gemma's answers are poor",
    remedy="begin the template with {{ bos_token }}",
)
def template_bos(s: Subject) -> Iterator[Hit]:
    if (made := rendered(s)) and not made.fault and not made.one.startswith("<bos>"):
        yield s.where_template, f"it begins with {made.one[:24]!r}"


@rule(
    "bos-doubled",
    ERROR,
    "The template or the tokenizer itself writes <bos> more than once.",
    why="a second <bos> lowers the quality of everything that follows",
    remedy="keep one {{ bos_token }} at the template's start, and one <bos> in the post_processor",
)
def bos_doubled(s: Subject) -> Iterator[Hit]:
    if (made := rendered(s)) and made.more.count("<bos>") > 1:
        yield s.where_template, f"it writes {made.more.count('<bos>')} <bos> into a conversation of three turns"
    if s.tokens is not None and (s.tokens.writes_bos or 0) > 1:
        yield "tokenizer.json: post_processor", f"it writes {s.tokens.writes_bos} <bos>"


@rule(
    "template-markers",
    WARNING,
    "The chat template writes markers that are no tokens of the tokenizer.",
    why="they become ordinary pieces, which is right only if the model was tuned so, and which no stop id names",
    remedy="add the markers to the tokenizer as the tuned model had them, or use the published template",
    causes=("template-stop", "template-other"),
)
def template_markers(s: Subject) -> Iterator[Hit]:
    made = rendered(s)
    if made is None or made.fault or s.tokens is None:
        return
    found = dict.fromkeys(marker for marker in _MARKER.findall(made.more) if s.token_id(marker) is None)
    if found:
        yield s.where_template, f"it writes {listed(found)}"


@rule(
    "template-stop",
    ERROR,
    "The chat template closes the model's turn with what is no stop id.",
    why="the model learned to end its answers so: generation runs on, until the length limit",
    remedy="add the token's id to eos_token_id in generation_config.json (GGUF: tokenizer.ggml.eot_token_id)",
    causes=("template-other", "stop-turn", "stop-turn-gguf"),
)
def template_stop(s: Subject) -> Iterator[Hit]:
    piece = closer(s)
    if piece is None or piece == END_OF_TURN:
        return  # that one has a rule of its own
    if piece == "":
        rest = rendered(s).two.rpartition(_MODEL)[2]
        yield s.where_template, f"it closes the turn with {rest[:24]!r}, in which there is no token for that"
    elif (token := s.token_id(piece)) not in _stop_ids(s):
        yield s.where_template, f"it closes the turn with {piece} ({token}), the stop ids are {_listed(s)}"


def _stop_ids(s: Subject) -> list[int]:
    if s.checkpoint is not None:
        return list(s.checkpoint.config.stop_token_ids)
    return [i for ids in s.said_eos.values() for i in ids if type(i) is int]


def _listed(s: Subject) -> str:
    return listed(_stop_ids(s)) or "none"


@rule(
    "template-prompt",
    ERROR,
    "The chat template cannot open the model's turn.",
    why="with add_generation_prompt nothing is added: the model goes on with the user's turn instead of answering",
    remedy="end the template with {% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    causes=("template-other",),
)
def template_prompt(s: Subject) -> Iterator[Hit]:
    if (made := rendered(s)) and not made.fault and made.one == made.bare:
        yield s.where_template, "add_generation_prompt changes nothing"


@rule(
    "template-other",
    NOTE,
    "The chat template renders other turns than Google's.",
    why="gemkit, transformers, vLLM and llama.cpp follow it; a program with Gemma's turns built in gives worse answers",
    remedy="leave it, if the model was tuned so; else take the chat_template of the published model",
)
def template_other(s: Subject) -> Iterator[Hit]:
    made = rendered(s)
    if made is None or made.fault:
        return
    for messages, text in ((_ONE, made.one), (_MORE, made.more), (_WITH_SYSTEM, made.system)):
        wanted = _google(messages)
        if text is not None and not _equal_but_bos(text, wanted) and _tells(messages, text):
            at = next((i for i, (a, b) in enumerate(zip(text, wanted)) if a != b), min(len(text), len(wanted)))
            start = max(0, at - 12)
            yield s.where_template, f"{text[start : at + 24]!r}, where Google's has {wanted[start : at + 24]!r}"
            return


def _equal_but_bos(text: str, wanted: str) -> bool:
    """Return whether two texts are equal but for <bos>: a missing or second one has its own rule."""
    return text.replace("<bos>", "") == wanted.replace("<bos>", "")


def _tells(messages: list[dict[str, str]], text: str) -> bool:
    """Return whether the difference is evidence of a fault: missing text has its own rule."""
    return all(message["content"] in text for message in messages)


@rule(
    "template-system",
    NOTE,
    "A Gemma 3's chat template refuses messages with the role system.",
    why="a request with a system prompt fails in programs that use the template; the published Gemma 3 template puts "
    "it in front of the first user's text",
    remedy="take the chat_template of the published Gemma 3",
)
def template_system(s: Subject) -> Iterator[Hit]:
    # Those of Gemma 1 and 2 were published so
    made = rendered(s)
    if made is not None and not made.fault and made.system is None and s.family == "gemma3_text":
        yield s.where_template, "it fails on the role system"


@rule(
    "template-twice",
    WARNING,
    "Two files hold different chat templates.",
    why="programs differ in which they take, and in the turns that they render",
    remedy="keep one: chat_template.jinja (transformers writes it), or chat_template in tokenizer_config.json",
)
def template_twice(s: Subject) -> Iterator[Hit]:
    for where, text in s.other_templates.items():
        if s.template is not None and text.strip() != s.template.strip():
            yield where, f"it differs from {s.where_template}, which counts"


@rule(
    "template-pretrained",
    WARNING,
    "A pretrained model has a chat template.",
    why="programs take it for a chat model and get poor answers: it was never taught turns",
    remedy="remove the template, or load the instruction-tuned model",
)
def template_pretrained(s: Subject) -> Iterator[Hit]:
    if s.template and s.tuned is False:
        yield s.where_template, f"the name says pretrained: {s.name}"
